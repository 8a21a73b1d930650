"""Text tasks on stored features against computed ones: the same losses, weights and scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hfft
from hfft.config_file import load_config
from hfft.plan import make_plan

from .feature_runs import SGD, furthest, stored, warnings_of_runs
from .runs import metrics
from .task_runs import CASES, Case, write_case

pytestmark = pytest.mark.slow

POOLED = {"name": "text-classification", "head": {"pooling": "mean"}}
RUNS: dict[str, Case] = {
    "bert": CASES["single label"],
    "gpt2": CASES["single label, decoder"],
    "pooled bert": replace(CASES["single label"], task=POOLED),
    "pooled gpt2": replace(CASES["single label, decoder"], task=POOLED),
    "pairs": CASES["pairs"],
    "several labels": CASES["several labels"],
    "tags": CASES["tags"],
    "questions": CASES["questions"],
}
STAGES = [
    {"name": "head", "freeze": "backbone", "epochs": 2},
    {"name": "top", "freeze": 2, "epochs": 1},
]


def both(case: Case, folder: Path, **sections: Any) -> tuple[Path, Path]:
    """Train with stored features, then without; return both folders."""
    sections = {"strategy": None, "stages": STAGES, **sections}
    sections["training"] = {**SGD, **sections.get("training", {})}
    config = write_case(case, folder, **sections)
    runs = []
    for mode in ("on", "off"):
        runs.append(folder / mode)
        hfft.train(config, [f"feature_cache={mode}", f"output_dir={runs[-1]}"])
    return runs[0], runs[1]


@pytest.mark.parametrize("name", RUNS)
def test_a_stored_run_ends_where_a_computed_one_does(name: str, tmp_path: Path) -> None:
    """Head alone, then the upper layers: padding differs by batch, and is not stored."""
    one, other = both(RUNS[name], tmp_path)
    assert stored(one) == [True, True]
    assert stored(other) == [False, False]
    loss, weight = furthest(one, other)
    assert loss < 1e-5
    assert weight < 1e-4
    for key in ("eval", "test"):
        assert metrics(one)[key] == pytest.approx(metrics(other)[key], abs=1e-5)


@pytest.mark.parametrize(
    "sections", [{"batch_tokens": 60}, {"training": {"train_sampling_strategy": "group_by_length"}}]
)
def test_batches_by_length_read_stored_features(sections: dict[str, Any], tmp_path: Path) -> None:
    one, other = both(RUNS["bert"], tmp_path, **sections)
    assert stored(one) == [True, True]
    loss, weight = furthest(one, other)
    assert (loss, weight) < (1e-5, 1e-4)


def test_gaps_are_drawn_anew_so_only_what_is_scored_is_stored(tmp_path: Path) -> None:
    one, other = both(CASES["gaps"], tmp_path)
    assert furthest(one, other)[0] < 1e-5
    assert metrics(one)["eval"] == pytest.approx(metrics(other)["eval"], abs=1e-5)
    plan = make_plan(load_config(tmp_path / "run.yaml", ["feature_cache=on"]))
    assert all("train" not in stage.features.splits for stage in plan.main.stages)


def test_packed_rows_are_computed_and_it_is_said_why(tmp_path: Path) -> None:
    """They tell examples apart by positions, which those of validation lack."""
    with warnings_of_runs() as warned:
        one, other = both(CASES["texts to go on"], tmp_path, stages=STAGES[1:])
    assert stored(one) == [False]
    assert any("in every epoch: examples have not all the same inputs" in text for text in warned)
    assert furthest(one, other) == (0, 0)
    assert metrics(one)["test"] == metrics(other)["test"]


def test_an_encoder_that_is_stored_generates_with_the_whole_model(tmp_path: Path) -> None:
    one, other = both(CASES["summaries"], tmp_path, stages=STAGES[1:])
    assert stored(one) == [True]
    assert furthest(one, other)[0] < 1e-5
    assert metrics(one)["test"] == pytest.approx(metrics(other)["test"], abs=1e-5)
