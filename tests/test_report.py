from __future__ import annotations

from typing import Any

from hfft import registry
from hfft.report import comparison, result_report, table

TASK = registry.get("image-classification")
TASK = TASK(TASK.Options())


def result(own: float, scratch: float, frozen: float) -> dict[str, Any]:
    def score(accuracy: float) -> dict[str, float]:
        return {"loss": 1.0, "accuracy": accuracy, "macro_f1": accuracy}

    return {
        "task": "image-classification",
        "eval": score(own),
        "test": score(own),
        "baselines": {
            "scratch": {"eval": score(scratch), "test": score(scratch)},
            "frozen": {"eval": score(frozen), "test": score(frozen)},
        },
        "stages": [
            {
                "name": "whole",
                "steps": 3,
                "trainable_parameters": 10,
                "seconds": 1.0,
                "eval": score(own),
            }
        ],
    }


def test_nothing_is_said_where_every_baseline_is_beaten() -> None:
    assert comparison(TASK, result(0.9, 0.8, 0.7)) == []


def test_each_baseline_that_is_not_beaten_gets_a_sentence() -> None:
    [sentence] = comparison(TASK, result(0.8, 0.9, 0.7))
    assert "0.8000) did not beat the same network trained from scratch" in sentence
    assert len(comparison(TASK, result(0.7, 0.9, 0.8))) == 2


def test_a_tie_is_not_a_gain() -> None:
    assert len(comparison(TASK, result(0.8, 0.5, 0.8))) == 1


def test_negative_transfer_stands_on_the_screen() -> None:
    text = result_report(TASK, result(0.7, 0.9, 0.6), "runs/x/model")
    assert "did not beat the same network" in text
    assert "runs/x/model" in text


def test_tables_align() -> None:
    lines = table(("name", "n"), [("a", 1), ("long name", 22)]).splitlines()
    assert lines == ["name        n", "---------  --", "a           1", "long name  22"]
