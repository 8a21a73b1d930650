"""A stage's TrainingArguments, and a rehearsal of what a Trainer makes of them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PretrainedConfig, TrainingArguments

from hfft.config import Config
from hfft.contrastive_plan import with_batch
from hfft.errors import InputError
from hfft.processes import has_accelerator, join_processes
from hfft.trainer import StageTrainer

if TYPE_CHECKING:
    from hfft.plan import PlannedStage

OF_STAGE = ("weight_decay", "lr_scheduler_type", "warmup_steps")
"""What a stage may say in TrainingArguments' own words, over `training`."""


def training_arguments(
    config: Config, planned: PlannedStage, output_dir: Path, seed: int
) -> TrainingArguments:
    """Return one stage's TrainingArguments: ours, then `training`, then the stage's own."""
    stage = planned.stage
    ours = {
        "report_to": "none",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_first_step": True,
        "use_cpu": not has_accelerator(),
        "ddp_find_unused_parameters": False,  # what is frozen was frozen before wrapping
        "ddp_broadcast_buffers": False,  # ReplicasCallback averages what each process gathered
        "dataloader_pin_memory": has_accelerator(),
        "dataloader_num_workers": _workers(),
        "label_names": ["labels"],
    }
    of_stage = {key: value for key in OF_STAGE if (value := getattr(stage, key)) is not None}
    fixed = {
        "output_dir": str(output_dir),
        "seed": seed,
        "learning_rate": planned.learning_rate,
        "num_train_epochs": planned.epochs,
        "max_steps": planned.steps,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it hides what StageTrainer stops at
    }
    training = with_batch(config.training, stage, join_processes().num_processes)
    values = {**ours, **training, **of_stage, **fixed, **_best(config, planned)}
    # else they are forked anew for each epoch and each evaluation; no workers can't persist
    persistent = has_accelerator() and values["dataloader_num_workers"] not in (0, None)
    values.setdefault("dataloader_persistent_workers", persistent)
    # rotation deletes older checkpoints before the newest is sealed, so one more must stay
    values["save_total_limit"] = max(2, values["save_total_limit"] or 2)
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {error}") from error
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # nn.DataParallel is never right here; accelerate launch is
    return arguments


def _best(config: Config, planned: PlannedStage) -> dict[str, Any]:
    """Return which scores are better: the Trainer takes all but a loss to be the higher ones.

    Stages of another task than the run's go by their loss where they lack the run's metric.
    """
    task, name = planned.subject.task, config.training.get("metric_for_best_model")
    bare = str(name).removeprefix("eval_")
    if name is None or bare == "loss":
        return {}
    if bare not in task.metric_names:
        return {"metric_for_best_model": "loss", "greater_is_better": False}
    chosen = config.training.get("greater_is_better")
    better = bare not in task.lower_is_better if chosen is None else chosen
    return {"greater_is_better": better}


def _workers() -> int:
    """Return how many processes prepare examples for this one.

    An accelerator is fed by all processors but the one that drives it, shared with the other
    processes here; 8 at most. Without one, they would compete with the training.
    Where a new process is not a fork, a task's transform can't be handed to it.
    """
    if not has_accelerator() or multiprocessing.get_context().get_start_method() != "fork":
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(8, processors // processes - 1))


def rehearse(config: Config, planned: PlannedStage) -> None:
    """Make all that a Trainer makes of a stage's arguments before its first step.

    TrainingArguments checks little; what is missing, or doesn't go together, comes out in the
    Trainer, the optimizer, the schedule and the loader. They are made for a model of one weight.

    Raises:
        InputError: the arguments are wrong, or need what is not installed.
    """
    model = nn.Linear(1, 1, bias=False)
    model.config = cast(Any, PretrainedConfig())  # label smoothing looks at it
    with TemporaryDirectory() as nothing:
        arguments = training_arguments(config, planned, Path(nothing), config.seed)
        examples: Any = [{"input_ids": [0]}]
        try:
            trainer = StageTrainer(
                task=planned.subject.task,
                rates={"weight": planned.learning_rate},
                carried={},
                span=(0, planned.steps) if config.schedule == "run" else None,
                model=model,
                args=arguments,
                train_dataset=examples,
                eval_dataset=examples,
                data_collator=list,
            )
            trainer.create_optimizer_and_scheduler(planned.steps)
            trainer.get_train_dataloader()
        except InputError:
            raise
        except Exception as error:  # whatever a library makes of a value it didn't expect
            raise InputError(f"training: {error}") from error
