"""Runs whose stages train adapters: what they leave behind, and how they go on."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

import hfft
from hfft.cli import main
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.plan import make_plan
from hfft.report import plan_report
from hfft.trainer import StageTrainer
from hfft.trial import TrialRun

from .runs import log, losses, metrics, same_weights, weights, write_config
from .test_run import kill

LORA = {"name": "lora", "r": 2, "lora_alpha": 8, "learning_rate": 1e-2, "epochs": 1}
MERGED = {"r": 2, "merge": True}
STEPS = {"save_strategy": "steps", "save_steps": 2}


def make(folder: Path, model: Path, images: Path, **sections: Any) -> Path:
    data = {"path": str(images), "validation": "validation", "test": "test"}
    return write_config(
        folder / "c.yaml", model, images, **{"strategy": LORA, "data": data, **sections}
    )


def stage(name: str, freeze: str = "backbone", **fields: Any) -> dict[str, Any]:
    return {"name": name, "freeze": freeze, "epochs": 1, **fields}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_model_folder_loads_anywhere_with_labels_and_the_runs_own_scores(
    folder: str,
    merged: bool,
    tmp_path: Path,
    image_folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = request.getfixturevalue(folder)
    in_memory: list[Any] = []
    score = TrialRun._score

    def note(self: Any, trainer: Any, model: Any) -> Any:
        in_memory.append(model)
        return score(self, trainer, model)

    monkeypatch.setattr(TrialRun, "_score", note)
    config = make(tmp_path, source, image_folder, strategy={**LORA, "merge": merged})
    result = hfft.train(config)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(images).logits
        return found

    expected = logits(in_memory[0])
    loaded = AutoModelForImageClassification.from_pretrained(result.model_dir)
    assert type(loaded) is type(in_memory[0])
    assert loaded.config.id2label == {0: "1", 1: "2", 2: "10"}
    assert logits(loaded) == pytest.approx(expected, abs=1e-6)
    answers = pipeline("image-classification", model=str(result.model_dir))(
        Image.open(image_folder / "test" / "1" / "0.png")
    )
    assert {answer["label"] for answer in answers} == {"1", "2", "10"}
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["metrics"]
    assert scores == pytest.approx(result.metrics["test"], abs=1e-5)
    assert (tmp_path / "run" / "adapter").exists() == (not merged)
    if not merged:
        base = AutoModelForImageClassification.from_pretrained(
            source, num_labels=3, ignore_mismatched_sizes=True
        )
        apart = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
        assert apart.peft_config["default"].base_model_name_or_path == str(source)
        assert logits(apart) == pytest.approx(expected, abs=1e-5)
    card = (result.model_dir / "README.md").read_text()
    assert "Stage lora trained LoRA (r: 2, lora_alpha: 8) on the frozen network" in card
    assert ("kept apart" in card) == (not merged)


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_weights_without_an_adapter_are_the_sources_bit_for_bit(
    folder: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    target = {"vit_folder": "q_proj", "timm_folder": "conv1"}[folder]
    strategy = {**LORA, "target_modules": [target]}
    hfft.train(make(tmp_path, source, image_folder, strategy=strategy))
    before, after = load_file(source / "model.safetensors"), weights(tmp_path / "run")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    names = {"vit_folder": ("query", "classifier"), "timm_folder": ("conv1", "fc")}[folder]
    assert moved
    assert all(any(name in path for name in names) for path in moved)


@pytest.mark.parametrize("steps_survived", [1, 4])
def test_resumed_run_equals_the_uninterrupted_one(
    steps_survived: int,
    tmp_path: Path,
    vit_folder: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after its first checkpoint, in an adapter's stage and in the one after it."""
    stages = [
        stage("adapter", lora={**MERGED, "lora_dropout": 0.1}),
        stage("more", lora={**MERGED, "bias": "lora_only"}),
    ]
    training = {"save_strategy": "steps", "save_steps": 1}
    config = make(tmp_path, vit_folder, image_folder, stages=stages, training=training)
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > steps_survived)
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    assert metrics(tmp_path / "whole")["eval"] == metrics(tmp_path / "run")["eval"]


def test_checkpoints_hold_what_learns_alone(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(tmp_path, vit_folder, image_folder, training=STEPS)
    kill(config, monkeypatch, lambda trainer: trainer.state.global_step == 2)
    [path] = (tmp_path / "run" / "checkpoints").rglob("checkpoint-2/model.safetensors")
    stored = load_file(path)
    assert stored
    assert all(".lora_" in name or name.startswith("classifier") for name in stored)


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_best_checkpoint_is_what_a_stage_ends_with(
    folder: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    training = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    training |= {"greater_is_better": True}
    config = make(tmp_path, source, image_folder, training=training)
    result = hfft.train(config, ["strategy.epochs=3"])
    by_epoch = [e["eval_loss"] for e in log(tmp_path / "run") if "eval_loss" in e]
    assert by_epoch.index(max(by_epoch)) == 0
    assert result.metrics["eval"]["loss"] == pytest.approx(by_epoch[0], abs=1e-6)


def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = make(tmp_path, vit_folder, image_folder)
    hfft.train(config)
    other = [f"output_dir={tmp_path / 'other'}", "training.gradient_checkpointing=true"]
    hfft.train(config, other)
    for one, two in zip(losses(tmp_path / "run"), losses(tmp_path / "other"), strict=True):
        assert one[3] == pytest.approx(two[3], abs=1e-6)


def test_a_second_adapter_starts_without_the_firsts_optimizer_state(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[set[str]] = []
    create = StageTrainer.create_optimizer

    def note(self: StageTrainer, *args: Any) -> Any:
        if self._carried:
            carried.append(set(self._carried))
        return create(self, *args)

    monkeypatch.setattr(StageTrainer, "create_optimizer", note)
    stages = [stage("one", lora=MERGED), stage("two", lora={"r": 2, "merge": True})]
    hfft.train(make(tmp_path, vit_folder, image_folder, stages=stages))
    assert carried == [{"classifier.weight", "classifier.bias"}]


# The plan


def planned(path: Path) -> Any:
    return make_plan(load_config(path))


def test_plan_counts_the_adapter_and_prints_the_stage(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    strategy = {**LORA, "target_modules": ["q_proj"], "merge": True}
    plan = planned(make(tmp_path, vit_folder, image_folder, strategy=strategy))
    [made] = plan.main.stages
    adapter = 3 * (2 * 16 + 16 * 2)
    assert made.trainable_parameters == adapter + 16 * 3 + 3
    assert made.total_parameters == sum(plan.subject.sizes.values()) + adapter
    text = plan_report(plan)
    pasted = yaml.safe_load(text.partition("The stages as YAML:")[2])
    assert pasted["stages"] == [
        {
            "name": "lora",
            "epochs": 1.0,
            "learning_rate": 1e-2,
            "freeze": "backbone",
            "lora": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "merge": True},
        }
    ]
    again = planned(make(tmp_path, vit_folder, image_folder, **pasted))
    assert again.main.stages == plan.main.stages


def test_plan_says_what_is_adapted_where_peft_has_no_default(
    tmp_path: Path, timm_folder: Path, image_folder: Path
) -> None:
    plan = planned(make(tmp_path, timm_folder, image_folder))
    assert "all its convolutions below the head are adapted (15)" in plan_report(plan)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([stage("a", lora={"target_modules": ["qq"]})], "stages.0.lora.target_modules: 'qq'"),
        ([stage("a", lora={}), stage("b", "none")], "stages.0.lora.merge: .* after it"),
        ([stage("a", "none"), stage("b", lora={})], "stages.1.lora.merge: .* before it"),
        ([stage("a", lora=MERGED), stage("b", lora={})], "stages.1.lora.merge: .* before it"),
    ],
)
def test_adapters_that_fit_no_layer_or_no_source_are_refused(
    stages: list[dict[str, Any]],
    said: str,
    tmp_path: Path,
    vit_folder: Path,
    image_folder: Path,
) -> None:
    with pytest.raises(InputError, match=said):
        planned(make(tmp_path, vit_folder, image_folder, stages=stages))


def test_bad_target_of_the_strategy_is_named_with_its_place(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    strategy = {**LORA, "target_modules": ["q_prog"]}
    with pytest.raises(InputError, match=r"^strategy\.target_modules: .*mean 'q_proj'"):
        planned(make(tmp_path, vit_folder, image_folder, strategy=strategy))


def test_head_first_leaves_the_adapter_apart(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    stages = [stage("head"), stage("adapter", lora={"r": 2})]
    result = hfft.train(make(tmp_path, vit_folder, image_folder, stages=stages))
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    hfft.train(make(tmp_path, vit_folder, image_folder, stages=[stage("other")]), overwrite=True)
    assert result.model_dir.exists()
    assert not (tmp_path / "run" / "adapter").exists()
