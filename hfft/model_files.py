"""The files of a pretrained model: what they hold, and everything that can be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hfft.complaints import nearest
from hfft.errors import InputError
from hfft.sections import ModelConfig

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(source: ModelConfig) -> PretrainedConfig:
    """Read a pretrained model's config without its weights.

    Raises:
        InputError: the folder is no model, its weights are pickled, its code is remote, or the
            Hub can't be reached.
    """
    if Path(source.name).exists():
        _check_folder(source)
    elif _looks_like_path(source.name):
        raise InputError(
            f"{source.place}: there is no folder {source.name}{_neighbours(source.name)}"
        )
    config: PretrainedConfig = explained(
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


def explained(source: ModelConfig, load: Callable[[], Any]) -> Any:
    """Call `load`; turn what the libraries raise into one message that names the remedy."""
    try:
        return load()
    except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError) as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            remedy = "needs Python code from its own repository, which " + (
                "is off unless you set model.trust_remote_code: true"
                if source.place == "model"
                else "a tower can't take along; take a model that transformers has"
            )
        elif "safetensors" in text and not source.allow_pickle:
            remedy = (
                f"has no safetensors weights; pickled ones load with {source.place}.allow_pickle: "
                f"true, if you trust them"
            )
        elif not Path(source.name).exists():
            remedy = (
                f"is no local folder and can't be had from the Hub ({first_line(error)}); give a "
                f"local folder, check the name, or the network and HF_TOKEN for a gated model"
            )
        else:
            remedy = f"can't be loaded: {first_line(error)}"
        raise InputError(f"{source.place}: {source.name} {remedy}") from error


def pretrained(
    auto_model: Any, source: ModelConfig, config: PretrainedConfig, **options: Any
) -> Any:
    """Load a pretrained model in float32; return it and what transformers says of its weights.

    Args:
        auto_model: the Auto class of transformers.
        source: where it is.
        config: what is to be loaded.
        options: of the model's own class.

    Raises:
        InputError: the weights can't be read.
    """
    return explained(
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
            **options,
        ),
    )


def stored_shapes(source: ModelConfig) -> dict[str, list[int]]:
    """Return the shapes of a local model's weights; of a Hub id's none."""
    files = sorted(Path(source.name).glob("model*.safetensors"))
    found: dict[str, list[int]] = explained(
        source, lambda: {n: s for path in files for n, s in _shapes(path).items()}
    )
    return found


def stored_shape(
    name: str, stored: Mapping[str, list[int]], model: PreTrainedModel
) -> list[int] | None:
    """Return the shape that a parameter has in the source, under any of its names there."""
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    inside = f"{model.base_model_prefix}.{name}"  # of a base model, stored with a head
    names = (name, bare, inside, name.removeprefix("timm_model."))
    return next((stored[n] for n in names if n in stored), None)


def misfits(
    source: ModelConfig, model: PreTrainedModel, head: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return name to stored and wanted shape, where a local source's weights don't fit the model.

    Weights whose name transformers changes on loading are left to it.

    Args:
        source: whose weights.
        model: that they are for.
        head: names of parameters that need not fit.
    """
    stored = stored_shapes(source)
    found = {}
    for name, parameter in model.named_parameters():
        shape = stored_shape(name, stored, model) or parameter.shape
        # a shape with as many elements may be one that transformers turns round on loading
        if name not in head and math.prod(shape) != parameter.numel():
            found[name] = (shape, parameter.shape)
    return found


def refuse(source: ModelConfig, found: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise InputError where weights don't fit: name to the stored and the wanted shape."""
    if found:
        name, (stored, wanted) = next(iter(found.items()))
        raise InputError(
            f"{source.place}: {source.name}: {len(found)} weights below the head have other sizes "
            f"than the model asked for, first {name}: {tuple(stored)} stored, {tuple(wanted)} "
            f"wanted; was the image size or another part of the architecture changed?"
        )


def lacking(source: ModelConfig, model: PreTrainedModel, body: Collection[str]) -> frozenset[str]:
    """Return which parameters of the body a local source lacks.

    None where that can't be known: of a Hub id, and where most names are changed on loading.
    """
    if not Path(source.name).exists():
        return frozenset()
    stored = stored_shapes(source)
    found = {name for name in body if stored_shape(name, stored, model) is None}
    return frozenset(found) if len(found) * 10 <= len(body) else frozenset()


def told_missing(
    source: ModelConfig, model: PreTrainedModel, body: Collection[str], missing: Iterable[str]
) -> list[str]:
    """Return sentences on weights below the head that the source has not brought.

    Args:
        source: whose weights.
        model: that has them now.
        body: names of the parameters below the head.
        missing: names of the weights.

    Raises:
        InputError: they are more than half of the body.
    """
    missing = sorted(missing)
    if len(left := set(body).intersection(missing)) > len(body) / 2:
        raise InputError(
            f"{source.place}: {source.name} is no source for a {type(model).__name__}: it lacks "
            f"{len(left)} of the {len(body)} weights below the head, first {missing[0]}; is its "
            f"config.json that of another model?"
        )
    if not missing:
        return []
    return [
        f"{len(missing)} weights below the head are not in the source and start afresh: "
        f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
    ]


def first_line(error: BaseException) -> str:
    """Return what an error says first, for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_folder(source: ModelConfig) -> None:
    folder, place = Path(source.name), source.place
    if not folder.is_dir():
        raise InputError(f"{place}: {folder} is a file; give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        inner = folder / "model" / "config.json"
        hint = f"; did you mean {inner.parent}?" if inner.is_file() else ""
        raise InputError(f"{place}: {folder} is no model folder: it has no config.json{hint}")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{place}: {folder} holds an adapter beside its weights; merge it into them first "
            f"(peft's merge_and_unload), or remove adapter_config.json to start without it"
        )
    weights = list(folder.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(path, "pt"):  # reads the header, and compares the file's size with it
                pass
        except SafetensorError as error:
            raise InputError(f"{place}: {path} can't be loaded: {error}; copy it anew") from error
    if weights or source.allow_pickle:
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{place}: {folder} holds pickled weights only ({pickled[0]}), and loading them can "
            f"run code; convert them to safetensors, or set {place}.allow_pickle: true if you "
            f"trust them"
        )
    raise InputError(f"{place}: {folder} holds no weights (*.safetensors)")


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).parent.is_dir()


def _neighbours(name: str) -> str:
    parent = Path(name).parent
    return nearest(Path(name).name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
