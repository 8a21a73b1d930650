"""Penalties on weights: what each adds to the gradients, given a space."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from hfft.errors import InputError
from hfft.penalties.low_rank import LowRank
from hfft.penalties.penalty import Penalty, Setting, register
from hfft.penalties.pull import Bound, Pull
from hfft.penalties.shards import is_sharded
from hfft.penalties.spaces import Dense
from hfft.penalties.weights import ALL, Moments, Value, cosine_of, euclidean_of, l2_sp_of
from hfft.sections import Section


class WeightPenalty(Penalty):
    """A function of theta and theta_s alone.

    A subclass gives `value_and_gradient`, or, to be faster and right on shards and for LoRA, the
    `bind` that puts it on a space.
    """

    def value_and_gradient(
        self, theta: Sequence[Tensor], source: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return R, a scalar, and its gradient with respect to each of `theta`."""
        raise TypeError(f"{type(self).__name__} needs value_and_gradient or bind")

    def bind(self, space: Dense | LowRank) -> Bound:
        """Return the penalty on the weights of a space.

        Raises:
            InputError: the weights are cut into shards, and the kind is not made for them.
        """
        return _OfFunction(self, space)

    def dense(self, setting: Setting, part: int) -> Dense:
        """Return the space of a part's whole weights."""
        chosen = setting.parts[part]
        return Dense(chosen.weights, chosen.sources)

    def attach(self, setting: Setting) -> Pull:
        """Start to penalise; every part has a penalty of its own."""
        bound = []
        for number, part in enumerate(setting.parts):
            if part.weights:
                bound.append((self.bind(self.dense(setting, number)), part.strength))
            if part.products:
                bound.append((self.bind(LowRank(part.products)), part.strength))
        return Pull(bound, setting)


class _OfMoments(Bound):
    """A penalty that depends on the moments alone."""

    def __init__(self, rule: Any, space: Dense | LowRank, *, of: Sequence[str]) -> None:
        self.variables, self._rule, self._space = space.variables, rule, space
        self._times = 2 if isinstance(space, LowRank) else 1  # A and B share a row of moments
        count = len(self.variables) // self._times
        # the gradient of a squared difference needs no sums
        self._fixed = None if of else ([0.0] * count, [1.0] * count)
        self._of = of

    def value(self) -> float:
        return float(self._found(ALL).value)

    def add(self, targets: Sequence[Tensor | None], factors: Sequence[float], step: int) -> None:
        if self._fixed is not None:
            a, b = self._fixed
        else:
            found = self._found(self._of)
            a, b = found.a, found.b
        pairs = [(a[n // self._times], b[n // self._times]) for n in range(len(factors))]
        self._space.add(
            targets,
            [one * factor for (one, _), factor in zip(pairs, factors, strict=True)],
            [one * factor for (_, one), factor in zip(pairs, factors, strict=True)],
        )

    def _found(self, wanted: Sequence[str]) -> Value:
        found: Value = self._rule(self._space.moments(wanted))
        return found


class _OfFunction(Bound):
    """A penalty that somebody gave as a function of whole tensors."""

    def __init__(self, penalty: WeightPenalty, space: Dense | LowRank) -> None:
        if any(is_sharded(weight) for weight in space.variables):
            raise InputError(
                f"penalty.kind: {penalty.kind} is not made for weights that are cut into shards "
                f"(FSDP); use DDP, or another kind"
            )
        self.variables, self._penalty, self._space = space.variables, penalty, space

    def value(self) -> float:
        return float(self._found()[0])

    def add(self, targets: Sequence[Tensor | None], factors: Sequence[float], step: int) -> None:
        _, gradients = self._found()
        changes = self._to_variables(gradients)
        for target, change, factor in zip(targets, changes, factors, strict=True):
            if target is not None:
                target.add_(change.view_as(target), alpha=factor)

    def _found(self) -> tuple[Tensor, list[Tensor]]:
        if isinstance(self._space, LowRank):
            products = self._space.products
            theta = [p.source + p.scale * p.b @ p.a for p in products]
            return self._penalty.value_and_gradient(theta, [p.source for p in products])
        theta = [weight.detach() for weight in self.variables]
        pairs = zip(theta, self._space.source, strict=True)
        return self._penalty.value_and_gradient(
            theta, [torch.zeros_like(t) if s is None else s for t, s in pairs]
        )

    def _to_variables(self, gradients: list[Tensor]) -> list[Tensor]:
        """Apply the chain rule where the weights are products."""
        if not isinstance(self._space, LowRank):
            return gradients
        return [
            change
            for p, g in zip(self._space.products, gradients, strict=True)
            for change in (p.scale * p.b.T @ g, p.scale * g @ p.a.T)
        ]


class _Summed(WeightPenalty):
    """A penalty whose value and gradient follow from the moments."""

    gradient_of: ClassVar[tuple[str, ...]] = ()
    """The moments that the gradient depends on; none: it is the difference itself."""

    @staticmethod
    @abstractmethod
    def rule(m: Moments) -> Value:
        """Return the value and the gradient's two numbers."""

    def bind(self, space: Dense | LowRank) -> Bound:
        return _OfMoments(self.rule, space, of=self.gradient_of)


@register("l2_sp")
class L2SP(_Summed):
    """1/2 sum of squared differences from theta_s (Li, Grandvalet & Davoine 2018)."""

    class Options(Section):
        """What stands beside `kind` and `strength`."""

        head_strength: float = Field(0, ge=0, description="of the plain L2 on the new head")

    rule = staticmethod(l2_sp_of)

    def new_strength(self) -> float:
        """Return the new head's own strength (beta in the paper)."""
        return float(self.options.head_strength)  # type: ignore[attr-defined]


@register("euclidean")
class Euclidean(_Summed):
    """The distance from theta_s, not squared: a pull of the same strength at any distance."""

    gradient_of = ("dd",)
    rule = staticmethod(euclidean_of)


@register("cosine")
class Cosine(_Summed):
    """1 - cos(theta, theta_s), summed over tensors: the direction counts, the length does not."""

    gradient_of = ("td", "tt", "ss")
    rule = staticmethod(cosine_of)


@register("fisher")
class Fisher(_Summed):
    """L2-SP weighted by the diagonal Fisher information (EWC, Kirkpatrick et al. 2017)."""

    class Options(Section):
        """What stands beside `kind` and `strength`."""

        examples: int = Field(256, gt=0, description="examples that the information is taken over")
        labels: str = Field(
            "sampled",
            pattern="^(sampled|given)$",
            description="sampled: from the model's own predictions; given: the data's (empirical)",
        )
        data: str | None = Field(
            None, description="other examples, such as the source's own; default: the run's"
        )

        @model_validator(mode="after")
        def _labels_of_others(self) -> Fisher.Options:
            if self.data is not None and self.labels == "given":
                raise ValueError("labels: given goes with the run's own examples, not with data")
            return self

    for_lora = False
    one_by_one = True
    rule = staticmethod(l2_sp_of)

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self.information: Mapping[str, Tensor] = {}

    @property
    def data(self) -> str | None:
        """Where the examples are, if not the run's own."""
        options: Any = self.options
        path: str | None = options.data
        return path

    def prepare(
        self,
        model: nn.Module,
        source: Mapping[str, Tensor],
        covered: Collection[str],
        batches: Any,
    ) -> None:
        """Measure the information at theta_s."""
        from hfft.penalties.information import diagonal_fisher

        options: Any = self.options
        self.information = diagonal_fisher(
            model,
            source,
            batches,
            names=covered,
            examples=options.examples,
            labels=options.labels,
        )

    def dense(self, setting: Setting, part: int) -> Dense:
        """Return the space of a part's weights, each element with its information."""
        chosen = setting.parts[part]
        information = [self.information[name] for name in chosen.names]
        return Dense(chosen.weights, chosen.sources, information)
