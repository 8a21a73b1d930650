"""Whole runs of two towers of which one is locked, on stored features and on computed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import hfft
from hfft.config_file import load_config
from hfft.examples import ExampleDataset
from hfft.inference import evaluate, open_finished
from hfft.plan import make_plan
from tests import pair_models
from tests.feature_runs import furthest, reused, stored
from tests.runs import losses, metrics, same_weights, weights
from tests.test_processes import ROOT, accelerate
from tests.test_processes import run as launched
from tests.test_run import kill

slow = pytest.mark.slow
SGD = {"optim": "sgd", "learning_rate": 0.05, "use_cpu": True, "logging_steps": 1}
"""Adam makes steps of the rounding of gradients that are zero."""
COLOURS = ["a photo of a {} square.", "the {} square"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `pairs` of which each picture has two captions, and `classes`, in a folder."""
    folder = tmp_path_factory.mktemp("pairs")
    for make in (pair_models.clip, pair_models.siglip, pair_models.dual):
        pair_models.save(make(), folder / make.__name__)
    pair_models.save(hf.ViTModel(hf.ViTConfig(**pair_models.VISION)), folder / "vit")
    pair_models.save(hf.BertModel(hf.BertConfig(**pair_models.TEXT)), folder / "bert")
    pair_models.write_pairs(folder / "pairs", several=True)
    pair_models.write_classes(folder / "classes")
    return folder


def source(place: Path, model: str) -> Any:
    if model != "towers":
        return str(place / model)
    towers = {"image": str(place / "vit"), "text": str(place / "bert")}
    return {"towers": towers, "projection": 16}


def config_of(
    folder: Path,
    place: Path,
    model: str,
    cache: Any,
    *,
    task: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    chunk: int | None = None,
    **stage: Any,
) -> Path:
    """Write the config of a run of one stage into a folder; data with templates are classes."""
    loss = {"loss": "sigmoid"} if model == "siglip" else {}
    name, task = "zero-shot-image-classification", task or {}
    contrastive = {"global_batch": 6} if chunk is None else {"global_batch": 6, "chunk": chunk}
    folder.mkdir(parents=True, exist_ok=True)
    data = place / ("classes" if "templates" in task else "pairs")
    return pair_models.write_config(
        folder / "c.yaml",
        source(place, model),
        data,
        data={"path": str(data), "validation": "validation"},
        task={"name": name, "augmentation": "none", **loss, **task},
        stages=[{"name": "main", "epochs": 2, "contrastive": contrastive, **stage}],
        training={**SGD, **(training or {})},
        feature_cache=cache,
    )


def locked(tower: str) -> dict[str, Any]:
    return {"towers": {tower: {"freeze": "backbone"}}}


def both(folder: Path, *given: Any, **fields: Any) -> list[Path]:
    """Train with stored features and without; return the runs."""
    for name, cache in (("stored", "on"), ("computed", "off")):
        hfft.train(config_of(folder / name, *given, cache, **fields))
    return [folder / name / "run" for name in ("stored", "computed")]


def assert_alike(one: Path, other: Path) -> None:
    assert stored(one) == [True]
    assert stored(other) == [False]
    loss, weight = furthest(one, other)
    assert loss < 1e-5
    assert weight < 1e-5
    assert metrics(one)["eval"] == pytest.approx(metrics(other)["eval"], abs=1e-5)


MODELS = ("clip", "siglip", "dual", "towers")
QUICK = [("clip", "vision", 3)]


@pytest.mark.parametrize(
    ("model", "tower", "chunk"),
    [
        pytest.param(model, tower, chunk, marks=() if (model, tower, chunk) in QUICK else slow)
        for model in MODELS
        for tower in ("vision", "text")
        for chunk in (None, 3)
    ],
)
def test_a_run_on_a_stored_tower_ends_where_a_computed_one_does(
    model: str, tower: str, chunk: int | None, tmp_path: Path, place: Path
) -> None:
    one, other = both(tmp_path, place, model, chunk=chunk, **locked(tower))
    assert_alike(one, other)
    assert len(losses(one)) == 12
    again = evaluate(open_finished(str(one)), None, None)
    assert again["metrics"] == pytest.approx(metrics(one)["eval"], abs=1e-5)
    if model != "towers":  # what is locked is in the model folder, as it was
        given = load_file(place / model / "model.safetensors")
        own = [name for name in given if name.startswith(f"{tower}_model.")]
        assert own
        assert all(torch.equal(weights(one)[name], given[name]) for name in own)


@pytest.mark.parametrize("model", ["clip", *(pytest.param(m, marks=slow) for m in MODELS[1:])])
def test_classes_are_embedded_by_a_text_tower_whose_output_is_stored(
    model: str, tmp_path: Path, place: Path
) -> None:
    one, other = both(tmp_path, place, model, task={"templates": COLOURS[:1]}, **locked("text"))
    assert_alike(one, other)
    assert "zero_shot_accuracy" in metrics(one)["eval"]


@slow
@pytest.mark.parametrize("model", ["clip", "towers"])
def test_a_tower_is_stored_with_its_projection_where_that_is_frozen_too(
    model: str, tmp_path: Path, place: Path
) -> None:
    patterns = ["vision_model.*", "visual_projection.*"]
    assert_alike(*both(tmp_path / "run", place, model, freeze=patterns))
    config = config_of(tmp_path / "plan", place, model, "on", freeze=patterns)
    assert reason(config).startswith("stored behind visual_projection, train, validation: 64 bytes")


@slow
@pytest.mark.parametrize("model", ["clip", "siglip", "towers"])
def test_towers_frozen_up_to_blocks_of_theirs_are_stored_up_to_these(
    model: str, tmp_path: Path, place: Path
) -> None:
    towers = {"vision": {"freeze": 2}, "text": {"freeze": 1}}
    assert_alike(*both(tmp_path, place, model, towers=towers))


def test_images_of_a_locked_tower_are_opened_once_for_all_captions_and_epochs(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, version = [], ExampleDataset.version

    def note(self: ExampleDataset, index: int, number: int) -> Any:
        found = version(self, index, number)
        if "pixel_values" in found:
            opened.append((len(self), index))
        return found

    monkeypatch.setattr(ExampleDataset, "version", note)
    training = {"dataloader_num_workers": 0}  # so that all is seen from here
    hfft.train(config_of(tmp_path, place, "clip", "on", training=training, **locked("vision")))
    images, pairs = 18, 36
    looked_at = 16  # of pairs, to see how they are made
    assert {size for size, index in opened if index >= looked_at} == {images}
    every = sorted(index for size, index in opened if size == images and index > 1)
    assert every == sorted([*range(2, images)] * 2)  # of train, and of validation
    assert (pairs, 0) in opened


def reason(config: Path) -> str:
    return make_plan(load_config(config)).main.stages[0].features.reason


def test_what_is_drawn_at_random_keeps_its_own_tower_from_being_stored_and_no_other(
    tmp_path: Path, place: Path
) -> None:
    prompts, flips = {"templates": COLOURS}, {"augmentation": {"horizontal_flip": 0.5}}

    def planned(tower: str, task: dict[str, Any]) -> str:
        return reason(config_of(tmp_path, place, "clip", "on", task=task, **locked(tower)))

    assert "stored before text_projection, validation:" in planned("text", prompts)
    assert "stored before visual_projection, train, validation:" in planned("vision", prompts)
    assert "stored before visual_projection, validation:" in planned("vision", flips)
    assert "stored before text_projection, train, validation:" in planned("text", flips)


@slow
@pytest.mark.parametrize(
    ("tower", "task"),
    [
        ("vision", {"templates": COLOURS}),
        ("text", {"augmentation": {"horizontal_flip": 0.5}}),
    ],
)
def test_the_other_towers_half_is_drawn_as_if_nothing_were_stored(
    tower: str, task: dict[str, Any], tmp_path: Path, place: Path
) -> None:
    assert_alike(*both(tmp_path, place, "clip", task=task, **locked(tower)))


def test_the_plan_says_what_is_stored_of_which_tower_and_that_it_pays(
    tmp_path: Path, place: Path
) -> None:
    images = reason(config_of(tmp_path, place, "clip", "auto", **locked("vision")))
    assert images == (
        "stored before visual_projection, train, validation: 64 bytes an example, 2.3 kB in all; "
        "one pass instead of 5"
    )


@slow
@pytest.mark.parametrize("chunk", [None, 3])
def test_in_bf16_a_tower_is_stored_as_it_would_be_computed(
    chunk: int | None, tmp_path: Path, place: Path
) -> None:
    fields = {**locked("text"), "task": {"templates": COLOURS[:1]}, "chunk": chunk}
    one, other = both(tmp_path, place, "clip", training={"bf16": True}, **fields)
    assert (stored(one), stored(other)) == ([True], [False])
    loss, weight = furthest(one, other)
    assert loss < 0.05
    assert weight < 0.05


@slow
def test_a_run_on_a_stored_tower_resumes_where_it_was_killed(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    fields = {**locked("vision"), "task": {"templates": COLOURS}, "chunk": 3, "training": saved}
    whole, killed = (config_of(tmp_path / n, place, "clip", "on", **fields) for n in ("a", "b"))
    hfft.train(whole)
    kill(killed, monkeypatch, lambda trainer: trainer.state.global_step == 5)
    hfft.train(killed, resume=True)
    assert reused(tmp_path / "b" / "run") == [True]
    assert same_weights(tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert furthest(tmp_path / "a" / "run", tmp_path / "b" / "run") == (0, 0)


@slow
def test_two_processes_on_a_stored_tower_end_where_one_does_that_computes_it(
    tmp_path: Path, place: Path
) -> None:
    fields = {**locked("vision"), "task": {"templates": COLOURS}, "chunk": 3}
    hfft.train(config_of(tmp_path / "one", place, "clip", "off", **fields))
    two = config_of(tmp_path / "two", place, "clip", "on", **fields)
    launched(accelerate(ROOT / "tests" / "hashed_launch.py", tmp_path, two))
    ranks = [(tmp_path / f"rank{rank}.jsonl").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert all(json.loads(line)["world"] == 2 for line in ranks[0].splitlines())
    assert_alike(tmp_path / "two" / "run", tmp_path / "one" / "run")
