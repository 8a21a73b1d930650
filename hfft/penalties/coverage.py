"""Which tensors a penalty covers, and how strongly."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from hfft.adapters import AdaptedWeight, adapted_weights
from hfft.errors import InputError
from hfft.layers import LayerGroups
from hfft.penalties.penalty import Penalty

Strength = float | Mapping[str, float]
"""One for all, or name pattern to strength: the first pattern that matches a tensor counts."""

_ADAPTED = ".base_layer.weight"  # where peft keeps a weight that it adapts


@dataclass(frozen=True)
class Coverage:
    """Name to strength: what is drawn to its source value, and what, being new, to 0."""

    to_source: Mapping[str, float]
    to_zero: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.to_source) + len(self.to_zero)


def find_coverage(
    penalty: Penalty,
    strength: Strength,
    learning: Mapping[str, Sequence[int]],
    new: Collection[str],
    groups: Callable[[], LayerGroups],
) -> Coverage:
    """Match a penalty with a model.

    Args:
        penalty: the penalty.
        strength: its strength.
        learning: name to shape of what learns; weights that LoRA adapts under their own names.
        new: the names without a source value.
        groups: gives the model's layer groups; asked only where patterns need them.

    Raises:
        InputError: a pattern matches nothing in the model, the kind takes one strength only, or
            nothing that it covers learns.
    """
    adapted = [name for name in learning if name.endswith(_ADAPTED)]
    if adapted and not penalty.for_lora:
        raise InputError(
            f"kind: {penalty.kind} is a matter of single weights, which LoRA's products are not; "
            f"with lora use l2_sp, euclidean, cosine or orthogonal"
        )
    if penalty.below_head:
        head = set(groups().head.parameters)
        learning = {name: shape for name, shape in learning.items() if name not in head}
    by_name = _by_name(penalty, strength, groups)
    to_source = {
        name: by_name(name)
        for name, shape in learning.items()
        if name not in new and penalty.covers(name, shape)
    }
    to_zero = {name: penalty.new_strength() for name in learning if name in new}
    found = Coverage(
        {name: value for name, value in to_source.items() if value is not None},
        {name: value for name, value in to_zero.items() if value > 0},
    )
    if not found:
        raise InputError(
            f"kind: nothing that {penalty.kind} covers learns here: of what learns, {len(to_zero)} "
            f"tensors are new and have no source value, and {len(learning) - len(to_zero)} are not "
            f"covered; let more layers learn, or leave the penalty out"
        )
    return found


def learning_weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name to shape of what learns, a weight that LoRA adapts under its own name.

    Raises:
        InputError: adapters that are no plain LoRA.
    """
    adapted = adapted_weights(model)
    matrices = tuple(f"{one.path}.lora_" for one in adapted)
    found = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (matrices and name.startswith(matrices))
    }
    return found | {weight_name(one): tuple(one.weight.shape) for one in adapted if learns(one)}


def weight_name(adapted: AdaptedWeight) -> str:
    """Return the name of an adapted weight among its model's parameters."""
    return adapted.path + _ADAPTED


def learns(adapted: AdaptedWeight) -> bool:
    """Whether the matrices of an adapted weight learn."""
    return adapted.a.requires_grad or adapted.b.requires_grad


def new_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that the source did not bring, such as a new head.

    transformers marks what it loads. What it did not load, a whole model or modules beside one
    (sentence-transformers' own), is its own source.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: set[str] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            marks = {p: getattr(p, "_is_hf_initialized", False) for p in module.parameters()}
            if any(marks.values()):
                found |= {names[id(p)] for p, loaded in marks.items() if not loaded}
    # what PEFT copies to save whole has lost its mark; what it was copied from has it
    brought = set(names.values()) - found
    copied = {name for name in found if _origin(name) in brought}
    return frozenset(found - copied)


def source_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return theta_s of a model as it was loaded: parameters, without new ones, and buffers."""
    new = new_parameters(model)
    every = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in every if name not in new}


def _origin(name: str) -> str:
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".original_module.", name)


def _by_name(
    penalty: Penalty, strength: Strength, groups: Callable[[], LayerGroups]
) -> Callable[[str], float | None]:
    if not isinstance(strength, Mapping):
        return lambda name: strength
    if not penalty.by_pattern:
        raise InputError(f"strength: {penalty.kind} takes one number, not patterns")
    found: dict[str, float] = {}
    problems = []
    for pattern, value in strength.items():
        try:
            for name in groups().matching(pattern):
                found.setdefault(name, value)
        except InputError as error:
            problems += [f"strength: {message}" for message in error.messages]
    if problems:
        raise InputError(problems)
    if any(found.values()):  # a strength of 0 among others leaves a tensor out
        found = {name: value for name, value in found.items() if value}
    return found.get
