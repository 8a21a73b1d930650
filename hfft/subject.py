"""What a stage learns: a task, on its data, by its form of the source model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hfft import registry
from hfft.config import Config, Stage
from hfft.data import LoadedData, load_data, load_scored
from hfft.encoding import Encoder, Examples
from hfft.errors import InputError
from hfft.layers import LayerGroups, find_layer_groups
from hfft.processes import join_processes
from hfft.sections import DataConfig, TaskConfig
from hfft.source import (
    check_shapes,
    head_is_new,
    not_in_source,
    read_model_config,
    skeleton,
)
from hfft.task import Collate, Task, Transform


@dataclass(frozen=True, eq=False)
class Subject:
    """A task, its checked data, and the model that it takes, of which no weight is loaded.

    Attributes:
        task: with its options.
        data: the examples, by role.
        model_config: of the model with the task's head.
        processor: what prepares inputs.
        examples: by split, as they are transformed.
        transforms: of `train`, perhaps random, and of `evaluation`.
        collate: batches what they return.
        skeleton: the model, without memory.
        groups: its layers.
        new: names of the parameters that the source does not bring.
        idle: of those that the loss doesn't depend on.
        encoder: for further data.
        place: what messages begin with where it is a stage's own, such as `stages.0: `.
    """

    task: Task
    data: LoadedData
    model_config: PretrainedConfig
    processor: Any
    examples: Mapping[str, Examples]
    transforms: Mapping[str, Transform]
    collate: Collate
    skeleton: PreTrainedModel
    groups: LayerGroups
    new: frozenset[str]
    encoder: Encoder
    idle: frozenset[str] = frozenset()
    place: str = ""

    @property
    def labels(self) -> list[str]:
        """The class names; empty for a task without."""
        return self.data.labels or []

    @property
    def sizes(self) -> dict[str, int]:
        """The number of weights of each parameter."""
        return {name: parameter.numel() for name, parameter in self.skeleton.named_parameters()}

    @property
    def notes(self) -> list[str]:
        """What the user should know of the data."""
        encoding = [note for examples in self.examples.values() for note in examples.notes]
        return [self.place + note for note in (*self.data.notes, *encoding)]


def make_task(config: TaskConfig) -> Task:
    """Return a task with its options."""
    task = registry.get(config.name)
    return task(task.Options.model_validate(config.model_extra or {}))


def read_subjects(config: Config) -> list[Subject]:
    """Check what a run learns, stage by stage; stages that learn the same share it.

    Returns:
        The subject of each stage, of a run without stages of a single one; the last is the run's.

    Raises:
        InputError: with the problems of data and model together, each of a stage with its place.
    """
    own = _key(make_task(config.task), None)
    found: dict[str, Subject] = {}
    order, problems = [], list[str]()
    for number, stage in enumerate(config.stages or [None]):
        learned = config.task if stage is None or stage.task is None else stage.task
        task = make_task(learned)
        key = _key(task, stage.data if stage is not None else None)
        order.append(key)
        if key in found:
            continue
        data = config.data if key == own or stage is None else _data_of(stage, task, config.data)
        place = "" if key == own else f"stages.{number}: "
        try:
            load = partial(load_data, data, task.needs, seed=config.seed)
            found[key] = _read(config, task, load, place)
        except InputError as error:
            problems += [f"{place}{message}" for message in error.messages]
    if problems:
        raise InputError(problems)
    return [found[key] for key in order]


def read_scored(config: Config, scored: TaskConfig, data: DataConfig, place: str) -> Subject:
    """Check what a run is scored on and doesn't learn: of its examples there are `validation`.

    Args:
        config: the run's.
        scored: the task.
        data: its own.
        place: what messages begin with.

    Raises:
        InputError: with the problems of data and model together.
    """
    task = make_task(scored)

    def load() -> LoadedData:
        # what the source was last tuned on says nothing of open classes
        names = () if task.open_classes else task.labels_of(read_model_config(config.model))
        return load_scored(data, task.needs, names)

    try:
        return _read(config, task, load, place)
    except InputError as error:
        raise InputError([f"{place}{message}" for message in error.messages]) from error


def _key(task: Task, data: DataConfig | None) -> str:
    return repr((task.name, task.options.model_dump(), data))


def _data_of(stage: Stage, task: Task, of_run: DataConfig) -> DataConfig:
    """Return a stage's data: its own, or the run's, of which its task may want fewer columns."""
    if stage.data is not None:
        return stage.data
    columns = {role: name for role, name in of_run.columns.items() if role in task.columns}
    return of_run.model_copy(update={"columns": columns, "test": None})


def _read(config: Config, task: Task, load: Callable[[], LoadedData], place: str) -> Subject:
    problems: list[str] = []
    data = model_config = None
    processes = join_processes()
    with processes.main_process_first():  # which an error that leaves it would upset
        try:
            data = load()
        except InputError as error:
            problems += error.messages
    try:
        model_config = read_model_config(config.model)
    except InputError as error:
        problems += error.messages
    if data is None or model_config is None or problems:
        raise InputError(dict.fromkeys(problems))
    model_config = task.configure(model_config, data.labels or [])
    processor = task.load_processor(config.model, model_config)
    model = skeleton(task.auto_model, model_config, config.model.trust_remote_code)
    task.check_skeleton(model)
    check_shapes(config.model, model)
    groups = find_layer_groups(model)
    head = groups.head.parameters
    # what the source lacks (a pooler) is as new as the head, and learns with it
    lacking = not_in_source(config.model, model, head)
    encoder = Encoder(task, processor, model_config, data.labels or [])
    with processes.main_process_first():
        examples = _encode(encoder, data, problems)
    if problems:
        raise InputError(dict.fromkeys(problems))  # what is wrong with an option is so for each
    transforms = {  # some options are checked by what they make only
        name: task.transform(processor, training=name == "train")
        for name in ("train", "evaluation")
    }
    collate = task.collator(processor, model_config)
    first = next(iter(examples.values()))
    return Subject(
        task=task,
        data=data,
        model_config=model_config,
        processor=processor,
        examples=examples,
        transforms=transforms,
        collate=collate,
        skeleton=model,
        groups=groups.with_head(lacking),
        new=lacking | frozenset(head if head_is_new(config.model, model, head) else ()),
        encoder=encoder,
        idle=task.idle(model, lambda: collate([transforms["evaluation"](first.rows[0])])),
        place=place,
    )


def _encode(encoder: Encoder, data: LoadedData, problems: list[str]) -> dict[str, Examples]:
    """Encode all splits; what is wrong with them goes to the problems."""
    found: dict[str, Examples] = {}
    for name, rows in data.splits.items():
        try:
            found[name] = encoder(
                rows,
                place=f"data.{name}",
                training=name == "train",
                fingerprint=data.fingerprints[name],
            )
        except InputError as error:
            problems += error.messages
    return found
