"""Text tasks on one process against two, launched for real, over gloo, on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hfft

from .runs import largest_difference, losses, metrics, same_weights
from .task_runs import CASES, Case, long_bert_folder, write_case
from .test_processes import accelerate, kill_when, run, train_on_two

pytestmark = pytest.mark.slow

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "logging_steps": 1}
"""Adam would make steps of the rounding of zero gradients."""
UNPACKED = {"name": "text-generation", "packing": False}
WINDOWS = {"name": "question-answering", "max_length": 14, "stride": 2}


def case(name: str, **changes: Any) -> Case:
    return replace(CASES[name], **changes)


def batches(one: int, **training: Any) -> dict[str, Any]:
    """The training of a run on one process: twice the batch of each of two."""
    return {**SGD, "per_device_train_batch_size": one, "per_device_eval_batch_size": 9, **training}


RUNS: dict[str, tuple[Case, dict[str, Any]]] = {
    "classes": (case("single label"), {"training": batches(8)}),
    "classes, decoder": (case("single label, decoder"), {"training": batches(8)}),
    "gaps": (case("gaps"), {"training": batches(8)}),
    "texts": (case("texts to go on", task=UNPACKED), {"training": batches(8)}),
    "packed": (case("texts to go on"), {"training": batches(4, max_steps=3)}),
    "tags": (case("tags"), {"training": batches(8)}),
    "windows": (
        case("questions", task=WINDOWS, model=long_bert_folder),
        # only scored: its loss is a softmax over padding too, which depends on the batch
        {"training": batches(8, max_steps=1, learning_rate=0.0)},
    ),
    "summaries": (case("summaries"), {"training": batches(8)}),
}
# an even number of batches, whose pairs are the steps of both
TOKENS = {"batch_tokens": 64, "training": {**SGD, "gradient_accumulation_steps": 2}}
ADAPTED = {
    "strategy": None,
    "stages": [
        {"name": "adapt", "task": "fill-mask", "epochs": 1},
        {"name": "head", "freeze": "backbone", "epochs": 1},
        {"name": "whole", "epochs": 1},
    ],
    "training": batches(8, save_strategy="steps", save_steps=2),
}


def halved(sections: dict[str, Any]) -> str:
    half = sections["training"]["per_device_train_batch_size"] // 2
    return f"training.per_device_train_batch_size={half}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each run: `run` is of one process, `two` of two, all of them of one launch."""
    found: dict[str, Path] = {}
    commands = []
    for name, (own, sections) in RUNS.items():
        folder = found[name] = tmp_path_factory.mktemp("run")
        config = write_case(own, folder, **sections)
        commands.append([str(config), f"output_dir={folder / 'two'}", halved(sections)])
    folder = found["tokens"] = tmp_path_factory.mktemp("run")
    config = write_case(case("single label"), folder, **TOKENS)
    of_two = "training.gradient_accumulation_steps=1"
    commands.append([str(config), f"output_dir={folder / 'two'}", of_two])
    folder = found["adapted"] = tmp_path_factory.mktemp("run")
    config = write_case(case("single label"), folder, **ADAPTED)
    commands.append([str(config), f"output_dir={folder / 'two'}", halved(ADAPTED)])
    train_on_two(commands, tmp_path_factory.mktemp("todo"))
    return found


@pytest.mark.parametrize("name", [*RUNS, "tokens", "adapted"])
def test_two_processes_equal_one(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name]
    hfft.train(folder / "run.yaml")
    one, two = folder / "run", folder / "two"
    assert json.loads((two / "environment.json").read_text())["num_processes"] == 2
    first, second = losses(one), losses(two)
    assert [entry[:3] for entry in first] == [entry[:3] for entry in second]
    assert [e[3] for e in first] == pytest.approx([e[3] for e in second], abs=1e-5)
    assert largest_difference(one, two) < 1e-6
    found, expected = ([m["eval"], m["test"], *of_stages(m)] for m in map(metrics, (two, one)))
    for ours, theirs in zip(found, expected, strict=True):
        if name == "windows":
            ours["loss"] = theirs["loss"]
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def of_stages(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"steps": stage["steps"], **stage["eval"]} for stage in found["stages"]]


def test_two_processes_killed_in_a_later_task_go_on(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = folders["adapted"]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    killed = tmp_path / "killed"
    two = [f"output_dir={killed}", halved(ADAPTED)]
    command = accelerate("launch.py", folder / "run.yaml", *two)
    kill_when(command, lambda: any(killed.glob("checkpoints/main/01-*/*/SEALED")))
    assert not (killed / "metrics.json").exists()
    run([*command, "--resume"])
    assert same_weights(folder / "two", killed)
    assert losses(folder / "two") == losses(killed)
    assert metrics(folder / "two")["eval"] == metrics(killed)["eval"]
