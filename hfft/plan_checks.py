"""What of a config depends on the task, its data, the model or the machine."""

from __future__ import annotations

import torch

from hfft.complaints import nearest
from hfft.config import Config
from hfft.processes import has_accelerator, join_processes
from hfft.subject import Subject


def check_hub(config: Config, subject: Subject) -> list[str]:
    """Check that what comes of the run may be pushed, if it is to be."""
    kind = type(subject.skeleton)
    if config.hub is None or config.hub.code or kind._auto_class is None:
        return []
    return [
        f"hub.code: {kind.__name__} loads by code of its own, which would be pushed with it; allow "
        f"that by hub.code: true"
    ]


def check_training(config: Config, subject: Subject) -> list[str]:
    """Check what of `training` depends on the task and its data, and is looked up late."""
    problems = []
    name = config.training.get("metric_for_best_model")
    names = ("loss", *subject.task.metric_names)
    # stages of another task go by their loss
    of_run = subject.task.name == config.task.name
    if of_run and name is not None and str(name).removeprefix("eval_") not in names:
        problems.append(
            f"training.metric_for_best_model: there is no {name!r}{nearest(str(name), names)}"
        )
    smoothing = config.training.get("label_smoothing_factor", 0)
    if not 0 <= float(smoothing) <= 1:
        problems.append(
            f"training.label_smoothing_factor: expected a number from 0 to 1, found {smoothing}"
        )
    elif smoothing and not subject.task.smooths:
        problems.append(
            "training.label_smoothing_factor: is for classes, not for numbers or pairs; remove it"
        )
    strategy = config.training.get("train_sampling_strategy", "random")
    if subject.examples["train"].lengths is None:
        if config.batch_tokens is not None:
            problems.append(f"batch_tokens: {subject.task.name} has no tokens; remove it")
        if strategy in ("group_by_length", "batch_rebalance"):
            problems.append(
                f"training.train_sampling_strategy: {strategy} goes by tokens, and "
                f"{subject.task.name} has none; use random"
            )
    elif config.batch_tokens is not None and config.training.get("dataloader_drop_last"):
        problems.append(
            "training.dataloader_drop_last: batches of batch_tokens are all whole; remove it"
        )
    elif config.batch_tokens is not None and strategy != "random":
        problems.append(
            f"training.train_sampling_strategy: {strategy} and batch_tokens both choose the "
            f"batches; keep one of them"
        )
    return [subject.place + problem for problem in problems]


def hardware_notes(config: Config) -> list[str]:
    """Say what of the machine is not used, or is slow."""
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
