"""What holds a stage's weights to the source, matched with the model before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from hfft.config import Stage
from hfft.errors import InputError
from hfft.hooks.mixout import covered_layers as mixed_layers
from hfft.hooks.stochnorm import covered_layers as normalising_layers
from hfft.layers import LayerGroups
from hfft.penalties.coverage import Coverage, find_coverage, learning_weights
from hfft.penalties.penalty import make_penalty
from hfft.sections import PenaltyConfig


@dataclass(frozen=True)
class PlannedPenalty:
    """A stage's penalty, and the tensors that it covers."""

    config: PenaltyConfig
    coverage: Coverage
    data: Any = None
    """The examples that it measures the source on; None: the run's own."""


@dataclass(frozen=True)
class HeldModel:
    """A model, of names and shapes only, as penalties see it.

    Attributes:
        model: on the meta device.
        groups: its layer groups.
        new: the names of the parameters that the source does not bring.
        read: gives the examples at a path, for penalties that take others than the run's.
    """

    model: nn.Module
    groups: LayerGroups
    new: Collection[str]
    read: Callable[[str], Any]

    def penalties(self, stage: Stage, frozen: Collection[str]) -> list[PlannedPenalty]:
        """Match a stage's penalties with what learns in it.

        Raises:
            InputError: with what is wrong with any of them, mixout and StochNorm included.
        """
        problems: list[str] = []
        found = []
        for place, config in _placed(stage.penalty or ()):
            try:
                coverage = self.coverage(config, frozen)
                found.append(PlannedPenalty(config, coverage, self._data(config)))
            except InputError as error:
                problems += [f"{place}.{message}" for message in error.messages]
        for place in ("mixout", "stochnorm"):
            try:
                self.check(place, getattr(stage, place), frozen)
            except InputError as error:
                problems += error.messages
        if problems:
            raise InputError(problems)
        return found

    def coverage(self, config: PenaltyConfig, frozen: Collection[str]) -> Coverage:
        """Return which tensors a penalty covers.

        Raises:
            InputError: a pattern that matches nothing, or nothing that it covers learns.
        """
        penalty = make_penalty(config)
        with _learning(self.model, frozen):
            learning = learning_weights(self.model)
            found = find_coverage(penalty, config.strength, learning, self.new, lambda: self.groups)
            try:
                penalty.check(self.model)
            except InputError as error:
                own = [message.removeprefix("penalty.") for message in error.messages]
                raise InputError(own) from error
        return found

    def _data(self, config: PenaltyConfig) -> Any:
        path = make_penalty(config).data
        try:
            return None if path is None else self.read(path)
        except InputError as error:
            raise InputError(
                [f"data: {message.removeprefix('--data: ')}" for message in error.messages]
            ) from error

    def check(self, field: str, share: float | None, frozen: Collection[str]) -> None:
        """Check `mixout` or `stochnorm`.

        Raises:
            InputError: it covers nothing that learns.
        """
        if share is None:
            return
        with _learning(self.model, frozen):
            if field == "mixout":
                weights, own = dict(self.model.named_parameters()), learning_weights(self.model)
                source = {name: weights[name] for name in own if name not in self.new}
                mixed_layers(self.model, source, share)
            else:
                normalising_layers(self.model, share)


def where_they_apply(
    stages: Sequence[Stage], models: Sequence[tuple[HeldModel, Collection[str]]]
) -> list[Stage]:
    """Leave out of a strategy's stages what covers nothing that learns in them.

    A strategy's penalty is for all of its stages; in some (a head alone) there is nothing to hold.

    Args:
        stages: the stages, alike in what holds them.
        models: for each its model, and what is frozen.

    Raises:
        InputError: there is nothing to hold in any of them.
    """
    kept = list(stages)
    for place, config in _placed(stages[0].penalty or ()):
        for n in _failing(partial(_cover, config), models, f"{place}."):
            left = tuple(one for one in kept[n].penalty or () if one != config)
            kept[n] = kept[n].model_copy(update={"penalty": left or None})
    for field in ("mixout", "stochnorm"):
        share = getattr(stages[0], field)
        for n in _failing(partial(_check, field, share), models, ""):
            kept[n] = kept[n].model_copy(update={field: None})
    return kept


def _placed(penalties: Sequence[PenaltyConfig]) -> Iterator[tuple[str, PenaltyConfig]]:
    """Name the place of each of a stage's penalties."""
    for number, config in enumerate(penalties):
        yield "penalty" if len(penalties) == 1 else f"penalty.{number}", config


def _cover(config: PenaltyConfig, held: HeldModel, frozen: Collection[str]) -> None:
    held.coverage(config, frozen)


def _check(field: str, share: float | None, held: HeldModel, frozen: Collection[str]) -> None:
    held.check(field, share, frozen)


def _failing(
    check: Callable[[HeldModel, Collection[str]], object],
    models: Sequence[tuple[HeldModel, Collection[str]]],
    place: str,
) -> list[int]:
    """Return the numbers of the stages that a check fails in; raise where it fails in all."""
    failing = []
    for number, (held, frozen) in enumerate(models):
        try:
            check(held, frozen)
        except InputError as error:
            failing.append(number)
            if len(failing) == len(models):
                raise InputError([f"{place}{message}" for message in error.messages]) from error
    return failing


@contextmanager
def _learning(model: nn.Module, frozen: Collection[str]) -> Iterator[None]:
    """Freeze a model for a moment."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
