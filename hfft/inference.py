"""A finished model at work: scores on data, labels for inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from transformers import PretrainedConfig, Trainer, TrainingArguments, pipeline
from transformers.trainer_callback import PrinterCallback

from hfft import registry
from hfft.config import Config, ModelConfig
from hfft.config_file import load_config
from hfft.data import load_data, load_split
from hfft.errors import InputError
from hfft.examples import ExampleDataset
from hfft.plan import make_task
from hfft.processes import has_accelerator, join_processes
from hfft.source import load_weights, read_model_config
from hfft.task import Task


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


def open_finished(path: str | Path) -> FinishedModel:
    """Open a run folder, or a model folder alone.

    Raises:
        InputError: it is neither, the run is not finished, or no task takes such a model.
    """
    path = Path(path)
    run_config = path / "config.yaml"
    if run_config.is_file():
        config = load_config(run_config)
        if not (path / "model" / "config.json").is_file():
            raise InputError(f"{path}: the run has no model yet; finish it: hfft train --resume")
        folder = path / "model"
        labels = _labels(read_model_config(_source(folder, config)))
        return FinishedModel(folder, make_task(config), labels, config)
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: is neither a run folder (config.yaml) nor a model folder")
    model_config = read_model_config(_source(path, None))
    kind = _task_of(model_config, path)
    return FinishedModel(path, kind(kind.Options()), _labels(model_config), None)


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
    source = model.source
    model_config = read_model_config(source)
    processor = model.task.load_processor(source, model_config)
    name, rows = _rows(model, data, split)
    join_processes()
    loaded = load_weights(model.task.auto_model, source, model_config)
    if loaded.new_head:
        raise InputError(f"{model.folder}: nothing to score: {loaded.notes[0]}; fine-tune it first")
    with TemporaryDirectory() as nothing:
        trainer = Trainer(
            model=loaded.model,
            args=TrainingArguments(
                output_dir=nothing,
                report_to="none",
                disable_tqdm=True,
                per_device_eval_batch_size=32,
                remove_unused_columns=False,
                label_names=["labels"],
                use_cpu=not has_accelerator(),
                dataloader_pin_memory=has_accelerator(),
            ),
            data_collator=model.task.collate,
        )
        trainer.remove_callback(PrinterCallback)
        transform = model.task.transform(processor, training=False)
        output = trainer.predict(ExampleDataset(rows, transform))
    predictions, labels = np.asarray(output.predictions), np.asarray(output.label_ids)
    metrics = output.metrics or {}
    scores = {"loss": float(metrics["test_loss"])} if "test_loss" in metrics else {}
    return {
        "split": name,
        "examples": len(rows),
        "metrics": scores | model.task.metrics(predictions, labels),
        "per_class": model.task.scores_by_label(predictions, labels, model.labels),
    }


def predict(model: FinishedModel, inputs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Label inputs through transformers.pipeline.

    Yields:
        `{"input", "scores": [{"label", "score"}, ...]}`, the likeliest first.

    Raises:
        InputError: an input can't be read.
    """
    if not all(inputs):
        raise InputError("INPUT: one is empty; a shell variable without a value?")
    read = model.task.read_inputs(inputs)
    run: Any = pipeline(
        cast(Any, model.task.name),
        model=str(model.folder),
        trust_remote_code=model.source.trust_remote_code,
    )
    for name, value in read:
        yield {"input": name, "scores": run(value)}


def _rows(model: FinishedModel, data: str | None, split: str | None) -> tuple[str, Any]:
    config, columns = model.config, model.task.columns
    if data is not None:
        rows = load_split(
            data,
            split,
            columns,
            labels=model.labels,
            chosen=config.data.columns if config is not None else {},
            on_bad_example=config.data.on_bad_example if config is not None else "error",
        )
        return split or data, rows
    if config is None:
        raise InputError(f"{model.folder}: a model without its run needs --data PATH")
    splits = load_data(config.data, columns, seed=config.seed).splits
    name = split or ("test" if "test" in splits else "validation")
    if name not in splits:
        raise InputError(f"--split: there is no {name!r}; there are: {', '.join(splits)}")
    return name, splits[name]


def _source(folder: Path, config: Config | None) -> ModelConfig:
    allowed = {"allow_pickle", "trust_remote_code"}
    flags = config.model.model_dump(include=allowed) if config is not None else {}
    return ModelConfig(name=str(folder), **flags)


def _labels(config: PretrainedConfig) -> list[str]:
    return [name for _, name in sorted((config.id2label or {}).items())]


def _task_of(config: PretrainedConfig, path: Path) -> type[Task]:
    """Find the task whose model classes end as this model's does."""
    classes = list(config.architectures or [])
    if config.model_type == "timm_wrapper":
        classes.append("TimmWrapperForImageClassification")
    for name in registry.entries():
        task = registry.get(name)
        if any(kind.endswith(task.model_suffix) for kind in classes):
            return task
    raise InputError(f"{path}: no task takes a {', '.join(classes) or config.model_type}")
