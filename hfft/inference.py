"""A finished model at work: scores on data, labels for inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from transformers import PretrainedConfig

from hfft import registry
from hfft.complaints import explain
from hfft.config import Config
from hfft.config_file import load_config
from hfft.data import load_data, load_split
from hfft.encoding import Encoder
from hfft.errors import InputError
from hfft.processes import join_processes
from hfft.scoring import score_split
from hfft.sections import ModelConfig
from hfft.source import load_weights, read_model_config
from hfft.subject import make_task
from hfft.task import Task
from hfft.yaml_file import apply_override


@dataclass(frozen=True)
class FinishedModel:
    """A model folder, the task it was trained for, and the run's config where there is one."""

    folder: Path
    task: Task
    labels: list[str]
    config: Config | None

    @property
    def source(self) -> ModelConfig:
        """The model folder, with what its run was allowed to load."""
        return _source(self.folder, self.config)


def open_finished(path: str | Path, overrides: Sequence[str] = ()) -> FinishedModel:
    """Open a run folder, or a model folder alone.

    Args:
        path: the folder.
        overrides: dotted assignments to the run's config; of a model alone, to `task`.

    Raises:
        InputError: it is neither, the run is not finished, or no task takes such a model.
    """
    path = Path(path)
    run_config = path / "config.yaml"
    if run_config.is_file():
        config = load_config(run_config, overrides)
        if not (path / "model" / "config.json").is_file():
            raise InputError(f"{path}: the run has no model yet; finish it: hfft train --resume")
        folder = path / "model"
        task = make_task(config.task)
        labels = task.labels_of(read_model_config(_source(folder, config)))
        return FinishedModel(folder, task, labels, config)
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: is neither a run folder (config.yaml) nor a model folder")
    model_config = read_model_config(_source(path, None))
    kind = _task_of(model_config, path)
    task = kind(_options(kind, model_config, overrides))
    return FinishedModel(path, task, task.labels_of(model_config), None)


def evaluate(model: FinishedModel, data: str | None, split: str | None) -> dict[str, Any]:
    """Score a model on a split.

    Args:
        model: the model.
        data: where the examples are; default: the run's own data.
        split: the split's name; default: the run's test split, else validation; with other data
            its only split, or test.

    Returns:
        `{"split", "examples", "metrics": {name: value}, "per_class": [...]}`

    Raises:
        InputError: there is no such data or split, its labels are not the model's, or the model
            has no trained head.
    """
    source, task = model.source, model.task
    name, rows = _rows(model, data, split)
    labels = model.labels
    if task.open_classes and (role := rows.features.get("label")) is not None:
        labels = role.names
    model_config = task.configure(read_model_config(source), labels)
    processor = task.load_processor(source, model_config)
    examples = Encoder(task, processor, model_config, labels)(rows, place=name, training=False)
    join_processes()
    training = {} if model.config is None else model.config.training
    loaded = load_weights(task.auto_model, source, model_config)
    if loaded.new_head:
        raise InputError(f"{model.folder}: nothing to score: {loaded.notes[0]}; fine-tune it first")
    found = score_split(
        task,
        loaded.model,
        examples,
        transform=task.transform(processor, training=False),
        collate=task.collator(processor, model_config),
        training=training,
        # the seed under which the run itself drew what evaluation draws
        seed=model.config.seed if model.config is not None else 0,
    )
    return {
        "split": name,
        "examples": len(rows),
        "metrics": found.scores,
        "per_class": task.scores_by_label(found.predictions, found.labels, found.split),
    }


def predict(model: FinishedModel, inputs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Answer inputs one by one, as they come.

    Yields:
        `{"input"}` and what the task answers: of a classifier `"scores": [{"label", "score"},
        ...]`, the likeliest first.

    Raises:
        InputError: an input can't be read.
    """
    if not all(inputs):
        raise InputError("INPUT: one is empty; a shell variable without a value?")
    read = iter(model.task.read_inputs(inputs))
    first = next(read, None)  # what is wrong with it is told before a weight is loaded
    if first is None:
        raise InputError("INPUT: holds nothing to predict for")
    answer = model.task.predictor(model.folder, trust_remote_code=model.source.trust_remote_code)
    for name, value in chain([first], read):
        yield {"input": name, **answer(value)}


def _rows(model: FinishedModel, data: str | None, split: str | None) -> tuple[str, Any]:
    config, needs = model.config, model.task.needs
    if data is not None:
        rows = load_split(
            data,
            split,
            needs,
            labels=model.labels,
            open_classes=model.task.open_classes,
            chosen=config.data.columns if config is not None else {},
            on_bad_example=config.data.on_bad_example if config is not None else "error",
        )
        return split or data, rows
    if config is None:
        raise InputError(f"{model.folder}: a model without its run needs --data PATH")
    splits = load_data(config.data, needs, seed=config.seed).splits
    name = split or ("test" if "test" in splits else "validation")
    if name not in splits:
        raise InputError(f"--split: there is no {name!r}; there are: {', '.join(splits)}")
    return name, splits[name]


def _source(folder: Path, config: Config | None) -> ModelConfig:
    allowed = {"allow_pickle", "trust_remote_code"}
    flags = config.model.model_dump(include=allowed) if config is not None else {}
    return ModelConfig(name=str(folder), **flags)


def _options(kind: type[Task], config: PretrainedConfig, overrides: Sequence[str]) -> BaseModel:
    """Return the options of a task that a model knows of, and those that are asked for."""
    values: dict[str, Any] = {"task": dict(kind.options_of(config))}
    for assignment in overrides:
        if not assignment.startswith("task."):
            raise InputError(
                f"{assignment}: of a model without its run only `task.` can be set, such as "
                f"task.{next(iter(kind.Options.model_fields))}=..."
            )
        apply_override(values, assignment)
    try:
        return kind.Options.model_validate(values["task"])
    except ValidationError as error:
        raise InputError(explain(error, kind.Options, ("task",))) from error


def _task_of(config: PretrainedConfig, path: Path) -> type[Task]:
    """Find the task whose model classes end as this model's does."""
    for name in registry.entries():
        if (task := registry.get(name)).takes(config):
            return task
    kind = ", ".join(config.architectures or []) or config.model_type
    raise InputError(f"{path}: no task takes a {kind}")
