"""The source model: its config, its weights, and everything that can be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hfft.complaints import nearest
from hfft.errors import InputError
from hfft.layers import find_layer_groups
from hfft.sections import ModelConfig
from hfft.text import pooled  # noqa: F401 (registers its model with transformers)

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class LoadedModel:
    """A model with the source's weights.

    Attributes:
        model: float32, its new head initialised from torch's global generator.
        notes: plain sentences on what the source did not bring.
        new_head: whether the source brought no head that fits.
    """

    model: PreTrainedModel
    notes: list[str]
    new_head: bool


def read_model_config(source: ModelConfig) -> PretrainedConfig:
    """Read the source's config without its weights.

    Raises:
        InputError: the folder is no model, its weights are pickled, its code is remote, or the
            Hub can't be reached.
    """
    if Path(source.name).exists():
        _check_folder(source)
    elif _looks_like_path(source.name):
        raise InputError(f"model: there is no folder {source.name}{_neighbours(source.name)}")
    config: PretrainedConfig = _explained(
        source,
        lambda: AutoConfig.from_pretrained(
            source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            attn_implementation=source.attn_implementation,
        ),
    )
    config.dtype = torch.float32  # of the weights that train; mixed precision is training.bf16
    return config


def skeleton(
    auto_model: Any, config: PretrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model on torch's meta device: every name and shape, no memory.

    Raises:
        InputError: the architecture has no such head.
    """
    with torch.device("meta"):
        return initialise(auto_model, config, trust_remote_code)


def initialise(
    auto_model: Any, config: PretrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model with fresh weights, from torch's global generator."""
    try:
        # left out, transformers would ask on stdin whether the code may run
        model: PreTrainedModel = auto_model.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        cause = _first_line(error)
        if cause.startswith("Unrecognized configuration class"):
            cause = f"transformers has none of its kind, {config.model_type}; take another model"
        raise InputError(
            f"model: {config.name_or_path or type(config).__name__} can't be built as "
            f"{auto_model.__name__}: {cause}"
        ) from error
    return model


def check_shapes(source: ModelConfig, model: PreTrainedModel) -> None:
    """Compare a local source's weights with the model they are for, without loading them.

    Weights whose name transformers changes on loading are left to `load_weights`.

    Raises:
        InputError: weights below the head have other shapes than the model's.
    """
    stored = _stored_shapes(source)
    head = set(find_layer_groups(model).head.parameters)
    misfits = {}
    for name, parameter in model.named_parameters():
        shape = _stored(name, stored, model) or parameter.shape
        # a shape with as many elements may be one that transformers turns round on loading
        if name not in head and math.prod(shape) != parameter.numel():
            misfits[name] = (shape, parameter.shape)
    _refuse(source, misfits)


def head_is_new(source: ModelConfig, model: PreTrainedModel, head: Iterable[str]) -> bool:
    """Say whether `load_weights` will find no head for the model's classes in the source.

    Known for certain once the weights are loaded; for a Hub id this goes by what the source's
    config says.
    """
    own = read_model_config(source)
    if own.id2label != model.config.id2label:
        return True
    if not Path(source.name).exists():
        return type(model).__name__ not in (own.architectures or [])
    stored, shapes = _stored_shapes(source), dict(model.named_parameters())
    return any(_stored(name, stored, model) != list(shapes[name].shape) for name in head)


def not_in_source(
    source: ModelConfig, model: PreTrainedModel, head: Iterable[str]
) -> frozenset[str]:
    """Return the parameters below the head that a local source lacks.

    None where that can't be known: of a Hub id, and where most names are changed on loading.
    """
    if not Path(source.name).exists():
        return frozenset()
    stored, body = _stored_shapes(source), {n for n, _ in model.named_parameters()} - set(head)
    lacking = {name for name in body if _stored(name, stored, model) is None}
    return frozenset(lacking) if len(lacking) * 10 <= len(body) else frozenset()


def _stored_shapes(source: ModelConfig) -> dict[str, list[int]]:
    files = sorted(Path(source.name).glob("model*.safetensors"))
    found: dict[str, list[int]] = _explained(
        source, lambda: {n: s for path in files for n, s in _shapes(path).items()}
    )
    return found


def _stored(name: str, stored: Mapping[str, list[int]], model: PreTrainedModel) -> list[int] | None:
    """Return the shape that a parameter has in the source, under any of its names there."""
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    names = (name, bare, name.removeprefix("timm_model."))
    return next((stored[n] for n in names if n in stored), None)


def load_weights(auto_model: Any, source: ModelConfig, config: PretrainedConfig) -> LoadedModel:
    """Load the source's weights into the model that `config` describes.

    The source's head is kept where its classes are those of `config`, name by name.

    Raises:
        InputError: the weights can't be read, or don't fit below the head.
    """
    model, info = _explained(
        source,
        lambda: auto_model.from_pretrained(
            source.name,
            config=config,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=None if source.allow_pickle else True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        ),
    )
    head = set(find_layer_groups(model).head.parameters)
    other_sizes = {item[0]: item[1:] for item in info["mismatched_keys"]}
    _refuse(source, {name: sizes for name, sizes in other_sizes.items() if name not in head})
    own = read_model_config(source)
    new_head = bool(other_sizes or head & set(info["missing_keys"]))
    notes = []
    if sizes := next(iter(other_sizes.values()), None):
        notes.append(
            f"the head is new: the source's has {sizes[0][0]} outputs, the task {sizes[1][0]}"
        )
    elif new_head:
        notes.append("the head is new: the source has none for this task")
    elif head and own.id2label != config.id2label:
        _initialise_anew(model, head)
        new_head = True
        notes.append("the head is new: the source's classes are others")
    elif head and config.id2label != {n: f"LABEL_{n}" for n in config.id2label or {}}:
        notes.append("the head is the source's own: its classes are the same")
    if missing := sorted(set(info["missing_keys"]) - head):
        body = {name for name, _ in model.named_parameters()} - head
        if len(body.intersection(missing)) > len(body) / 2:
            raise InputError(
                f"model: {source.name} is no source for a {type(model).__name__}: it lacks "
                f"{len(body.intersection(missing))} of the {len(body)} weights below the head, "
                f"first {missing[0]}; is its config.json that of another model?"
            )
        notes.append(
            f"{len(missing)} weights below the head are not in the source and start afresh: "
            f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
        )
    return LoadedModel(model, notes, new_head)


def carry_all(old: PreTrainedModel, new: PreTrainedModel) -> frozenset[str]:
    """Copy all weights into a model with the same head, of the same classes.

    Returns:
        The names of its parameters; none where the heads differ.
    """
    theirs, own = old.state_dict(), new.state_dict()
    alike = type(old) is type(new) and old.config.id2label == new.config.id2label
    if not alike or {n: t.shape for n, t in theirs.items()} != {n: t.shape for n, t in own.items()}:
        return frozenset()
    new.load_state_dict(theirs)
    return frozenset(name for name, _ in new.named_parameters())


def carry_body(old: PreTrainedModel, new: PreTrainedModel) -> frozenset[str]:
    """Copy all weights below the head from a model into one with another head.

    Returns:
        The names of the parameters in `new` that were copied.

    Raises:
        InputError: less than half of the body is the same.
    """
    body = new.base_model
    prefix = next(f"{path}." if path else "" for path, m in new.named_modules() if m is body)
    theirs = dict(old.base_model.state_dict(keep_vars=True))
    copied = set[str]()
    with torch.no_grad():
        for name, tensor in body.state_dict(keep_vars=True).items():
            if name in theirs and theirs[name].shape == tensor.shape:
                tensor.copy_(theirs[name])
                copied.add(prefix + name)
    own = {prefix + name for name, _ in body.named_parameters()}
    if len(copied & own) * 2 < len(own):
        raise InputError(
            f"stages: {type(old).__name__} and {type(new).__name__} have no body in common, so "
            f"their tasks can't follow one another"
        )
    return frozenset(copied & own)


def _initialise_anew(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Draw parameters again as the model's own code does, from torch's global generator."""
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(path)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            # set on what was loaded; transformers leaves such tensors alone
            tensor._is_hf_initialized = False  # type: ignore[attr-defined]
        with torch.no_grad():
            cast(Any, model)._init_weights(module)


def _refuse(source: ModelConfig, misfits: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise InputError where there are `misfits`: name to the stored and the wanted shape."""
    if misfits:
        name, (stored, wanted) = next(iter(misfits.items()))
        raise InputError(
            f"model: {source.name}: {len(misfits)} weights below the head have other sizes than "
            f"the model asked for, first {name}: {tuple(stored)} stored, {tuple(wanted)} wanted; "
            f"was the image size or another part of the architecture changed?"
        )


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _check_folder(source: ModelConfig) -> None:
    folder = Path(source.name)
    if not folder.is_dir():
        raise InputError(f"model: {folder} is a file; give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        inner = folder / "model" / "config.json"
        hint = f"; did you mean {inner.parent}?" if inner.is_file() else ""
        raise InputError(f"model: {folder} is no model folder: it has no config.json{hint}")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"model: {folder} holds an adapter beside its weights; merge it into them first "
            f"(peft's merge_and_unload), or remove adapter_config.json to start without it"
        )
    weights = list(folder.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(path, "pt"):  # reads the header, and compares the file's size with it
                pass
        except SafetensorError as error:
            raise InputError(f"model: {path} can't be loaded: {error}; copy it anew") from error
    if weights or source.allow_pickle:
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"model: {folder} holds pickled weights only ({pickled[0]}), and loading them can run "
            f"code; convert them to safetensors, or set model.allow_pickle: true if you trust them"
        )
    raise InputError(f"model: {folder} holds no weights (*.safetensors)")


def _explained(source: ModelConfig, load: Callable[[], Any]) -> Any:
    """Call `load`; turn what the libraries raise into one message that names the remedy."""
    try:
        return load()
    except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError) as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            remedy = (
                "needs Python code from its own repository, which is off unless you set "
                "model.trust_remote_code: true"
            )
        elif "safetensors" in text and not source.allow_pickle:
            remedy = (
                "has no safetensors weights; pickled ones load with model.allow_pickle: true, "
                "if you trust them"
            )
        elif not Path(source.name).exists():
            remedy = (
                f"is no local folder and can't be had from the Hub ({_first_line(error)}); give a "
                f"local folder, check the name, or the network and HF_TOKEN for a gated model"
            )
        else:
            remedy = f"can't be loaded: {_first_line(error)}"
        raise InputError(f"model: {source.name} {remedy}") from error


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).parent.is_dir()


def _neighbours(name: str) -> str:
    parent = Path(name).parent
    return nearest(Path(name).name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
