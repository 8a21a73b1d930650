"""Everything that can be known before a weight is loaded: data, labels, groups, stages, steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from hfft import registry
from hfft.adapters import inject
from hfft.arguments import OF_STAGE, rehearse
from hfft.complaints import nearest
from hfft.config import Baseline, Config, Full, Recipe, Stage
from hfft.data import LoadedData, load_data, load_split
from hfft.errors import InputError
from hfft.feature_plan import NO_FEATURES, FeaturePlanner, PlannedFeatures
from hfft.layers import LayerGroups, find_layer_groups
from hfft.optim import learning_rates
from hfft.penalty_plan import HeldModel, PlannedPenalty, where_they_apply
from hfft.processes import has_accelerator, join_processes
from hfft.source import check_shapes, head_is_new, read_model_config, skeleton
from hfft.strategies import DEFAULT_EPOCHS, expand
from hfft.task import Task, Transform

DEFAULT_LEARNING_RATE = 5e-5  # of transformers.TrainingArguments
DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class PlannedStage:
    """A stage, and what it comes to on this model and this data."""

    stage: Stage
    frozen: frozenset[str]
    penalties: tuple[PlannedPenalty, ...]
    learning_rate: float
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
    """A checked run."""

    config: Config
    task: Task
    data: LoadedData
    model_config: PretrainedConfig
    processor: Any
    transforms: Mapping[str, Transform]  # of `train`, perhaps random, and of `evaluation`
    groups: LayerGroups
    sizes: Mapping[str, int]
    main: Trial
    baselines: tuple[Trial, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """The class names; empty for a task without."""
        return self.data.labels or []


def make_task(config: Config) -> Task:
    """Return the config's task with its options."""
    task = registry.get(config.task.name)
    return task(task.Options.model_validate(config.task.model_extra or {}))


def make_plan(config: Config) -> Plan:
    """Check a whole run without loading a weight.

    Raises:
        InputError: with the problems of data and model together.
    """
    task = make_task(config)
    problems: list[str] = []
    data = model_config = None
    processes = join_processes()
    try:
        with processes.main_process_first():
            data = load_data(config.data, task.columns, seed=config.seed)
    except InputError as error:
        problems += error.messages
    try:
        model_config = read_model_config(config.model)
    except InputError as error:
        problems += error.messages
    if data is None or model_config is None or problems:
        raise InputError(problems)
    task.configure(model_config, data.labels or [])
    model = skeleton(task.auto_model, model_config, config.model.trust_remote_code)
    check_shapes(config.model, model)
    groups = find_layer_groups(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    new = groups.head.parameters if head_is_new(config.model, model, groups.head.parameters) else ()
    read = partial(load_split, split=None, columns=task.columns, labels=None)
    held = HeldModel(model, groups, frozenset(new), read)
    planner = _Planner(config, held, len(data.splits["train"]))
    main = planner.main()
    baselines = [planner.baseline(baseline, main) for baseline in config.baselines]
    planner.problems += _check_best(config, task)
    if not planner.problems:
        planner.rehearse(main, *baselines)
    if planner.problems:
        raise InputError(dict.fromkeys(planner.problems))
    processor = task.load_processor(config.model, model_config)
    transforms = {  # some options are checked by what they make only
        name: task.transform(processor, training=name == "train")
        for name in ("train", "evaluation")
    }
    features = FeaturePlanner(config, task, data, transforms["evaluation"], model_config)
    main, *baselines = [_with_features(trial, features) for trial in (main, *baselines)]
    return Plan(
        config=config,
        task=task,
        data=data,
        model_config=model_config,
        processor=processor,
        transforms=transforms,
        groups=groups,
        sizes=sizes,
        main=main,
        baselines=tuple(baselines),
        notes=[
            *data.notes,
            *dict.fromkeys(planner.notes),
            *features.advice([stage for trial in (main, *baselines) for stage in trial.stages]),
            *_hardware_notes(config),
        ],
    )


def _with_features(trial: Trial, planner: FeaturePlanner) -> Trial:
    planned = zip(trial.stages, planner.plan(trial.stages), strict=True)
    stages = tuple(replace(stage, features=features) for stage, features in planned)
    return replace(trial, stages=stages)


def _check_best(config: Config, task: Task) -> list[str]:
    """Check the metric by which the best checkpoint is kept, which the Trainer looks up late."""
    name = config.training.get("metric_for_best_model")
    names = ("loss", *task.metric_names)
    if name is None or str(name).removeprefix("eval_") in names:
        return []
    return [f"training.metric_for_best_model: there is no {name!r}{nearest(str(name), names)}"]


class _Planner:
    """Turns stages into planned stages, gathering every problem on the way."""

    def __init__(self, config: Config, held: HeldModel, examples: int) -> None:
        self.config, self.held, self.groups = config, held, held.groups
        self.steps_per_epoch = steps_per_epoch(
            examples, config.training, join_processes().num_processes
        )
        self.problems: list[str] = []
        self.notes: list[str] = []

    def main(self) -> Trial:
        total = self.config.training.get("num_train_epochs")
        if self.config.stages is not None:
            return self._trial("main", self.config.stages, "stages.{}")
        strategy = self.config.strategy or Full(name="full")
        try:
            stages = expand(strategy, self.groups, total)
        except InputError as error:
            self.problems += error.messages
            return Trial("main", ())
        try:
            stages = where_they_apply(stages, [self._adapted(stage) for stage in stages])
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
        fields = last.stage.model_dump(include=set(OF_STAGE), exclude_none=True)
        fields |= {"learning_rate": last.learning_rate * head}
        own_length = baseline.epochs is not None or baseline.steps is not None
        if not own_length:
            fields["steps"] = sum(planned.steps for planned in main.stages)
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
        planned = [self._plan(stage, place.format(i), capped) for i, stage in enumerate(stages)]
        self.problems += _check_merges(stages, planned, place)
        return Trial(name, tuple(stage for stage in planned if stage is not None))

    def _plan(self, stage: Stage, place: str, capped: bool) -> PlannedStage | None:
        training = self.config.training
        rate = _first(
            stage.learning_rate, training.get("learning_rate"), default=DEFAULT_LEARNING_RATE
        )
        try:
            held, frozen = self._adapted(stage)
            learning_rates(
                held.groups,
                rate,
                layer_decay=stage.layer_decay,
                head_multiplier=stage.head_multiplier,
            )
            sizes = {name: p.numel() for name, p in held.model.named_parameters()}
            trainable = sum(size for name, size in sizes.items() if name not in frozen)
            if not trainable:
                raise InputError("freeze: leaves nothing to learn")
            penalties = held.penalties(stage, frozen)
        except InputError as error:
            self.problems += [f"{place}.{message}" for message in error.messages]
            return None
        epochs = _first(stage.epochs, training.get("num_train_epochs"), default=DEFAULT_EPOCHS)
        steps = stage.steps or math.ceil(epochs * self.steps_per_epoch)
        cap = training.get("max_steps", -1)
        steps = min(steps, cap) if capped and cap > 0 else steps
        return PlannedStage(
            stage=stage,
            frozen=frozen,
            penalties=tuple(penalties),
            learning_rate=rate,
            epochs=steps / self.steps_per_epoch,
            steps=steps,
            trainable_parameters=trainable,
            total_parameters=sum(sizes.values()),
            groups=held.groups,
        )

    def _adapted(self, stage: Stage) -> tuple[HeldModel, frozenset[str]]:
        """Return the model with the stage's adapter put in, and what of it is frozen."""
        held, learning = self.held, frozenset[str]()
        if stage.lora is not None:
            model = copy.deepcopy(held.model)
            try:
                adapter = inject(model, stage.lora, self.groups.head.parameters, seed=0)
            except InputError as error:
                within = "" if self.config.stages is None else "lora."
                raise InputError([f"{within}{message}" for message in error.messages]) from error
            self.notes += [note for note in adapter.notes if note not in self.notes]
            learning = adapter.learning
            held = replace(held, model=model, groups=find_layer_groups(model))
        return held, held.groups.frozen(stage.freeze) - learning


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


def _first(*values: float | None, default: float) -> float:
    return next((value for value in values if value is not None), default)


def steps_per_epoch(examples: int, training: Mapping[str, Any], processes: int) -> int:
    """Return the optimizer steps of one pass, as the Trainer counts them.

    Raises:
        InputError: `dataloader_drop_last` leaves no batch.
    """
    batch = int(training.get("per_device_train_batch_size", DEFAULT_BATCH_SIZE)) * processes
    batches = examples // batch if training.get("dataloader_drop_last") else -(-examples // batch)
    if batches == 0:
        raise InputError(
            f"training.dataloader_drop_last: train has {examples} examples, fewer than one batch "
            f"of {batch}; lower training.per_device_train_batch_size"
        )
    return max(1, -(-batches // int(training.get("gradient_accumulation_steps", 1))))


def _hardware_notes(config: Config) -> list[str]:
    notes = []
    if config.training.get("bf16") and not has_accelerator():
        capability = torch.backends.cpu.get_cpu_capability()
        if "AVX512" not in capability:
            notes.append(
                f"training.bf16 on this CPU ({capability}) is many times slower than float32; "
                f"leave it out"
            )
    if torch.cuda.device_count() > 1 and join_processes().num_processes == 1:
        notes.append(
            f"one of {torch.cuda.device_count()} GPUs is used; start with "
            f"`accelerate launch launch.py` to use them all"
        )
    return notes
