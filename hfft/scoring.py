"""A model scored on a split: the same way in a run, after it, and for what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainingArguments

from hfft.encoding import Examples
from hfft.examples import ExampleDataset
from hfft.processes import has_accelerator
from hfft.task import Collate, Split, Task, Transform
from hfft.task_trainer import TaskTrainer


@dataclass(frozen=True)
class Scored:
    """What a model came to on a split.

    Attributes:
        scores: the loss, and the task's metrics, by name.
        predictions: (N, ...) what the task keeps of the outputs.
        labels: (N, ...).
        split: the examples, in the order of the predictions.
    """

    scores: dict[str, float]
    predictions: Any
    labels: np.ndarray
    split: Split


def score_split(
    task: Task,
    model: PreTrainedModel,
    examples: Examples,
    *,
    transform: Transform,
    collate: Collate,
    training: Mapping[str, Any],
    seed: int,
) -> Scored:
    """Score a model; several processes share the examples, and each returns the same.

    Args:
        task: whose metrics.
        model: on any device; it is moved.
        examples: of the split.
        transform: of the task, for evaluation.
        collate: batches what it returns.
        training: a config's section: batch size and precision.
        seed: of what evaluation draws.
    """
    with TemporaryDirectory() as nothing:
        trainer = TaskTrainer(
            task=task,
            model=model,
            args=TrainingArguments(
                output_dir=nothing,
                report_to="none",
                disable_tqdm=True,
                per_device_eval_batch_size=training.get("per_device_eval_batch_size", 32),
                dataloader_num_workers=training.get("dataloader_num_workers", 0),
                bf16=training.get("bf16", False),
                fp16=training.get("fp16", False),
                remove_unused_columns=False,
                label_names=["labels"],
                use_cpu=training.get("use_cpu", not has_accelerator()),
                dataloader_pin_memory=has_accelerator(),
            ),
            data_collator=collate,
        )
        dataset = ExampleDataset(examples.rows, transform, seed, split=examples.split)
        output = trainer.predict(dataset)
    found = {n.removeprefix("test_"): v for n, v in (output.metrics or {}).items()}
    return Scored(
        {name: float(found[name]) for name in ("loss", *task.metric_names) if name in found},
        output.predictions,
        np.asarray(output.label_ids),
        trainer.scored,
    )
