"""Contrastive runs as users start them: on one process against two, killed, evaluated, asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfft
from hfft.inference import evaluate, open_finished, predict

from .pair_models import (
    COLOURS,
    PLACES,
    clip,
    dual,
    picture,
    save,
    siglip,
    write_classes,
    write_config,
    write_pairs,
)
from .runs import largest_difference, losses, metrics, same_weights
from .test_processes import accelerate, kill_when, run, train_on_two

pytestmark = pytest.mark.slow

SGD = {
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "use_cpu": True,
}
"""Adam would make steps of the rounding of zero gradients."""
TASK = {"name": "zero-shot-image-classification", "augmentation": "none"}


def whole(chunk: int | None = None) -> dict[str, Any]:
    return {"name": "full", "epochs": 2, "contrastive": {"global_batch": 6, "chunk": chunk}}


def several(folder: Path) -> Path:
    return write_pairs(folder, several=True)


RUNS: dict[str, tuple[Callable[[], Any], Callable[[Path], Path], dict[str, Any]]] = {
    "clip": (clip, several, {"strategy": whole()}),
    "clip in pieces": (clip, several, {"strategy": whole(1)}),
    "siglip in pieces": (
        siglip,
        write_pairs,
        {"strategy": whole(3), "task": {**TASK, "loss": "sigmoid"}},
    ),
    "classes": (
        dual,
        write_classes,
        {
            "strategy": whole(),
            "task": {**TASK, "templates": ["a {} square.", "a photo of the {} square."]},
        },
    ),
    "locked image": (
        clip,
        write_pairs,
        {
            "strategy": None,
            "stages": [
                {
                    "name": "text",
                    "epochs": 1,
                    "contrastive": {"global_batch": 6},
                    "towers": {"vision": {"freeze": "backbone"}},
                },
                {"name": "whole", "epochs": 1, "contrastive": {"global_batch": 6, "chunk": 3}},
            ],
        },
    ),
}


def split_data(folder: Path) -> dict[str, str]:
    return {"path": str(folder / "pairs"), "validation": "validation"}


def write_run(folder: Path, name: str) -> Path:
    """Write a run's model, data and config; what it is trained by is the same on two processes."""
    make, data, sections = RUNS[name]
    torch.manual_seed(0)  # `make` draws too
    training = {**SGD, "per_device_eval_batch_size": 5, "save_strategy": "steps", "save_steps": 2}
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(
        folder / "run.yaml",
        save(make(), folder / "model"),
        data(folder / "pairs"),
        **{"data": split_data(folder), "task": TASK, "training": training, **sections},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each run, of which one launch has made `two`, on two processes."""
    found = {name: tmp_path_factory.mktemp("run") for name in RUNS}
    configs = {name: write_run(folder, name) for name, folder in found.items()}
    commands = [[str(c), f"output_dir={c.parent / 'two'}"] for c in configs.values()]
    train_on_two(commands, tmp_path_factory.mktemp("todo"))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name]
    hfft.train(folder / "run.yaml")
    one, two = folder / "run", folder / "two"
    assert json.loads((two / "environment.json").read_text())["num_processes"] == 2
    first, second = losses(one), losses(two)
    assert [entry[:3] for entry in first] == [entry[:3] for entry in second]
    assert [e[3] for e in first] == pytest.approx([e[3] for e in second], abs=1e-5)
    assert largest_difference(one, two) < 1e-5
    assert metrics(two)["eval"] == pytest.approx(metrics(one)["eval"], rel=1e-4, abs=1e-5)


def test_pieces_and_the_whole_batch_end_at_the_same_weights(folders: dict[str, Path]) -> None:
    pieces, all_at_once = (folders[name] / "two" for name in ("clip in pieces", "clip"))
    assert largest_difference(pieces, all_at_once) < 1e-5
    assert losses(pieces)[0][3] != losses(pieces)[-1][3]


def test_two_killed_processes_go_on(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = folders["locked image"]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    killed = tmp_path / "killed"
    command = accelerate("launch.py", folder / "run.yaml", f"output_dir={killed}")
    kill_when(command, lambda: any(killed.glob("checkpoints/main/01-*/*/SEALED")))
    assert not (killed / "metrics.json").exists()
    run([*command, "--resume"])
    assert same_weights(folder / "two", killed)
    assert losses(folder / "two") == losses(killed)
    assert metrics(folder / "two")["eval"] == metrics(killed)["eval"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of which what they learned is asked: with captions, and with classes."""
    found = {}
    for name, data, task in (
        ("captions", write_pairs, TASK),
        ("classes", write_classes, {**TASK, "templates": ["a {} square.", "the {} square."]}),
    ):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)  # `clip` draws too
        hfft.train(
            write_config(
                folder / "run.yaml",
                save(clip(), folder / "model"),
                data(folder / "pairs"),
                data=split_data(folder),
                task=task,
                strategy={"name": "full", "epochs": 30, "contrastive": {"global_batch": 9}},
                training={"learning_rate": 3e-3, "use_cpu": True},
            )
        )
        found[name] = folder
    return found


def test_pairs_are_learned(learned: dict[str, Path]) -> None:
    found = metrics(learned["captions"] / "run")["eval"]
    assert found["recall_at_1"] > 0.4  # by chance: one in eighteen
    assert found["image_to_text_recall_at_10"] >= found["image_to_text_recall_at_5"] > 0.9
    assert found["text_to_image_median_rank"] <= 1.5


def test_a_run_is_evaluated_as_it_was_scored(learned: dict[str, Path]) -> None:
    for folder in learned.values():
        found = evaluate(open_finished(folder / "run"), None, None)
        assert found["metrics"] == pytest.approx(metrics(folder / "run")["eval"], abs=1e-6)


def test_classes_are_learned_by_their_names(learned: dict[str, Path]) -> None:
    folder = learned["classes"]
    assert metrics(folder / "run")["eval"]["zero_shot_accuracy"] > 0.9
    assert (folder / "run" / "confusion_matrix.png").exists()
    said = list(predict(open_finished(folder / "run"), [str(folder / "pairs" / "train" / "red")]))
    assert len(said) == 3
    for one in said:
        assert next(s["label"] for s in one["scores"]) == "red"
        assert sum(s["score"] for s in one["scores"]) == pytest.approx(1)
        assert {s["label"] for s in one["scores"]} == {*COLOURS}


def test_a_model_is_scored_on_classes_that_it_was_not_trained_for(
    learned: dict[str, Path], tmp_path: Path
) -> None:
    for colour in ("red", "blue"):
        for place in PLACES:
            picture(colour, place, tmp_path / f"square is on the {place}" / f"{colour}.png")
    finished = open_finished(learned["classes"] / "run")
    found = evaluate(finished, str(tmp_path), None)
    assert found["examples"] == 6
    assert [one["label"] for one in found["per_class"]] == [
        f"square is on the {place}" for place in sorted(PLACES)
    ]
    assert 0 <= found["metrics"]["zero_shot_accuracy"] <= 1
    known = evaluate(finished, str(learned["classes"] / "pairs" / "train"), None)
    assert [one["label"] for one in known["per_class"]] == sorted(COLOURS)
    assert known["metrics"]["zero_shot_accuracy"] > 0.9


def test_a_model_is_scored_by_captions_or_by_classes_as_is_asked(learned: dict[str, Path]) -> None:
    captions, classes = (learned[name] / "run" for name in ("captions", "classes"))
    pictures = str(learned["classes"] / "pairs")
    for path in (captions, captions / "model", learned["captions"] / "model"):
        finished = open_finished(path, ['task.templates=["a {} square."]'])
        found = evaluate(finished, pictures, "validation")["metrics"]
        assert found["zero_shot_accuracy"] > (0.5 if "run" in str(path.parent) else 0.0)
    for path in (classes, classes / "model"):
        finished = open_finished(path, ["task.templates=null"])
        found = evaluate(finished, str(learned["captions"] / "pairs"), "validation")["metrics"]
        assert "zero_shot_accuracy" not in found
        assert found["image_to_text_recall_at_10"] > 0.5
    with pytest.raises(hfft.InputError, match=r"data\.path=x: of a model without its run only"):
        open_finished(classes / "model", ["data.path=x"])
    with pytest.raises(hfft.InputError, match=r"task\.template: unknown key"):
        open_finished(classes / "model", ["task.template=null"])


def test_records_name_the_candidates_of_their_own(learned: dict[str, Path], tmp_path: Path) -> None:
    name = picture("blue", "left", tmp_path / "one.png")
    asked = ["the green square is on the left", "the blue square is on the left"]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"image": name, "candidates": asked}))
    finished = open_finished(learned["captions"] / "run")
    [said] = predict(finished, [str(tmp_path / "asked.jsonl")])
    assert [one["label"] for one in said["scores"]] == asked[::-1]
    with pytest.raises(hfft.InputError, match="has no classes of its own"):
        list(predict(finished, [str(tmp_path / "one.png")]))
