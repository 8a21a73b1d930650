from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfft.hooks.logit_scale import LogitScaleCallback


class Scaled(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(value))


@pytest.mark.parametrize(
    ("value", "expected"), [(7.0, math.log(100)), (-0.5, 0.0), (2.6592, 2.6592)]
)
def test_scale_is_clipped_after_a_step_as_clip_does(value: float, expected: float) -> None:
    assert stepped(Scaled(2.0), value) == pytest.approx(expected)


def stepped(model: Scaled, value: float) -> float:
    """Return what is left of the scale that an optimizer steps to."""
    args = TrainingArguments(use_cpu=True)
    callback = LogitScaleCallback(model)
    with torch.no_grad():
        model.logit_scale.fill_(value)
    callback.on_optimizer_step(args, TrainerState(), TrainerControl())
    return model.logit_scale.item()


def test_a_scale_that_begins_above_does_not_grow() -> None:
    assert stepped(Scaled(4.8), 4.7) == pytest.approx(4.7)
    assert stepped(Scaled(4.8), 4.9) == pytest.approx(4.8)


def test_a_frozen_scale_is_left_as_it_is() -> None:
    model = Scaled(2.0)
    model.logit_scale.requires_grad_(False)
    assert stepped(model, 7.0) == 7.0
