"""What of a stage depends on its loss being over all pairs of the global batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from hfft.config import StageFields
from hfft.contrastive_task import ContrastiveTask
from hfft.penalties.penalty import get as get_penalty
from hfft.subject import Subject

SIZE = "per_device_train_batch_size"
_DEFAULT_SIZE = 8  # of transformers.TrainingArguments


def with_batch(training: Mapping[str, Any], stage: StageFields, processes: int) -> dict[str, Any]:
    """Return the `training` section with a stage's batch size, where the stage has its own."""
    asked = stage.contrastive
    if asked is None or asked.global_batch is None:
        return dict(training)
    return {**training, SIZE: max(1, asked.global_batch // processes)}


def pair_notes(subject: Subject) -> list[str]:
    """Say where pairs that are to be contrasted don't differ: the loss is 0 from the start."""
    task = subject.task
    if not isinstance(task, ContrastiveTask):
        return []
    pairs = subject.examples["train"].split.encoded
    return [
        f"{subject.place}data.train: its {len(pairs)} pairs are all of one {half}, so there is "
        f"nothing to contrast them with, and nothing is learned; look at data.columns"
        for half in (task.other, "text")
        if len(pairs.unique(f"{half}_key")) < 2
    ]


def check_contrast(
    training: Mapping[str, Any],
    batch_tokens: int | None,
    stage: StageFields,
    subject: Subject,
    frozen: Collection[str],
    processes: int,
) -> list[str]:
    """Check that a stage's pairs can be contrasted, in the pieces asked for.

    Args:
        training: the config's section.
        batch_tokens: the config's.
        stage: whose fields.
        subject: what it learns.
        frozen: parameters that don't learn in it.
        processes: how many there are.

    Returns:
        Problems, each beginning with a key of the stage or of the config.
    """
    asked = stage.contrastive
    if not isinstance(subject.task, ContrastiveTask):
        if asked is None:
            return []
        return [f"contrastive: is for tasks that contrast pairs, not for {subject.task.name}"]
    problems = list(_of_training(training, batch_tokens, asked is not None and asked.global_batch))
    penalties = [get_penalty(penalty.kind) for penalty in stage.penalty or ()]
    problems += [
        f"penalty.kind: {penalty.kind} measures the source on one example at a time, and a pair "
        f"that is contrasted with no other has no loss; take another kind, such as l2_sp"
        for penalty in penalties
        if penalty.one_by_one
    ]
    whole = asked.global_batch if asked is not None else None
    whole = int(training.get(SIZE, _DEFAULT_SIZE)) * processes if whole is None else whole
    own, rest = divmod(whole, processes)
    if rest:
        problems.append(
            f"contrastive.global_batch: {whole} pairs can't be shared by {processes} processes; "
            f"take a multiple of {processes}"
        )
    if whole < 2:
        problems.append(
            f"training.{SIZE}: a batch of one pair has nothing to contrast it with; take more"
        )
    if asked is None or asked.chunk is None or problems:
        return problems
    if own % asked.chunk:
        problems.append(
            f"contrastive.chunk: {own} pairs of each process ({whole} in all) are no multiple of "
            f"{asked.chunk}; take one that divides them"
        )
    elif asked.chunk < own and (norm := _batch_norm(subject.skeleton, frozen)):
        problems.append(
            f"contrastive.chunk: {norm} normalises by the statistics of a batch, which would be "
            f"those of a chunk; freeze that tower (towers), or leave chunk out"
        )
    elif asked.chunk < own:
        problems += [
            f"contrastive.chunk: the penalty {penalty.kind} acts on the activations of a batch, "
            f"which would be those of each chunk; leave chunk out, or take a penalty on weights"
            for penalty in penalties
            if penalty.below_head
        ]
    return problems


def batch_notes(stage: StageFields, subject: Subject) -> list[str]:
    """Say where a stage's global batch is larger than the data."""
    asked, pairs = stage.contrastive, len(subject.examples["train"])
    if asked is None or asked.global_batch is None or asked.global_batch <= pairs:
        return []
    return [
        f"contrastive.global_batch: {asked.global_batch} pairs are asked for, and data.train has "
        f"{pairs}, which are contrasted all at once."
    ]


def _of_training(
    training: Mapping[str, Any], batch_tokens: int | None, has_batch: object
) -> Iterator[str]:
    if int(training.get("gradient_accumulation_steps", 1)) > 1:
        yield (
            "training.gradient_accumulation_steps: adds no negatives, since each micro-batch is "
            "contrasted for itself; leave it out, and set contrastive.global_batch and "
            "contrastive.chunk, which are exact"
        )
    if has_batch and SIZE in training:
        yield (f"contrastive.global_batch: training.{SIZE} sets the batch too; keep one of them")
    if batch_tokens is not None:
        yield "batch_tokens: batches of pairs go by their number; remove it"
    if not training.get("average_tokens_across_devices", True):
        yield (
            "training.average_tokens_across_devices: the loss is over the pairs of all processes; "
            "remove it"
        )
    if training.get("auto_find_batch_size"):
        yield (
            "training.auto_find_batch_size: a smaller batch is another loss; remove it, and set "
            "contrastive.chunk, which saves memory and is exact"
        )
    accelerator = training.get("accelerator_config") or {}
    for key in ("split_batches", "even_batches", "gradient_accumulation_kwargs"):
        if isinstance(accelerator, Mapping) and key in accelerator:
            yield (
                f"training.accelerator_config.{key}: would change which pairs are contrasted; "
                f"remove it"
            )
    if training.get("train_sampling_strategy", "random") != "random":
        yield (
            "training.train_sampling_strategy: batches of pairs must be random, or length would "
            "tell which belong together; remove it"
        )


def _batch_norm(model: nn.Module, frozen: Collection[str]) -> str:
    """Return the path of a BatchNorm that isn't frozen; "" if there is none."""
    kinds = nn.modules.batchnorm._BatchNorm
    for path, module in model.named_modules():
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, kinds) and not (own and all(name in frozen for name in own)):
            return str(path)
    return ""
