"""Which stages store the output of their frozen layers: where it is right, fits, and pays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from hfft.adapters import inject
from hfft.config import Config
from hfft.examples import ExampleDataset, Parts, parts_of, unlike
from hfft.features.boundaries import highest_cut_of_towers
from hfft.features.choice import Candidate, choose, describe, fitting, seconds_of, servers
from hfft.features.cut import MASK, Cut, NoCutError, frozen_for_now, model_inputs, trimmed
from hfft.features.hollow import hollow_model
from hfft.features.room import cache_root, default_limit
from hfft.features.stored import parts_below
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import LayerGroups, TowerFreeze, find_layer_groups
from hfft.penalties.penalty import get as get_penalty
from hfft.processes import join_processes
from hfft.subject import Subject

if TYPE_CHECKING:
    from hfft.plan import PlannedStage

_SAMPLE = 64  # examples whose length is looked at


@dataclass(frozen=True)
class PlannedFeatures:
    """What a stage stores of its frozen layers' output.

    Attributes:
        reason: what is done and why, in one line.
        splits: the data it is stored of; none: nothing is.
        frozen: names of the parameters below the cut.
        bytes: the size on disk.
    """

    reason: str
    splits: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()
    bytes: int = 0


_NEEDS_ALL = {
    "torch_compile": "compiles the whole model",
    "torch_compile_backend": "compiles the whole model",
    "torch_compile_mode": "compiles the whole model",
    "debug": "watches for the NaN that stands for what is not computed",
    "bf16_full_eval": "evaluates in another precision",
    "fp16_full_eval": "evaluates in another precision",
    "include_for_metrics": "hands the inputs on",
}
"""Fields of TrainingArguments under which a model has to be whole."""

NO_FEATURES = PlannedFeatures("computed in every epoch: nothing is frozen")


@dataclass(frozen=True)
class Probed:
    """A cut that was found, what is frozen below it, why it is not higher, and its FLOPs."""

    cut: Cut
    frozen: frozenset[str]
    lower: str
    flops: float


class Prober:
    """Cuts a model of no weights, and measures what a cut takes and saves.

    Args:
        model: hollow, with the adapter, where the stage has one.
        batch: two examples of the run's data.
        length: the mean number of tokens of an example; 0: it has none.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor], length: float) -> None:
        self.model, self.batch, self.length = model, trimmed(batch), length
        self._cuts: dict[frozenset[str], Probed | str] = {}

    def cut(self, frozen: frozenset[str], groups: LayerGroups) -> Probed:
        """Return the highest cut.

        Raises:
            NoCutError: there is none.
        """
        if frozen not in self._cuts:
            try:
                self._cuts[frozen] = self._cut(frozen, groups)
            except NoCutError as error:
                self._cuts[frozen] = str(error)
        found = self._cuts[frozen]
        if isinstance(found, str):
            raise NoCutError(found)
        return found

    def bytes(self, cut: Cut, itemsize: int | None) -> float:
        """Return the bytes that a cut stores of an example."""
        return sum(
            math.prod(slot.shape)
            * (itemsize if itemsize and slot.dtype.is_floating_point else slot.dtype.itemsize)
            * (self.length if slot.varies else 1)
            for slot in cut.slots
        )

    def _cut(self, frozen: frozenset[str], groups: LayerGroups) -> Probed:
        with frozen_for_now(self.model, frozen), kept_in_eval(self.model):
            towers = _boundaries(frozen, groups)
            cut, names, why = highest_cut_of_towers(self.model, self.batch, frozen, towers)
        flops = cut.flops
        if MASK in self.batch and self.length:
            flops *= self.length / self.batch[MASK].shape[1]
        return Probed(cut, names, why, flops)


def _boundaries(frozen: frozenset[str], groups: LayerGroups) -> list[list[frozenset[str]]]:
    """Return what of each tower is frozen: in all its groups, in all but the highest, and so on."""
    found = []
    for tower, body in groups.towers.items():
        depths: Sequence[TowerFreeze] = range(len(body), 0, -1) if groups.ordered else ["backbone"]
        lower = [frozen & groups.frozen("none", {tower: depth}) for depth in depths]
        found.append(list(dict.fromkeys(names for names in lower if names)))
    return found


def mean_length(examples: ExampleDataset) -> float:
    """Return how many tokens an example has, over a sample; 0 for what is no text."""
    names = parts_of(examples.transform)
    texts = {name for name in names if "input_ids" in examples.only({name}).version(0, 0)}
    if not texts:
        return 0.0
    own = examples.only(texts)  # images needn't be opened
    sample = range(0, len(own), max(1, len(own) // _SAMPLE))
    return sum(len(own.version(index, 0)["input_ids"]) for index in sample) / len(sample)


class FeaturePlanner:
    """Plans the feature cache of a run's stages.

    Args:
        config: the run's.
        subject: what its stages learn.
    """

    def __init__(self, config: Config, subject: Subject) -> None:
        self.config, self.subject, self.task = config, subject, subject.task
        self.settings = config.feature_cache
        self.sizes = {name: len(examples) for name, examples in subject.examples.items()}
        train = subject.examples["train"]
        self.examples = ExampleDataset(train.rows, subject.transforms["evaluation"])
        self._probers: dict[str, Prober] = {}

    @cached_property
    def limit(self) -> int:
        """How many bytes may be stored, as the main process sees it."""
        limit = [self.settings.limit]
        if limit[0] is None:
            with suppress(OSError, RuntimeError):  # a folder, or a home, that can't be entered
                limit = [default_limit(cache_root())]
            if join_processes().num_processes > 1:
                broadcast_object_list(limit)
        return limit[0] or 0

    def plan(self, stages: Sequence[PlannedStage]) -> list[PlannedFeatures]:
        """Say of each stage of a trial what it stores; the last is scored on all splits."""
        found: dict[int, Candidate] = {}
        plans: dict[int, PlannedFeatures] = {}
        for number, stage in enumerate(stages):
            # with an adapter, what is scored is the merged model
            last = number == len(stages) - 1 and stage.stage.lora is None
            try:
                found[number] = self._candidate(stage, last=last)
            except NoCutError as error:
                plans[number] = PlannedFeatures(f"computed in every epoch: {error}")
        nested = [stage.frozen for stage in stages]
        worth = set(found) if self.settings.mode == "on" else choose(found, nested)
        chosen = fitting(found, nested, worth, self.limit) if worth else worth
        made_by = servers(found, nested, chosen)
        for number, one in found.items():
            if number in chosen:
                server = made_by[number]
                name = None if server == number else stages[server].stage.name
                plans[number] = _stored(one, name)
            else:
                plans[number] = self._not_stored(one, fits=number not in worth)
        return [plans[number] for number in range(len(stages))]

    def _candidate(self, stage: PlannedStage, *, last: bool) -> Candidate:
        """Return what a stage could store.

        Raises:
            NoCutError: nothing, and why.
        """
        self._check(stage)
        prober = self._prober(stage)
        found = prober.cut(stage.frozen, stage.groups)
        counts = self._visits(stage, found.cut, last=last)
        repeated = max(found.cut.calls[slot.call.module] for slot in found.cut.slots) > 1
        if repeated and self.config.training.get("gradient_checkpointing"):
            raise NoCutError("under gradient_checkpointing a layer is called several times")
        dtype = self.settings.dtype
        itemsize = None if dtype is None else getattr(torch, dtype).itemsize
        return Candidate(
            cut=found.cut,
            frozen=found.frozen,
            lower=found.lower,
            splits=tuple(counts),
            visits=sum(visits for visits, _ in counts.values()),
            examples=sum(examples for _, examples in counts.values()),
            seconds=seconds_of(found.flops, prober.batch, found.cut),
            bytes=prober.bytes(found.cut, itemsize),
        )

    def _check(self, stage: PlannedStage) -> None:
        """Raise NoCutError where a stage can't store features whatever its model."""
        if self.settings.mode == "off":
            raise NoCutError("feature_cache is off")
        if not stage.frozen:
            raise NoCutError("nothing is frozen")
        for name, why in _NEEDS_ALL.items():
            if self.config.training.get(name):
                raise NoCutError(f"training.{name} {why}")
        for penalty in stage.penalties:
            if get_penalty(penalty.config.kind).reads_inputs:
                raise NoCutError(f"the penalty {penalty.config.kind} needs the model's inputs")

    def _visits(self, stage: PlannedStage, cut: Cut, *, last: bool) -> dict[str, tuple[float, int]]:
        """Return of each split that can be stored: how many examples run, and how many differ."""
        counts = {}
        parts = self._parts_below(cut)
        train, held_out = self.sizes["train"], self.sizes.get("validation")
        if self.task.generates:  # with the whole model, token by token
            held_out, last = None, False
        if not self._augments(parts):
            counts["train"] = (train * stage.epochs, self._distinct("train", parts))
        elif self.settings.views is not None:
            counts["train"] = (train * stage.epochs, train * self.settings.views)
        if held_out is not None:
            evaluations = max(1, round(stage.epochs)) + last
            counts["validation"] = (held_out * evaluations, self._distinct("validation", parts))
        if last and "test" in self.sizes:
            counts["test"] = (self.sizes["test"], self._distinct("test", parts))
        return counts

    def _distinct(self, split: str, parts: frozenset[str]) -> int:
        """Return how many examples differ in some parts: of an image's captions it makes one."""
        rows = self.subject.examples[split].rows
        return len(ExampleDataset(rows, self.examples.transform).only(parts))

    def _parts_below(self, cut: Cut) -> frozenset[str]:
        """Return the parts of an example that needn't be made once it is stored."""
        names = parts_of(self.examples.transform)
        return parts_below(cut, {n: self.examples.only({n}).version(0, 0) for n in names})

    def _augments(self, parts: frozenset[str]) -> bool:
        """Whether some parts of a training example are random."""
        transform = self.subject.transforms["train"]
        if not isinstance(transform, Parts):
            return self.task.augments
        return not transform.random.isdisjoint(parts)

    def _prober(self, stage: PlannedStage) -> Prober:
        adapter = stage.stage.lora
        key = repr(adapter)
        if key not in self._probers:
            trust = self.config.model.trust_remote_code
            model = hollow_model(self.task.auto_model, self.subject.model_config, trust)
            if adapter is not None:
                inject(model, adapter, find_layer_groups(model).head.parameters, seed=0)
            batch = model_inputs(self.subject.collate(unlike(self.examples)))
            self._probers[key] = Prober(model, batch, mean_length(self.examples))
        return self._probers[key]

    @property
    def _limit_is(self) -> str:
        return (
            f"half of the free disk at {cache_root()}"
            if self.settings.limit is None
            else "feature_cache.limit"
        )

    def _not_stored(self, one: Candidate, *, fits: bool) -> PlannedFeatures:
        each = f"{describe(one.bytes)} an example"
        if not fits:
            return PlannedFeatures(
                f"computed in every epoch: {describe(one.size)} ({each}) do not fit into "
                f"{describe(self.limit)} ({self._limit_is})"
            )
        if one.visits <= one.examples:
            return PlannedFeatures(
                f"computed in every epoch: {one.passes:.3g} passes are all there are"
            )
        return PlannedFeatures(
            f"computed in every epoch: to store {each} costs more than {one.passes:.3g} passes"
        )

    def advice(self, stages: Sequence[PlannedStage]) -> list[str]:
        """Say what to set where random changes of the training data stand in the way."""
        if not self.task.augments or self.settings.views is not None or self.settings.mode == "off":
            return []
        computed = [stage for stage in stages if stage.frozen and self._is_blocked(stage)]
        epochs = max((stage.epochs for stage in computed), default=0.0)
        if epochs < 3:
            return []
        views = max(2, min(4, int(epochs) // 2))
        return [
            f"training examples are augmented at random, so every epoch runs the frozen layers on "
            f"them: feature_cache.views={views} makes that {views} passes instead of {epochs:.3g}, "
            f"training without augmentation one"
        ]

    def _is_blocked(self, stage: PlannedStage) -> bool:
        """Whether a stage's frozen layers read what is random in training."""
        try:
            cut = self._prober(stage).cut(stage.frozen, stage.groups).cut
        except NoCutError:
            return True
        return self._augments(self._parts_below(cut))


def _stored(one: Candidate, server: str | None) -> PlannedFeatures:
    where = f"stored {one.cut.place}" + (f" (no higher: {one.lower})" if one.lower else "")
    size = f"{describe(one.bytes)} an example, {describe(one.size)} in all"
    if server is not None:
        done = f"made in the pass of stage {server}"
    else:
        done = f"one pass instead of {one.passes:.3g}" if one.passes > 1 else "one pass"
    of = ", ".join(one.splits)
    return PlannedFeatures(f"{where}, {of}: {size}; {done}", one.splits, one.frozen, one.size)
