"""Tells a dataset which epoch it is in."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochAware(Protocol):
    """A dataset whose examples differ from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Take the number of passes completed."""


class EpochCallback(TrainerCallback):
    """Call `dataset.set_epoch` as each epoch begins, in a resumed run too.

    accelerate's data loader does so only where its sampler has no `set_epoch` of its own, which
    depends on the number of processes.

    Args:
        dataset: the training data.
    """

    def __init__(self, dataset: EpochAware) -> None:
        self.told: list[EpochAware] = [dataset]

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the epoch on; a run resumed inside one has a fraction of it behind it."""
        for one in self.told:
            one.set_epoch(int(state.epoch or 0))
