"""Runs on stored features: where they end, what they share, and what they compute anew."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import hfft
from hfft.examples import ExampleDataset
from hfft.features import prepare
from hfft.registry import get

from .feature_runs import FLIPPED, SGD, both, config_of, furthest, reused, stages, stored, train
from .runs import log, metrics, same_weights, weights
from .test_run import kill

slow = pytest.mark.slow
THAWED = [
    {"name": "head", "freeze": "backbone", "epochs": 1},
    {"name": "all", "freeze": "none", "epochs": 1},
    {"name": "again", "freeze": "backbone", "epochs": 1},
    {"name": "top", "freeze": 2, "epochs": 1},
]
PENALTIES = [{"kind": "l2_sp", "strength": 0.1}, {"kind": "bss", "strength": 0.01}]
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # so that the best epoch is not the last
}
TOP_BLOCK = ["layers.2.attention.q_proj", "layers.2.mlp.fc1"]
LORA = {"name": "lora", "r": 2, "epochs": 2, "learning_rate": 1e-2, "target_modules": TOP_BLOCK}


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """Between stages the garbage is collected: spare it all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get("image-classification"), "draw", lambda *_: None)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen": ("vit", {"strategy": {"name": "frozen", "epochs": 2}}),
    "gradual": ("vit", {"strategy": {"name": "gradual", "epochs": 4}, "schedule": "run"}),
    "lp_ft": ("vit", {"strategy": {"name": "lp_ft", "epochs": 2}}),
    "thawed and frozen again": ("vit", {"stages": THAWED}),
    "patterns": (
        "vit",
        {"stages": [{"name": "a", "freeze": ["*embeddings*", "*layers.0.*"], "epochs": 1}]},
    ),
    "patterns above what learns too": (
        "vit",
        {"stages": [{"name": "a", "freeze": ["*embeddings*", "classifier*"], "epochs": 1}]},
    ),
    "penalties": ("vit", {"stages": stages(penalty=PENALTIES)}),
    "mixout": ("vit", {"stages": stages(mixout=0.5)}),
    "fresh optimizer": ("vit", {"stages": stages(carry_optimizer_state=False), "schedule": "run"}),
    "checkpointing": ("vit", {"training": {"gradient_checkpointing": True}}),
    "accumulation": (
        "vit",
        {"training": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}},
    ),
    "best": ("vit", {"training": BEST}),
    "workers": ("vit", {"training": {"dataloader_num_workers": 2}}),
    "prefetching workers": (
        "vit",
        {"training": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2}},
    ),
    "smoothing": ("vit", {"training": {"label_smoothing_factor": 0.1}}),
    "one step": ("vit", {"training": {"max_steps": 1}}),
    "a batch of all": ("vit", {"training": {"per_device_train_batch_size": 100}}),
    "last batch dropped": (
        "vit",
        {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 5}},
    ),
    "no evaluation": ("vit", {"training": {"eval_strategy": "no"}}),
    "evaluation by steps": ("vit", {"training": {"eval_strategy": "steps", "eval_steps": 2}}),
    "lora": ("vit", {"strategy": LORA}),
    "merged lora": ("vit", {"strategy": {**LORA, "lora_dropout": 0.2, "merge": True}}),
    "resnet gradual": ("timm", {"strategy": {"name": "gradual", "epochs": 4}, "training": SGD}),
    "resnet thawed": ("timm", {"stages": THAWED, "training": SGD}),
    "resnet penalties": ("timm", {"stages": stages(penalty=PENALTIES), "training": SGD}),
    "stochnorm": ("timm", {"stages": stages(stochnorm=0.5), "training": SGD}),
    "resnet best": ("timm", {"training": {**SGD, **BEST}}),
}
QUICK = ("gradual", "resnet thawed", "prefetching workers", "smoothing", "lora")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else slow) for case in CASES]
)
def test_a_stored_run_ends_where_a_computed_one_does(
    case: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    """Bit for bit with a ViT; with a ResNet, whose convolutions round by memory layout, nearly."""
    kind, sections = CASES[case]
    source = request.getfixturevalue(f"{kind}_folder")
    data = {"path": str(image_folder), "validation": "validation", "test": "test"}
    one, other = both(tmp_path, source, image_folder, **{"data": data, **sections})
    assert any(stored(one))
    assert not any(stored(other))
    loss, weight = furthest(one, other)
    if kind == "vit":
        assert (loss, weight) == (0, 0)
        assert metrics(one)["test"] == metrics(other)["test"]
    else:
        assert loss < 1e-4
        assert weight < 1e-4
        assert metrics(one)["test"] == pytest.approx(metrics(other)["test"], abs=1e-3)


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_what_stays_frozen_is_the_sources_bit_for_bit(
    kind: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{kind}_folder")
    run = train(tmp_path / "run", source, image_folder, strategy={"name": "frozen", "epochs": 2})
    assert stored(run) == [True]
    before, after = load_file(source / "model.safetensors"), weights(run)
    moved = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
    assert moved
    assert {name.split(".")[-2] for name in moved} <= {"classifier", "fc"}


@pytest.mark.parametrize(
    ("kind", "penalty"), [("vit", "delta"), pytest.param("timm", "delta", marks=slow)]
)
def test_a_penalty_on_the_inputs_has_its_stage_computed(
    kind: str, penalty: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{kind}_folder")
    hold = {"kind": penalty, "strength": 0.01, "attention": "none"}
    run = train(tmp_path / "run", source, image_folder, stages=stages(penalty=hold))
    assert stored(run) == [True, False]


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_bf16_computes_what_is_stored_and_what_learns_alike_in_every_stage(
    kind: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{kind}_folder")
    training = {"bf16": True, **SGD}
    one, other = both(tmp_path, source, image_folder, training=training)
    assert stored(one) == [True, True]
    loss, weight = furthest(one, other)
    assert loss < 0.05
    assert weight < 0.1
    if kind == "vit":
        assert (loss, weight) == (0, 0)
        assert metrics(one)["eval"] == metrics(other)["eval"]


def test_an_adapter_is_scored_in_the_precision_it_trained_in(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    sections = {"strategy": LORA, "training": {"bf16": True}}
    one, other = both(tmp_path, vit_folder, image_folder, **sections)
    assert stored(one) == [True]
    assert metrics(one)["eval"] == metrics(other)["eval"]


def test_an_adapter_on_stored_features_is_merged_and_kept_apart(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    peft = pytest.importorskip("peft")
    run = train(tmp_path / "run", vit_folder, image_folder, strategy=LORA)
    assert stored(run) == [True]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    merged = AutoModelForImageClassification.from_pretrained(run / "model").eval()
    base = AutoModelForImageClassification.from_pretrained(
        vit_folder, num_labels=3, ignore_mismatched_sizes=True
    )
    apart = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    with torch.no_grad():
        assert apart(images).logits == pytest.approx(merged(images).logits, abs=1e-5)
    before = load_file(vit_folder / "model.safetensors")
    moved = {n for n, t in weights(run).items() if n not in before or not t.equal(before[n])}
    assert moved
    assert all("layer.2." in name or "classifier" in name for name in moved)


# What is shared


def test_trials_and_later_runs_reuse_what_is_there_and_decode_nothing(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the two examples that a model is cut with."""
    decoded: Counter[tuple[int, int]] = Counter()
    version, reports = ExampleDataset.version, list[bool]()

    def counted(self: ExampleDataset, index: int, number: int) -> dict[str, Any]:
        decoded[len(self), index] += 1
        return version(self, index, number)

    def noted(*args: Any) -> Any:
        found = prepare.prepare(*args)
        assert found.report is not None
        reports.append(found.report["reused"])
        return found

    monkeypatch.setattr(ExampleDataset, "version", counted)
    monkeypatch.setattr("hfft.stage_data.prepare", noted)
    first = train(tmp_path / "first", vit_folder, image_folder, baselines=["frozen"])
    assert reused(first) == [False, True]
    assert reports == [False, True, True]  # the baseline has the features of the first stage
    for report in (stage["feature_cache"] for stage in metrics(first)["stages"]):
        assert report["bytes"] > 0
        assert report["seconds"] >= 0
    assert set(decoded) == {(18, n) for n in range(18)} | {(9, n) for n in range(9)}
    decoded.clear()
    training = {"learning_rate": 1e-2, "per_device_train_batch_size": 4}
    again = train(tmp_path / "again", vit_folder, image_folder, training=training, seed=5)
    assert reused(again) == [True, True]
    assert set(decoded) == {(18, 0), (18, 1), (9, 0), (9, 1)}  # what keys are made of
    assert not same_weights(first, again)


@pytest.mark.parametrize(
    "change", ["pixels", pytest.param("time", marks=slow), "image_size", "weights"]
)
def test_other_images_sizes_or_weights_have_features_of_their_own(
    change: str, tmp_path: Path, timm_folder: Path, image_folder: Path
) -> None:
    images, model = tmp_path / "images", tmp_path / "model"
    shutil.copytree(image_folder, images)
    shutil.copytree(timm_folder, model)
    only = {"strategy": "frozen", "training": {"max_steps": 1}}
    first = train(tmp_path / "first", model, images, **only)
    task: dict[str, Any] = {}
    picture = images / "train" / "2" / "3.png"
    if change == "pixels":
        made = picture.stat()
        Image.open(picture).rotate(90).save(picture)
        os.utime(picture, (made.st_atime, made.st_mtime))
    elif change == "time":
        os.utime(picture, (0, 0))
    elif change == "image_size":
        task = {"task": {"name": "image-classification", "augmentation": "none", "image_size": 48}}
    else:
        tensors = load_file(model / "model.safetensors")
        name = next(n for n in tensors if "conv1" in n and n.endswith("weight"))
        tensors[name] += 1e-3
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert reused(first) == [False]
    assert reused(train(tmp_path / "second", model, images, **only, **task)) == [False]
    assert reused(train(tmp_path / "third", model, images, **only, **task)) == [True]


# Fixed views of augmented images


@pytest.mark.parametrize(
    ("views", "kind"),
    [
        (2, "vit"),
        pytest.param(1, "vit", marks=slow),
        pytest.param(1, "timm", marks=slow),
        pytest.param(3, "timm", marks=slow),
    ],
)
def test_stored_views_are_those_that_are_computed(
    views: int, kind: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{kind}_folder")
    one, other = both(
        tmp_path,
        source,
        image_folder,
        on={"mode": "on", "views": views},
        off={"mode": "off", "views": views},
        task=FLIPPED,
        training={} if kind == "vit" else SGD,
    )
    assert stored(one) == [True, True]
    loss, weight = furthest(one, other)
    assert (loss, weight) == (0, 0) if kind == "vit" else max(loss, weight) < 1e-4
    drawn = {row["loss"] for row in log(one) if "loss" in row}
    assert len(drawn) > 3


def test_without_views_augmented_images_are_computed_and_validation_is_stored(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    one, other = both(tmp_path, vit_folder, image_folder, task=FLIPPED)
    assert stored(one) == [True, True]
    assert furthest(one, other) == (0, 0)
    assert metrics(one)["eval"] == metrics(other)["eval"]


def test_half_precision_on_disk_ends_nearby(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    whole = train(tmp_path / "whole", vit_folder, image_folder)
    sizes = [sum(stage["feature_cache"]["bytes"] for stage in metrics(whole)["stages"])]
    for dtype, loss_apart, weight_apart in (("float16", 1e-4, 1e-3), ("bfloat16", 1e-3, 5e-3)):
        cache = {"mode": "on", "dtype": dtype}
        run = train(tmp_path / dtype, vit_folder, image_folder, cache)
        loss, weight = furthest(whole, run)
        assert 0 < loss < loss_apart
        assert weight < weight_apart
        sizes.append(sum(stage["feature_cache"]["bytes"] for stage in metrics(run)["stages"]))
    assert max(sizes[1:]) < 0.6 * sizes[0]


# Killed and resumed


@pytest.mark.parametrize(
    ("steps_survived", "cache", "task"),
    [
        (5, "on", None),
        pytest.param(2, "on", None, marks=slow),
        pytest.param(8, "on", None, marks=slow),
        pytest.param(5, {"mode": "on", "views": 2}, FLIPPED, marks=slow),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    steps_survived: int,
    cache: Any,
    task: Any,
    tmp_path: Path,
    vit_folder: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections: dict[str, Any] = {"training": {"save_strategy": "steps", "save_steps": 1, **BEST}}
    sections["training"] |= {"eval_strategy": "steps", "eval_steps": 1}
    sections |= {} if task is None else {"task": task}
    config = config_of(tmp_path / "run", vit_folder, image_folder, cache, **sections)
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > steps_survived)
    newest = max((tmp_path / "run" / "checkpoints").rglob("checkpoint-*/model.safetensors"))
    learning = load_file(newest)
    assert learning
    if steps_survived < 3:
        assert all(name.startswith("classifier") for name in learning)
    assert not any("embeddings" in name or "layers.0." in name for name in learning)
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert furthest(tmp_path / "whole", tmp_path / "run") == (0, 0)
    assert metrics(tmp_path / "whole")["eval"] == metrics(tmp_path / "run")["eval"]
