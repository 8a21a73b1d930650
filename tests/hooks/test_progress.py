from __future__ import annotations

import io

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfft.hooks import ProgressCallback


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, main: bool = True) -> str:
    """Three steps of a stage, as a Trainer reports them; what they write."""
    monkeypatch.setattr("sys.stderr", stream)
    args, control = TrainingArguments(use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=3, is_world_process_zero=main)
    bar = ProgressCallback("main: head", "accuracy")
    bar.on_train_begin(args, state, control)
    for step in (1, 2, 3):
        state.global_step = step
        bar.on_step_end(args, state, control)
        bar.on_log(args, state, control, logs={"loss": 1 / step})
        bar.on_log(args, state, control, logs={"eval_accuracy": 0.5, "eval_loss": 9.0})
    bar.on_train_end(args, state, control)
    return stream.getvalue()


def test_a_terminal_sees_stage_steps_loss_and_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    shown = show(Terminal(), monkeypatch)
    assert "main: head" in shown
    assert "/3" in shown


def test_a_file_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(io.StringIO(), monkeypatch) == ""


def test_only_the_main_process_shows_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(Terminal(), monkeypatch, main=False) == ""
