"""LoRA by peft: low-rank matrices beside frozen weights, and what has become of them.

    W = W0 + s B A,   A of shape (r, in), B of shape (out, r), s = lora_alpha / r

peft puts them into the model in place: its class stays, and a layer's weight `x.weight` becomes
`x.base_layer.weight`. After its stage they are merged into the weights, so that all that follows
(scores, the model folder, a next stage) has a plain model before it.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hfft.complaints import nearest
from hfft.errors import InputError, RunFailedError
from hfft.lora_fields import MERGE

_NAME = "default"  # of the adapter inside the model; peft's and transformers' own choice
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Injected:
    """What an adapter has made of a model.

    Attributes:
        layers: paths of the adapted layers.
        learning: names of the adapter's parameters (and biases, where `bias` says so).
        notes: plain sentences on what the options left open.
    """

    layers: tuple[str, ...]
    learning: frozenset[str]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """One weight and the product beside it; `a` and `b` are the parameters that learn.

    Attributes:
        path: the adapted layer.
        weight: W0, frozen.
        a: shape (r, in); a convolution's is (r, in, ...) and is flattened to (r, rest).
        b: shape (out, r); a convolution's is (out, r, 1, ...).
        scale: s.
        transposed: W is W0 + s (B A)^T: transformers' Conv1D and embeddings. Otherwise s B A has
            the elements of W0 in the same order.
    """

    path: str
    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    transposed: bool

    def product(self) -> torch.Tensor:
        """Return what is added to W0, in its shape."""
        product = self.scale * (self.b.flatten(1) @ self.a.flatten(1))
        return (product.T if self.transposed else product).reshape(self.weight.shape)


def inject(
    model: nn.Module, options: Mapping[str, Any], head: Collection[str], *, seed: int
) -> Injected:
    """Put an adapter into a model, in place; what peft leaves learning is the adapter alone.

    Args:
        model: with real weights, or on the meta device.
        options: a stage's `lora`: fields of peft.LoraConfig, checked by `check_lora`.
        head: names of the head's parameters; its layers are not adapted.
        seed: of the matrices that start at random: the same in every process and resumed run.

    Raises:
        InputError: the options fit no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(**{key: value for key, value in options.items() if key != MERGE})
    layers = _adaptable(model, head)
    kind = _default_targets(config, model, layers)
    config.target_modules = _matching(config, model, layers)
    bare = [p for p in config.target_modules if getattr(layers[p], "bias", None) is None]
    if config.lora_bias and bare:
        raise InputError(f"lora_bias: {bare[0]} has no bias that one could be merged into")
    if config.bias == "all" and any(isinstance(m, _NormBase) for m in model.modules()):
        raise InputError("bias: all would set the statistics of BatchNorm moving; use lora_only")
    notes = [_without_default(kind, config)] if kind else []
    # they have done their work, and would do it again on the names that were found
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # of layers that store their weight the other way round: peft sees that itself
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        try:
            inject_adapter_in_model(config, model, _NAME)
        except (ValueError, TypeError, RuntimeError) as error:
            message = str(error).splitlines()[0]
            key = "init_lora_weights" if "init" in message else "target_modules"
            raise InputError(f"{key}: {message}") from error
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = tuple(path for path, _ in _lora_layers(model))
    return Injected(found, frozenset(learning), notes)


def merge(model: nn.Module) -> None:
    """Add every product to its weight and take the adapter out, in place.

    Raises:
        RunFailedError: a sum holds values that are no numbers.
    """
    for path, layer in list(_lora_layers(model)):
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise RunFailedError(f"lora: {path} can't be merged: {error}") from error
        model.set_submodule(path, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_adapter(
    model: nn.Module, folder: Path, *, base: str, revision: str | None, head: Collection[str]
) -> None:
    """Write what peft.PeftModel.from_pretrained loads: the matrices, the head and the config.

    Args:
        model: with the adapter in it.
        folder: is made.
        base: the source's Hub id, or its folder.
        revision: the source's.
        head: names of the head's parameters, which are kept with the adapter.
    """
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(cast(Any, model).peft_config[_NAME])
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    config.revision = revision
    config.modules_to_save = _whole_modules(model, head) or None
    config.inference_mode = True
    weights = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    every = model.state_dict()
    owners = tuple(f"{path}." for path in config.modules_to_save or ())
    weights |= {n: t for n, t in every.items() if n in head or (owners and n.startswith(owners))}
    folder.mkdir(parents=True)
    save_file(
        {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))


def adapted_weights(model: nn.Module) -> list[AdaptedWeight]:
    """Return the adapted weights of a model that may hold LoRA layers, a PeftModel or not.

    Raises:
        InputError: several adapters are active, or one whose sum is not W0 + s B A (DoRA).
    """
    if "peft" not in sys.modules:
        return []  # what is not imported has made no layer
    found = []
    for path, layer in _lora_layers(model):
        active = [name for name in layer.active_adapters if name in layer.scaling]
        if layer.disable_adapters or not active:
            continue
        if len(active) > 1:
            raise InputError(f"{path}: {len(active)} adapters are active, only one can be")
        base, [name] = layer.get_base_layer(), active
        if not base.weight.is_floating_point():
            raise InputError(f"{path}: its weight is quantized; what is needed is W0 itself")
        if layer.merged or layer.lora_variant.get(name) or not _is_plain(base):
            kind = "a merged adapter" if layer.merged else "DoRA, or a layer of another kind"
            raise InputError(f"{path}: holds {kind}; what is needed is W0 + s B A, unmerged")
        a, b = _matrices(layer, name)
        turned = name in layer.lora_embedding_A or bool(getattr(layer, "fan_in_fan_out", False))
        found.append(AdaptedWeight(path, base.weight, a, b, float(layer.scaling[name]), turned))
    return found


def unmoved(model: nn.Module) -> list[str]:
    """Return the adapted layers that never got a gradient in a stage.

    B starts at zero (unless `init_lora_weights` says otherwise), and stays there only where the
    model uses a layer's weight without calling the layer.
    """
    return [path for path, layer in _lora_layers(model) if not bool(_matrices(layer)[1].any())]


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _matrices(layer: Any, name: str = _NAME) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _adaptable(model: nn.Module, head: Collection[str]) -> dict[str, nn.Module]:
    """Return the layers below the head for which W0 + s B A is the same as what peft computes.

    Left out are weights that several modules share, layers that compute otherwise than their type
    says (a subclass of Conv2d or Embedding; grouped and dilated convolutions, which peft does not
    follow) and those inside torch's MultiheadAttention, which uses their weights uncalled.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    uncalled = tuple(
        f"{path}." for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    return {
        path: module
        for path, module in model.named_modules()
        if _is_plain(module)
        and uses[id(module.weight)] == 1
        and f"{path}.weight" not in head
        and not path.startswith(uncalled)
    }


def _is_plain(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    if type(module) in _CONVOLUTIONS:
        return bool(
            module.groups == 1
            and all(d == 1 for d in module.dilation)  # type: ignore[union-attr]
            and module.padding_mode == "zeros"
        )
    return isinstance(module, nn.Linear | Conv1D) or type(module) is nn.Embedding


def _linear(layers: Mapping[str, nn.Module]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [path for path, layer in layers.items() if isinstance(layer, nn.Linear | Conv1D)]


def _default_targets(config: Any, model: Any, layers: Mapping[str, nn.Module]) -> str:
    """Fill in `target_modules` where it is left out; return of which kind, if not peft's own."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if config.target_modules == "all-linear":
        config.target_modules = _linear(layers)
        if not config.target_modules:
            raise InputError(
                f"target_modules: there is no linear layer below the head of "
                f"{type(model).__name__}; name its convolutions"
            )
    if config.target_modules is not None:
        return ""
    default = DEFAULTS.get(getattr(getattr(model, "config", None), "model_type", ""))
    if isinstance(default, list) and any(_is_named(path, default) for path in layers):
        config.target_modules = default
        return ""
    linear = _linear(layers)
    if config.layers_to_transform is not None:  # which peft heeds in suffixes, not in whole paths
        linear = sorted({path.rpartition(".")[2] for path in linear})
    config.target_modules = linear or [p for p, m in layers.items() if type(m) in _CONVOLUTIONS]
    return "linear layers" if linear else "convolutions"


def _without_default(kind: str, config: Any) -> str:
    chosen = config.exclude_modules is not None or config.layers_to_transform is not None
    return (
        f"lora: peft has no default target_modules for this model; all its {kind} below the head "
        f"{'that the other options leave ' if chosen else ''}are adapted "
        f"({len(config.target_modules)})"
    )


def _is_named(path: str, targets: Collection[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _matching(config: Any, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers that the options name, peft's way: suffixes, or one regular expression.

    Raises:
        InputError: a name that matches no layer, or options that leave none.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    given = config.target_modules
    given = given if isinstance(given, str) else sorted(given)  # peft has made a set of them
    try:
        found = [path for path in layers if check_target_module_exists(config, path)]
    except re.error as error:
        raise InputError(f"target_modules: {given!r} is no regular expression: {error}") from error
    names = {path.rpartition(".")[2] for path in layers}
    names = {name for name in names if not name.isdigit()} | set(layers)
    missing = [] if isinstance(given, str) else [t for t in given if not _any_named(layers, t)]
    if missing or not found:
        name = missing[0] if missing else given if isinstance(given, str) else given[0]
        why = (
            "exclude_modules and layers_to_transform leave none of its layers"
            if not missing and not isinstance(given, str)
            else "matches no layer that can be adapted below the head of "
            f"{type(model).__name__}{nearest(name, names)}"
        )
        raise InputError(f"target_modules: {name!r} {why}")
    return found


def _any_named(layers: Mapping[str, nn.Module], target: str) -> bool:
    return any(_is_named(path, [target]) for path in layers)


def _whole_modules(model: nn.Module, head: Collection[str]) -> list[str]:
    """Return the outermost modules whose parameters are all the head's."""
    found: list[str] = []
    for path, module in model.named_modules():
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        inside = path.startswith(tuple(f"{other}." for other in found))
        if path and names and not inside and all(name in head for name in names):
            found.append(path)
    return found
