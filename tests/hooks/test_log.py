"""The log is one line of JSON an event, and a resumed stage does not say things twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfft.hooks import LogCallback
from hfft.hooks.log import drop_unfinished

HERE = {"trial": "main", "stage": "whole"}
ARGUMENTS: Any = TrainingArguments(report_to="none", use_cpu=True)


def log(path: Path, step: int, main: bool = True, **logs: float) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=main)
    LogCallback(path, **HERE).on_log(ARGUMENTS, state, TrainerControl(), logs=logs)


def write(path: Path, *events: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_each_event_adds_a_line_that_tells_stage_and_step(path: Path) -> None:
    log(path, 1, loss=0.5)
    log(path, 2, eval_loss=0.25)
    assert read(path) == [
        {**HERE, "step": 1, "loss": 0.5},
        {**HERE, "step": 2, "eval_loss": 0.25},
    ]


def test_other_processes_and_empty_events_write_nothing(path: Path) -> None:
    log(path, 1, main=False, loss=0.5)
    log(path, 1)
    assert not path.exists()


def test_events_beyond_the_step_are_dropped(path: Path) -> None:
    write(path, *({**HERE, "step": step} for step in (1, 2, 3, 4)))
    drop_unfinished(path, 2, **HERE)
    assert [event["step"] for event in read(path)] == [1, 2]


def test_other_stages_and_trials_keep_all_their_events(path: Path) -> None:
    others = [{**HERE, "stage": "head", "step": 9}, {**HERE, "trial": "scratch", "step": 9}]
    write(path, others[0], {**HERE, "step": 1}, others[1])
    drop_unfinished(path, 0, **HERE)
    assert read(path) == others


def test_line_that_was_cut_off_is_dropped_and_the_log_goes_on(path: Path) -> None:
    write(path, {**HERE, "step": 1})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"trial": "main", "stage": "who')
    drop_unfinished(path, 5, **HERE)
    log(path, 2, loss=0.5)
    assert [event["step"] for event in read(path)] == [1, 2]


def test_missing_log_is_no_error(path: Path) -> None:
    drop_unfinished(path, 0, **HERE)
    assert not path.exists()


def test_nothing_else_is_left_in_the_folder(path: Path) -> None:
    drop_unfinished(write(path, {**HERE, "step": 1}), 0, **HERE)
    assert [entry.name for entry in path.parent.iterdir()] == ["log.jsonl"]
