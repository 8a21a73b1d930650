"""Runs of image classification that start from what a CLIP's text tower makes of the classes."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hfft
from hfft.config_file import load_config
from hfft.inference import evaluate, open_finished, predict
from hfft.plan import make_plan

from . import pair_models
from .runs import largest_difference, metrics, same_weights, weights
from .test_processes import train_on_two
from .test_retention import zero_shot_accuracy
from .test_run import kill

TEMPLATE = "a photo of a {} ."
TASK = {
    "name": "image-classification",
    "head": "zero-shot",
    "templates": [TEMPLATE],
    "augmentation": "none",
}
TRAINING = {
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 6,
    "per_device_eval_batch_size": 7,
    "logging_steps": 1,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_models.write_classes(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_models.save(pair_models.clip(), tmp_path_factory.mktemp("clip"))


def config_of(folder: Path, clip: Path, colours: Path, **sections: Any) -> Path:
    sections = {
        "task": TASK,
        "data": {"path": str(colours), "validation": "validation"},
        **sections,
        "training": TRAINING | sections.get("training", {}),
    }
    folder.mkdir(exist_ok=True)
    path = pair_models.write_config(folder / "run.yaml", clip, colours, **sections)
    if "stages" in sections:
        text = path.read_text().replace("strategy: full\n", "")
        path.write_text(text)
    return path


def test_a_run_that_learns_nothing_scores_as_the_source_does_zero_shot(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    training = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1}
    result = hfft.train(config_of(tmp_path, clip, colours, training=training))
    model = hf.CLIPModel.from_pretrained(clip)
    expected = zero_shot_accuracy(model, colours / "validation", sorted(pair_models.COLOURS))
    assert result.metrics["eval"]["accuracy"] == pytest.approx(expected)


def test_its_model_is_evaluated_and_predicts(tmp_path: Path, clip: Path, colours: Path) -> None:
    result = hfft.train(config_of(tmp_path, clip, colours, training={"learning_rate": 1e-2}))
    for path in (tmp_path / "run", result.model_dir):
        found = evaluate(open_finished(path), str(colours), "validation")
        assert found["metrics"] == pytest.approx(result.metrics["eval"])
    picture = str(colours / "validation" / "red" / "left.png")
    [answer] = predict(open_finished(tmp_path / "run"), [picture])
    assert {one["label"] for one in answer["scores"]} <= set(pair_models.COLOURS)
    run = hf.pipeline("image-classification", model=str(result.model_dir), trust_remote_code=True)
    assert run(picture)[0]["score"] == pytest.approx(answer["scores"][0]["score"], abs=1e-5)


@pytest.mark.slow
def test_lp_ft_trains_the_head_and_then_everything(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    config = config_of(tmp_path, clip, colours, strategy="lp_ft")
    plan = make_plan(load_config(config))
    head, whole = plan.main.stages
    assert {n for n in plan.subject.sizes if n not in head.frozen} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert not whole.frozen
    hfft.train(config)
    final, pair = weights(tmp_path / "run"), hf.CLIPModel.from_pretrained(clip).state_dict()
    for name, tensor in pair.items():
        if name.startswith("vision_model.") and "position_ids" not in name:
            assert not torch.equal(final[f"image_encoder.{name}"], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["frozen", "lp_ft"])
def test_stored_features_change_nothing(
    strategy: str, tmp_path: Path, clip: Path, colours: Path
) -> None:
    config = config_of(tmp_path, clip, colours, strategy=strategy)
    hfft.train(config, ["feature_cache=off"])
    stored = hfft.train(config, ["feature_cache=on", f"output_dir={tmp_path / 'stored'}"])
    assert stored.stages[0]["feature_cache"]["bytes"] > 0
    assert largest_difference(tmp_path / "run", tmp_path / "stored") < 1e-6


def test_a_penalty_covers_the_head_which_is_in_the_source(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    strategy = {"name": "full", "penalty": {"kind": "l2_sp", "strength": 1.0}}
    plan = make_plan(load_config(config_of(tmp_path, clip, colours, strategy=strategy)))
    assert not plan.subject.new
    [held] = plan.main.stages[0].penalties
    assert {"classifier.weight", "classifier.bias"} <= held.coverage.to_source.keys()
    assert not held.coverage.to_zero


@pytest.mark.slow
def test_a_penalty_holds_the_head_near_the_text_towers(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    config = config_of(
        tmp_path,
        clip,
        colours,
        training={"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0},
    )
    hfft.train(config, ["training.max_steps=1", "training.learning_rate=0.0"])
    source, far = weights(tmp_path / "run")["classifier.weight"], []
    for strength in (0.0, 10.0):
        penalty = f"{{kind: l2_sp, strength: {strength}}}"
        hfft.train(config, [f"strategy={{name: frozen, penalty: {penalty}}}"], overwrite=True)
        far.append((weights(tmp_path / "run")["classifier.weight"] - source).norm().item())
    assert 0 < far[1] < far[0] * 2 / 3


@pytest.mark.slow
def test_a_run_killed_and_resumed_equals_the_uninterrupted(
    tmp_path: Path, clip: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights, here of the head, are not kept: the head is made again."""
    stages = [{"name": "body", "freeze": ["classifier"], "epochs": 2}]
    saved = {"save_strategy": "steps", "save_steps": 1}
    config = config_of(tmp_path, clip, colours, stages=stages, training=saved)
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > 3)
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_stage_that_trains_the_pair_hands_on_the_head_it_makes(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    pairs = pair_models.write_pairs(tmp_path / "pairs")
    stages = [
        {
            "name": "pair",
            "task": {"name": "zero-shot-image-classification", "augmentation": "none"},
            "data": {"path": str(pairs), "validation": "validation"},
            "learning_rate": 1e-2,
            "epochs": 1,
        },
        {"name": "classes", "learning_rate": 0.0, "weight_decay": 0.0, "epochs": 1},
    ]
    config = config_of(tmp_path, clip, colours, stages=stages)
    result = hfft.train(config)
    fresh = hfft.train(config_of(tmp_path / "fresh", clip, colours, training={"max_steps": 1}))
    tuned, untuned = (weights(one.model_dir.parent) for one in (result, fresh))
    assert (tuned["classifier.weight"] - untuned["classifier.weight"]).abs().max() > 1e-2


@pytest.mark.slow
def test_what_was_forgotten_of_other_classes_is_scored_by_the_same_head(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    places = tmp_path / "places"
    for colour in pair_models.COLOURS:
        for place in pair_models.PLACES:
            pair_models.picture(colour, place, places / place / f"{colour}.png")
    retention = {"task": {**TASK, "templates": ["on the {}"]}, "data": {"path": str(places)}}
    result = hfft.train(config_of(tmp_path, clip, colours, retention=retention))
    found = result.metrics["retention"]
    assert found["metric"] == "accuracy"
    assert found["before"]["loss"] != found["after"]["loss"]


@pytest.mark.slow
def test_weights_between_the_zero_shot_and_the_fine_tuned_model_have_a_head_between_theirs(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    zero_shot = {"name": "zero-shot-image-classification", "templates": [TEMPLATE]}
    config = config_of(
        tmp_path,
        clip,
        colours,
        average={"kind": "wise_ft", "alphas": [0.0, 1.0]},
        retention={"task": zero_shot, "data": {"path": str(colours)}},
        training={"learning_rate": 1e-2},
    )
    found = hfft.train(config).metrics
    source, tuned = found["average"]["candidates"]
    before = found["retention"]["before"]["zero_shot_accuracy"]
    assert source["eval"]["accuracy"] == source["held_back"] == pytest.approx(before)
    assert source["eval"]["loss"] != tuned["eval"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [pair_models.clip, pair_models.siglip])
def test_a_new_head_is_transformers_own(make: Any, tmp_path: Path, colours: Path) -> None:
    source = pair_models.save(make(), tmp_path / "model")
    task = {"name": "image-classification", "augmentation": "none"}
    result = hfft.train(config_of(tmp_path, source, colours, task=task))
    model = hf.AutoModelForImageClassification.from_pretrained(result.model_dir)
    assert type(model) in (hf.CLIPForImageClassification, hf.SiglipForImageClassification)
    assert "classifier.weight" in make_plan(load_config(tmp_path / "run/config.yaml")).subject.new


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"templates": ["a photo"]}, r"task.templates: .*must have one \{\}"),
        ({"head": "zero shot"}, r"task.head: .*zero-shot"),
        ({"head": "new"}, r"templates go with head: zero-shot"),
    ],
)
def test_what_is_wrong_with_the_head_is_named(
    task: dict[str, Any], said: str, tmp_path: Path, clip: Path, colours: Path
) -> None:
    with pytest.raises(hfft.InputError, match=said):
        load_config(config_of(tmp_path, clip, colours, task={**TASK, **task}))


def test_another_image_size_than_the_towers_is_refused_as_such(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    config = load_config(config_of(tmp_path, clip, colours, task={**TASK, "image_size": 32}))
    with pytest.raises(hfft.InputError, match=r"position_embedding\.weight.*was the image size"):
        make_plan(config)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, clip: Path, colours: Path) -> None:
    sgd = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    config = config_of(tmp_path, clip, colours, strategy="lp_ft", training=sgd)
    half = ["training.per_device_train_batch_size=3", f"output_dir={tmp_path / 'two'}"]
    train_on_two([[str(config), *half]], tmp_path)
    hfft.train(config)
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["num_processes"] == 2
    assert largest_difference(tmp_path / "run", tmp_path / "two") < 1e-5
    one, two = (metrics(tmp_path / name)["eval"] for name in ("run", "two"))
    assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
