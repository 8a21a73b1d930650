from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfft.hooks import EpochCallback


@pytest.mark.parametrize(("passed", "epoch"), [(None, 0), (0.0, 0), (0.6, 0), (1.0, 1), (2.4, 2)])
def test_dataset_is_told_the_epochs_completed(passed: float | None, epoch: int) -> None:
    told: list[int] = []

    class Recorder:
        def set_epoch(self, number: int) -> None:
            told.append(number)

    state = TrainerState(epoch=passed)
    EpochCallback(Recorder()).on_epoch_begin(
        TrainingArguments(use_cpu=True), state, TrainerControl()
    )
    assert told == [epoch]
