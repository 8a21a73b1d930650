"""Batch spectral shrinkage on what a model's head is given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, Field
from torch import Tensor, nn

from hfft.errors import InputError
from hfft.layers import find_layer_groups
from hfft.penalties.activations import batch_spectral_shrinkage, pooled, precise, spread
from hfft.penalties.injection import Injection, refuse_replicas
from hfft.penalties.penalty import Batches, Penalty, Setting, register
from hfft.sections import Section


@register("bss")
class BSS(Penalty):
    """The k smallest singular values of a batch's features, squared (Chen et al. 2019).

    The features are the input of the head's first layer: what runs first of the modules that hold
    the head's parameters. That is after the dropout before it, where a model has one. Each of
    several towers has a head, its projection, and R is the sum over them. Of
    sequences and maps, (B, T, D) and (B, D, H, W), an example's row is the mean over places,
    padding included: the paper's rows are examples too, its features pooled.

    R is that of a micro-batch. With gradient accumulation, or on several processes, it is the mean
    over micro-batches, which is not the R of all of them together: their size is a
    hyperparameter, and it should be larger than k. Where fewer than k singular values exist R is
    the squared norm of all features.
    """

    class Options(Section):
        """What stands beside `kind` and `strength`."""

        k: int = Field(1, gt=0, description="how many of the smallest singular values are shrunk")

    modes = ("coupled",)
    by_pattern = False
    below_head = True

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self._heads: list[list[str]] = []

    def check(self, model: nn.Module) -> None:
        """Find the head.

        Raises:
            InputError: the model has none, or nothing below it learns.
        """
        groups = find_layer_groups(model)
        head = groups.head.parameters
        self._heads = _heads(_modules_of(model, head), several=len(groups.towers) > 1)
        if not self._heads:
            raise InputError(
                f"penalty.kind: bss shrinks what a head is given, and {type(model).__name__} has "
                f"no module of its own for the head; use delta, or a penalty on weights"
            )
        if not any(p.requires_grad and n not in head for n, p in model.named_parameters()):
            raise InputError(
                "penalty.kind: bss acts on what is below the head, and nothing there learns; let "
                "more layers learn, or leave the penalty out"
            )

    def prepare(
        self,
        model: nn.Module,
        source: Mapping[str, Tensor],
        covered: Collection[str],
        batches: Batches,
    ) -> None:
        """Find the head of the model that will be trained."""
        self.check(model)

    def attach(self, setting: Setting) -> Shrinkage:
        """Start to shrink."""
        options: Any = self.options
        heads = [[setting.model.get_submodule(path) for path in head] for head in self._heads]
        return Shrinkage(setting, heads, options.k)


class Shrinkage(Injection):
    """Batch spectral shrinkage of what the first module of each of some heads is given.

    Args:
        setting: where.
        heads: the modules of each; the first of them to run is the one, from then on.
        k: how many singular values.
    """

    def __init__(self, setting: Setting, heads: Sequence[Sequence[nn.Module]], k: int) -> None:
        super().__init__(setting, len(heads))
        self._k = k
        self._first: dict[int, nn.Module] = {}
        for head, modules in enumerate(heads):
            before = partial(self._before, head)
            for module in modules:
                self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def _before(
        self, head: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        refuse_replicas(module)
        # chosen for good: within a forward pass "first" would not hold when a checkpoint replays it
        if module is not self._first.setdefault(head, module):
            return None
        for place, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:place], self._shrunk(value, head), *args[place + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, name: self._shrunk(value, head)}
        return None

    def _shrunk(self, features: Tensor, head: int) -> Tensor:
        def rule(features: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = batch_spectral_shrinkage(pooled(precise(features)), self._k)
            return value, spread(gradient, features)

        return self.inject(features, rule, head)


def _heads(paths: Iterable[str], *, several: bool) -> list[list[str]]:
    """Return the modules of each head: of several towers each has one, a projection."""
    heads: dict[str, list[str]] = {}
    for path in paths:
        heads.setdefault(path.partition(".")[0] if several else "", []).append(path)
    return list(heads.values())


def _modules_of(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Name the modules that have parameters of their own, and all of what they hold in the head."""
    inside = set(head)
    return [
        path
        for path, module in model.named_modules()
        if path
        and next(module.parameters(recurse=False), None) is not None
        and all(f"{path}.{name}" in inside for name, _ in module.named_parameters())
    ]
