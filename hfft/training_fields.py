"""The `training:` section, checked against transformers.TrainingArguments before any is made."""

from __future__ import annotations

import dataclasses
import math
import typing
from enum import Enum
from typing import Any, Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from hfft.complaints import nearest

# Fields of TrainingArguments that another part of the config or the command line already decides.
SET_ELSEWHERE = {
    "output_dir": "output_dir",
    "seed": "seed",
    "resume_from_checkpoint": "the flag --resume",
    "push_to_hub": "hub",
    "hub_model_id": "hub.repo_id",
    "hub_private_repo": "hub.private",
    "hub_token": "the environment variable HF_TOKEN",
    "remove_unused_columns": "data.columns",
    "do_train": "the verb hfft train",
    "do_eval": "data.validation",
    "do_predict": "data.test",
    "disable_tqdm": "standard error being a terminal or not",
    "logging_nan_inf_filter": "the run, which stops at a loss that is no number",
    "save_only_model": "the run, which must be able to resume",
    "ignore_data_skip": "the run, which resumes where it was in the data",
    "prediction_loss_only": "the task, whose metrics need the predictions",
    "batch_eval_metrics": "the task, whose metrics are over the whole split",
    "eval_do_concat_batches": "the task, whose metrics are over the whole split",
    "label_names": "the task",
}

# Fields of TrainingArguments that it takes any number for, to break on it in the middle of a run.
NARROWER: dict[str, Any] = {
    "per_device_train_batch_size": PositiveInt,
    "per_device_eval_batch_size": PositiveInt,
    "gradient_accumulation_steps": PositiveInt,
    "dataloader_num_workers": NonNegativeInt,
    "num_train_epochs": PositiveFloat,
    "max_steps": Literal[-1] | PositiveInt,
    "learning_rate": NonNegativeFloat,
    "weight_decay": NonNegativeFloat,
    "max_grad_norm": NonNegativeFloat,
}


def check_training(training: object) -> list[str]:
    """Check names and types against transformers.TrainingArguments."""
    if not isinstance(training, dict) or not training:
        return []
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    problems = []
    for key, value in training.items():
        if key in SET_ELSEWHERE:
            problems.append(f"training.{key}: is set by {SET_ELSEWHERE[key]}; remove it here")
        elif key not in names:
            problems.append(f"training.{key}: unknown key{nearest(str(key), names)}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"training.{key}: expected a finite number, found {value!r}")
        else:
            try:
                TypeAdapter(NARROWER.get(key, hints[key])).validate_python(value, strict=True)
                problems += check_choice(f"training.{key}", value, hints[key])
            except ValidationError as error:
                message = error.errors()[-1]["msg"]  # of a union, the form that is no class
                meant = '; YAML reads no as false: write "no"' if value is False else ""
                problems.append(f"training.{key}: {message}, found {value!r}{meant}")
            except TypeError:
                continue  # a type pydantic does not know: TrainingArguments checks it itself
    return problems


def check_choice(place: str, value: object, hint: Any) -> list[str]:
    """Check a name against the enum that TrainingArguments will turn it into."""
    for kind in typing.get_args(hint):
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
            names = [str(member.value) for member in kind]
            if value not in names:
                return [f"{place}: {value!r} is none of its values{nearest(value, names)}"]
    return []
