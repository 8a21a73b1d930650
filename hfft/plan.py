"""Everything that can be known before a weight is loaded: data, labels, groups, stages, steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from hfft.adapters import inject
from hfft.arguments import OF_STAGE, rehearse
from hfft.average_plan import average_notes, check_average
from hfft.batches import TokenBatches
from hfft.config import Baseline, Config, Full, Recipe, Stage
from hfft.contrastive_plan import SIZE, batch_notes, check_contrast, pair_notes, with_batch
from hfft.data import load_split
from hfft.encoding import Examples
from hfft.errors import InputError
from hfft.feature_plan import NO_FEATURES, FeaturePlanner, PlannedFeatures
from hfft.layers import LayerGroups, find_layer_groups
from hfft.optim import learning_rates
from hfft.penalty_plan import HeldModel, PlannedPenalty, where_they_apply
from hfft.plan_checks import check_hub, check_training, hardware_notes
from hfft.processes import join_processes
from hfft.retention import plan_retention
from hfft.strategies import DEFAULT_EPOCHS, expand
from hfft.subject import Subject, read_subjects
from hfft.task import Task

DEFAULT_LEARNING_RATE = 5e-5  # of transformers.TrainingArguments
DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class PlannedStage:
    """A stage, and what it comes to on this model and this data."""

    stage: Stage
    subject: Subject = field(compare=False)  # the data themselves say nothing of a stage
    frozen: frozenset[str]
    penalties: tuple[PlannedPenalty, ...]
    learning_rate: float
    rates: Mapping[str, float]  # each parameter's, by name
    epochs: float
    steps: int
    trainable_parameters: int
    total_parameters: int
    groups: LayerGroups  # with the adapter, where the stage has one
    features: PlannedFeatures = NO_FEATURES


@dataclass(frozen=True)
class Trial:
    """One training from a start to its score: the fine-tune itself, or a baseline."""

    name: str
    stages: tuple[PlannedStage, ...]
    from_scratch: bool = False


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes:
        config: what was asked for.
        subject: what it learns in the end; stages before may learn something else.
        main: the fine-tune.
        baselines: what it is to beat.
        notes: sentences for the user.
        retention: what the source can do, scored before and after; None: nothing is.
    """

    config: Config
    subject: Subject
    main: Trial
    baselines: tuple[Trial, ...]
    notes: list[str] = field(default_factory=list)
    retention: Subject | None = None

    @property
    def task(self) -> Task:
        """The run's task."""
        return self.subject.task

    @property
    def fingerprint(self) -> str:
        """Of the data of all stages, and of what is scored before and after."""
        subjects = [planned.subject for planned in self.main.stages]
        subjects += [self.retention] if self.retention is not None else []
        return "-".join(subject.data.fingerprint for subject in dict.fromkeys(subjects))


def make_plan(config: Config) -> Plan:
    """Check a whole run without loading a weight.

    Raises:
        InputError: with the problems of data and model together.
    """
    subjects = read_subjects(config)
    planner = _Planner(config, subjects)
    main = planner.main()
    baselines = [planner.baseline(baseline, main) for baseline in config.baselines]
    retention: Subject | None = None
    try:
        retention = plan_retention(config, subjects[-1])
    except InputError as error:
        planner.problems += error.messages
    if main.stages:  # else what is wrong with them is said already
        planner.problems += check_average(config, subjects[-1], main.stages)
    if not planner.problems:
        planner.rehearse(main, *baselines)
    if planner.problems:
        raise InputError(dict.fromkeys(planner.problems))
    features = {subject: FeaturePlanner(config, subject) for subject in dict.fromkeys(subjects)}
    main, *baselines = [_with_features(trial, features) for trial in (main, *baselines)]
    stages = [stage for trial in (main, *baselines) for stage in trial.stages]
    return Plan(
        config=config,
        subject=subjects[-1],
        main=main,
        baselines=tuple(baselines),
        notes=[
            *(note for subject in features for note in subject.notes),
            *(retention.notes if retention is not None else ()),
            *dict.fromkeys(planner.notes),
            *(
                advice
                for subject, planner_ in features.items()
                for advice in planner_.advice([one for one in stages if one.subject is subject])
            ),
            *(note for subject in features for note in pair_notes(subject)),
            *(note for one in main.stages for note in batch_notes(one.stage, one.subject)),
            *average_notes(config, main.stages),
            *hardware_notes(config),
        ],
        retention=retention,
    )


def _with_features(trial: Trial, planners: Mapping[Subject, FeaturePlanner]) -> Trial:
    """Plan the features of neighbouring stages together, as long as they learn the same."""
    stages: list[PlannedStage] = []
    for subject, some in groupby(trial.stages, key=lambda stage: stage.subject):
        alike = list(some)
        planned = planners[subject].plan(alike)
        stages += [replace(s, features=f) for s, f in zip(alike, planned, strict=True)]
    return replace(trial, stages=tuple(stages))


class _Planner:
    """Turns stages into planned stages, gathering every problem on the way."""

    def __init__(self, config: Config, subjects: Sequence[Subject]) -> None:
        self.config, self.subjects = config, subjects
        self.subject = subjects[-1]
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._processes = join_processes().num_processes
        self._steps: dict[tuple[Subject, int | None], int] = {}
        self.problems += check_hub(config, self.subject)
        for subject in dict.fromkeys(subjects):
            self.problems += check_training(config, subject)

    def main(self) -> Trial:
        total = self.config.training.get("num_train_epochs")
        if self.config.stages is not None:
            return self._trial("main", self.config.stages, "stages.{}")
        strategy = self.config.strategy or Full(name="full")
        try:
            stages = expand(strategy, self.subject.groups, total)
        except InputError as error:
            self.problems += error.messages
            return Trial("main", ())
        try:
            stages = where_they_apply(
                stages, [self._adapted(stage, self.subject) for stage in stages]
            )
        except InputError as error:
            self.problems += [f"strategy.{message}" for message in error.messages]
            return Trial("main", ())
        return self._trial("main", stages, "strategy")

    def baseline(self, baseline: Baseline, main: Trial) -> Trial:
        """Give a baseline what it leaves out: the whole fine-tune's length, its rates."""
        if not main.stages:  # the fine-tune itself is wrong, and that is said already
            return Trial(baseline.name, ())
        last, scratch = main.stages[-1], baseline.name == "scratch"
        head = 1.0 if scratch else last.stage.head_multiplier or 1.0
        of_stage = {*OF_STAGE, "contrastive"}
        fields = last.stage.model_dump(include=of_stage, exclude_none=True)
        fields |= {"learning_rate": last.learning_rate * head}
        own_length = baseline.epochs is not None or baseline.steps is not None
        if not own_length:
            own = (planned for planned in main.stages if planned.subject is self.subject)
            fields["steps"] = sum(planned.steps for planned in own)
        fields |= baseline.model_dump(include=set(Recipe.model_fields), exclude_none=True)
        fields |= {"name": baseline.name, "freeze": "none" if scratch else "backbone"}
        stage = Stage.model_validate(fields)
        place = f"baselines.{baseline.name}"
        trial = self._trial(baseline.name, [stage], place, capped=own_length)
        return Trial(trial.name, trial.stages, from_scratch=scratch)

    def rehearse(self, *trials: Trial) -> None:
        for planned in (stage for trial in trials for stage in trial.stages):
            try:
                rehearse(self.config, planned)
            except InputError as error:
                self.problems += error.messages

    def _trial(self, name: str, stages: list[Stage], place: str, *, capped: bool = True) -> Trial:
        planned = [
            self._plan(stage, place.format(number), capped, self._subject_of(stage, number))
            for number, stage in enumerate(stages)
        ]
        self.problems += _check_sources(planned, place)
        self.problems += _check_merges(stages, planned, place)
        return Trial(name, tuple(stage for stage in planned if stage is not None))

    def _steps_per_epoch(self, subject: Subject, stage: Stage) -> int:
        """Return the optimizer steps of one pass; 1 where that is a problem."""
        training = with_batch(self.config.training, stage, self._processes)
        key = subject, training.get(SIZE)
        if key not in self._steps:
            try:
                self._steps[key] = steps_per_epoch(
                    subject.examples["train"],
                    training,
                    self._processes,
                    self.config.batch_tokens,
                )
            except InputError as error:
                self.problems += [subject.place + message for message in error.messages]
                self._steps[key] = 1
        return self._steps[key]

    def _subject_of(self, stage: Stage, number: int) -> Subject:
        return self.subject if stage.task is None else self.subjects[number]

    def _plan(
        self, stage: Stage, place: str, capped: bool, subject: Subject
    ) -> PlannedStage | None:
        training = self.config.training
        rate = _first(
            stage.learning_rate, training.get("learning_rate"), default=DEFAULT_LEARNING_RATE
        )
        try:
            held, frozen = self._adapted(stage, subject)
            rates = learning_rates(
                held.groups,
                rate,
                layer_decay=stage.layer_decay,
                head_multiplier=stage.head_multiplier,
                tower_rates=stage.of_towers("learning_rate"),
                tower_decays=stage.of_towers("layer_decay"),
            )
            sizes = {name: p.numel() for name, p in held.model.named_parameters()}
            trainable = sum(size for name, size in sizes.items() if name not in frozen)
            if not trainable:
                raise InputError("freeze: leaves nothing to learn")
            penalties = held.penalties(stage, frozen)
        except InputError as error:
            self.problems += [f"{place}.{message}" for message in error.messages]
            return None
        self.problems += _placed(
            check_contrast(
                training, self.config.batch_tokens, stage, subject, frozen, self._processes
            ),
            place,
        )
        epochs = _first(stage.epochs, training.get("num_train_epochs"), default=DEFAULT_EPOCHS)
        of_epoch = self._steps_per_epoch(subject, stage)
        steps = stage.steps or math.ceil(epochs * of_epoch)
        cap = training.get("max_steps", -1)
        steps = min(steps, cap) if capped and cap > 0 else steps
        return PlannedStage(
            stage=stage,
            subject=subject,
            frozen=frozen,
            penalties=tuple(penalties),
            learning_rate=rate,
            rates=rates,
            epochs=steps / of_epoch,
            steps=steps,
            trainable_parameters=trainable,
            total_parameters=sum(sizes.values()),
            groups=held.groups,
        )

    def _adapted(self, stage: Stage, subject: Subject) -> tuple[HeldModel, frozenset[str]]:
        """Return the model with the stage's adapter put in, and what of it is frozen."""
        held = HeldModel(subject.skeleton, subject.groups, subject.new, _reader(subject))
        learning = frozenset[str]()
        if stage.lora is not None:
            model = copy.deepcopy(held.model)
            try:
                adapter = inject(model, stage.lora, held.groups.head.parameters, seed=0)
            except InputError as error:
                within = "" if self.config.stages is None else "lora."
                raise InputError([f"{within}{message}" for message in error.messages]) from error
            self.notes += [note for note in adapter.notes if note not in self.notes]
            learning = adapter.learning
            held = replace(held, model=model, groups=find_layer_groups(model))
        frozen = held.groups.frozen(stage.freeze, stage.of_towers("freeze")) - learning
        return held, frozen | subject.idle


def _reader(subject: Subject) -> Callable[[str], Examples]:
    """Return what reads further examples, for penalties that measure the source on them."""

    def read(path: str) -> Examples:
        rows = load_split(path, None, subject.task.needs, labels=subject.data.labels)
        return subject.encoder(rows, place=path, training=False)

    return read


def _check_sources(planned: Sequence[PlannedStage | None], place: str) -> list[str]:
    """Check that weights adapted by another task are there where a penalty pulls to them."""
    problems = []
    for number, stage in enumerate(planned):
        if stage is None or all(p.config.source == "original" for p in stage.penalties):
            continue
        before = [one for one in planned[:number] if one is not None]
        if all(one.subject is stage.subject for one in before):
            problems.append(
                f"{place.format(number)}.penalty.source: adapted: no stage before it has another "
                f"task, so there are no adapted weights; use original"
            )
    return problems


def _check_merges(stages: list[Stage], planned: list[PlannedStage | None], place: str) -> list[str]:
    """Check that an adapter kept apart is one of the source, and of the model in the end."""
    problems = []
    source_left = False
    for number, (stage, made) in enumerate(zip(stages, planned, strict=True)):
        if made is None:
            continue
        kept = stage.lora is not None and not stage.lora.get("merge", False)
        if kept and (source_left or number < len(stages) - 1):
            why = (
                "the stages before it change the weights that it adds to"
                if source_left
                else "the stages after it go on from the merged weights"
            )
            problems.append(
                f"{place.format(number)}.lora.merge: the adapter can't be kept apart from the "
                f"weights: {why}; set merge: true"
            )
        body = set(made.groups.distance_to_head()) - set(made.groups.head.parameters)
        source_left = source_left or stage.lora is not None or bool(body - made.frozen)
    return problems


def _placed(problems: Sequence[str], place: str) -> list[str]:
    """Say where the stage is, of problems with its own fields."""
    own = ("contrastive", "penalty")
    return [f"{place}.{one}" if one.startswith(own) else one for one in problems]


def _first(*values: float | None, default: float) -> float:
    return next((value for value in values if value is not None), default)


def steps_per_epoch(
    train: Examples, training: Mapping[str, Any], processes: int, batch_tokens: int | None = None
) -> int:
    """Return the optimizer steps of one pass, as the Trainer counts them.

    Raises:
        InputError: `dataloader_drop_last` leaves no batch, or one example is longer than
            `batch_tokens`.
    """
    if batch_tokens is not None and train.lengths is not None:
        dealt = TokenBatches(train.lengths, batch_tokens, seed=0, processes=processes)
        batches = len(dealt) // processes
    else:
        size = int(training.get("per_device_train_batch_size", DEFAULT_BATCH_SIZE)) * processes
        whole = len(train) // size
        batches = whole if training.get("dataloader_drop_last") else -(-len(train) // size)
        if batches == 0:
            raise InputError(
                f"training.dataloader_drop_last: train has {len(train)} examples, fewer than one "
                f"batch of {size}; lower training.per_device_train_batch_size"
            )
    return max(1, -(-batches // int(training.get("gradient_accumulation_steps", 1))))
