"""What a penalty is, and the register of kinds.

A kind is a subclass of `Penalty` under `@register("name")`; packages of third parties name their
module under the entry-point group `hfft.penalties`. Most need one method only: see
`hfft.penalties.kinds.WeightPenalty`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from hfft.complaints import explain, nearest
from hfft.errors import InputError
from hfft.penalties.low_rank import Product
from hfft.sections import PenaltyConfig, Section

Mode = Literal["coupled", "decoupled"]
Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class LabelledBatches:
    """Batches with a loss of their own, for which labels are aligned with the logits.

    Attributes:
        batches: keyword arguments of the model's forward, and `labels`, which it is not given.
        loss: of the model's outputs and the labels.
    """

    batches: Batches
    loss: Callable[[Any, Tensor], Tensor]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.batches)


@dataclass(frozen=True)
class Part:
    """What one strength holds for.

    Attributes:
        strength: lambda.
        names: the parameters, by name.
        weights: the parameters, in the same order.
        sources: their source values; None where there are none (a new head), which counts as 0.
        products: weights that LoRA adapts; they are not among the above.
    """

    strength: float
    names: tuple[str, ...] = ()
    weights: tuple[Tensor, ...] = ()
    sources: tuple[Tensor | None, ...] = ()
    products: tuple[Product, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One training, as a penalty is attached to it.

    Attributes:
        model: the model, unwrapped.
        optimizer: torch's own, unwrapped.
        parts: what is penalised, by strength.
        mode: `coupled` adds the gradient to the loss's; `decoupled` moves the weights themselves,
            as AdamW does with weight decay.
        factor: the strength now over the strength that was asked for.
        step: the optimizer steps done.
        loss_scale: what the loss of one micro-batch is multiplied by before its backward pass.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parts: Sequence[Part]
    mode: Mode = "coupled"
    factor: Callable[[], float] = field(default=lambda: 1.0)
    step: Callable[[], int] = field(default=lambda: 0)
    loss_scale: Callable[[], float] = field(default=lambda: 1.0)


class Attachment(ABC):
    """A penalty at work."""

    @abstractmethod
    def value(self) -> tuple[float, float]:
        """Return R over all it covers, and the sum of strength times R, at the weights as they are.

        On several processes every one must ask: sums over shards are taken then.
        """

    @abstractmethod
    def remove(self) -> None:
        """Take every hook away."""


class Penalty(ABC):
    """R(theta, theta_s), with its options.

    Args:
        options: an instance of `Options`.
    """

    kind: ClassVar[str]
    """Its name in configs; set by `register`."""
    Options: ClassVar[type[BaseModel]] = Section
    """The keys that stand beside `kind` and `strength`."""
    modes: ClassVar[tuple[Mode, ...]] = ("coupled", "decoupled")
    for_lora: ClassVar[bool] = True
    """Whether it can hold a weight that LoRA adapts by what it learns."""
    below_head: ClassVar[bool] = False
    """Whether it acts on activations, and so on what learns below the head alone."""
    by_pattern: ClassVar[bool] = True
    """Whether the strength may vary by layer."""
    reads_inputs: ClassVar[bool] = False
    """Whether it needs the model's own inputs in every step, which stored features stand for."""
    one_by_one: ClassVar[bool] = False
    """Whether it measures the loss of single examples, which a pair without others has none of."""

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    @property
    def data(self) -> str | None:
        """Where the examples are that it measures the source on; None: the run's own."""
        return None

    def covers(self, name: str, shape: Sequence[int]) -> bool:
        """Whether it has a value for a parameter of this name and shape."""
        return True

    def new_strength(self) -> float:
        """Return the strength of the plain L2 on parameters without a source value."""
        return 0.0

    def check(self, model: nn.Module) -> None:  # noqa: B027 (most fit any model)
        """Check what can be known of a model without its weights.

        Args:
            model: frozen as it will be; perhaps on the meta device.

        Raises:
            InputError: the penalty does not fit it.
        """

    def prepare(  # noqa: B027 (most have nothing to measure)
        self,
        model: nn.Module,
        source: Mapping[str, Tensor],
        covered: Collection[str],
        batches: Batches,
    ) -> None:
        """Measure what is needed of the source, before training.

        Args:
            model: the model, at the start of training.
            source: theta_s by name, parameters and buffers; what is not there is as in the model.
            covered: the names of the parameters that are penalised.
            batches: examples as the model's forward takes them, with labels; may be empty.

        Raises:
            InputError: it needs examples, and there are none.
        """

    @abstractmethod
    def attach(self, setting: Setting) -> Attachment:
        """Start to penalise."""


_kinds: dict[str, type[Penalty]] = {}
P = TypeVar("P", bound=Penalty)


def register(kind: str) -> Callable[[type[P]], type[P]]:
    """Make a class the penalty of that kind.

    Raises:
        ValueError: the kind is taken, or is no name.
    """

    def add(penalty: type[P]) -> type[P]:
        if not kind.isidentifier():
            raise ValueError(f"{kind!r} is no name for a penalty: use letters, digits and _")
        if kind in _kinds and _place(_kinds[kind]) != _place(penalty):
            raise ValueError(f"there is a penalty {kind!r} already: {_kinds[kind].__module__}")
        penalty.kind = kind
        _kinds[kind] = penalty
        return penalty

    return add


def _place(penalty: type[Penalty]) -> tuple[str, str]:
    """Name a class; one of the same place is itself, its module having been run again."""
    return penalty.__module__, penalty.__qualname__


def kinds() -> list[str]:
    """Return the names of all penalties, those of other packages among them."""
    _load_plugins()
    return sorted(_kinds)


def get(kind: str) -> type[Penalty]:
    """Return a penalty's class.

    Raises:
        InputError: there is none of that kind.
    """
    if kind not in _kinds:
        _load_plugins()
    if kind not in _kinds:
        raise InputError(f"kind: there is no penalty {kind!r}{nearest(kind, sorted(_kinds))}")
    return _kinds[kind]


def _load_plugins() -> None:
    for entry in entry_points(group="hfft.penalties"):
        try:
            entry.load()
        except Exception as error:  # whatever another package's import raises
            raise InputError(
                f"penalty: the package {entry.dist.name if entry.dist else entry.value} offers "
                f"{entry.name!r}, which can't be loaded: {error}"
            ) from error


def make_penalty(config: PenaltyConfig) -> Penalty:
    """Return the penalty that a config names, with its options.

    Raises:
        InputError: an unknown kind or option, a wrong value, or a mode that the kind has not.
    """
    penalty = get(config.kind)
    given = config.model_extra or {}
    known = {*penalty.Options.model_fields, *PenaltyConfig.model_fields}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise InputError([f"{key}: unknown key{nearest(key, known)}" for key in unknown])
    try:
        options = penalty.Options.model_validate(given)
    except ValidationError as error:
        raise InputError(explain(error, penalty.Options, ())) from error
    if config.mode not in penalty.modes:
        raise InputError(f"mode: {config.kind} has no {config.mode} form")
    return penalty(options)
