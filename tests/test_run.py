from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

import hfft
from hfft.errors import InputError, RunFailedError
from hfft.trainer import StageTrainer

from .runs import largest_difference, log, losses, metrics, same_weights, weights, write_config

STAGES = [
    {"name": "low", "freeze": 2, "epochs": 1.4},
    {"name": "head", "freeze": "backbone", "epochs": 1},
    {"name": "all", "freeze": "none", "epochs": 1, "layer_decay": 0.8, "head_multiplier": 3},
]


def test_run_folder_holds_what_the_contract_names(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    data = {"path": str(image_folder), "validation": "validation", "test": "test"}
    config = write_config(
        tmp_path / "c.yaml", vit_folder, image_folder, data=data, baselines=["scratch", "frozen"]
    )
    result = hfft.train(config)
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.json", "log.jsonl", "model"} <= names
    assert "confusion_matrix.png" in names
    Image.open(run / "confusion_matrix.png").verify()
    assert (run / "per_class.csv").read_text().splitlines()[0].startswith("label,precision")
    found = metrics(run)
    assert found == result.metrics
    assert list(found) == [
        "task",
        "model",
        "seed",
        "seconds",
        "eval",
        "test",
        "baselines",
        "stages",
    ]
    assert set(found["eval"]) == {"loss", "accuracy", "macro_f1"}
    assert set(found["baselines"]) == {"scratch", "frozen"}
    assert set(found["baselines"]["frozen"]["test"]) == {"loss", "accuracy", "macro_f1"}
    [stage] = result.stages
    assert stage["steps"] == 3
    assert stage["epochs"] == 1.0
    assert stage["trainable_parameters"] == stage["total_parameters"]
    assert stage["feature_cache"] is None
    environment = json.loads((run / "environment.json").read_text())
    assert environment["num_processes"] == 1
    assert environment["versions"]["torch"] in torch.__version__
    assert {e["trial"] for e in log(run)} == {"main", "scratch", "frozen"}


def test_resolved_config_repeats_the_run(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    hfft.train(config)
    hfft.train(tmp_path / "run" / "config.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert same_weights(tmp_path / "run", tmp_path / "again")


def test_labels_sort_naturally_and_come_out_of_the_pipeline(
    tmp_path: Path, timm_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", timm_folder, image_folder)
    model_dir = hfft.train(config, ["strategy.epochs=20", "training.learning_rate=0.01"]).model_dir
    model = AutoModelForImageClassification.from_pretrained(model_dir)
    assert model.config.id2label == {0: "1", 1: "2", 2: "10"}
    run = pipeline("image-classification", model=str(model_dir))
    answers = {
        name: run(str(image_folder / "test" / name / "0.png"))[0]["label"]
        for name in ("1", "2", "10")
    }
    assert answers == {"1": "1", "2": "2", "10": "10"}


def test_folder_that_timm_saved_is_a_source(tmp_path: Path, image_folder: Path) -> None:
    model = timm.create_model("resnet10t", pretrained=False)
    timm.models.save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
    config = write_config(tmp_path / "c.yaml", tmp_path / "theirs", image_folder)
    result = hfft.train(config, ["strategy={name: frozen}", "task.image_size=32"])
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = weights(tmp_path / "run")
    assert all(torch.equal(after[n], t) for n, t in before.items() if "fc" not in n)
    assert (
        len(
            pipeline("image-classification", model=str(result.model_dir))(
                str(image_folder / "test" / "1" / "0.png")
            )
        )
        == 3
    )


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_frozen_backbone_is_bit_identical_to_the_source(
    folder: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    config = write_config(tmp_path / "c.yaml", source, image_folder)
    hfft.train(config, ["strategy={name: frozen, epochs: 2}"])
    before = load_file(source / "model.safetensors")
    after = weights(tmp_path / "run")
    moved = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
    assert moved
    assert {name.split(".")[-2] for name in moved} <= {"classifier", "fc"}


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "frozen"},
        {"name": "full"},
        {"name": "gradual", "groups_per_step": 2},
        {"name": "lp_ft"},
    ],
)
def test_every_strategy_trains_every_kind_of_model(
    strategy: dict[str, object],
    folder: str,
    tmp_path: Path,
    image_folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    source = request.getfixturevalue(folder)
    config = write_config(tmp_path / "c.yaml", source, image_folder, strategy=strategy)
    result = hfft.train(config, ["training.max_steps=1"])
    assert all(stage["steps"] == 1 for stage in result.stages)
    counts = [stage["trainable_parameters"] for stage in result.stages]
    assert counts == sorted(counts)
    assert (counts[-1] == result.stages[0]["total_parameters"]) == (strategy["name"] != "frozen")


class Killed(BaseException):
    """Stands for the process that is no more."""


def kill(
    config: Path, monkeypatch: pytest.MonkeyPatch, now: Callable[[StageTrainer], bool]
) -> None:
    """Run a config up to the first step before which `now` says so."""
    step = StageTrainer.training_step

    def mortal(self: StageTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if now(self):
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", mortal)
        with pytest.raises(Killed):
            hfft.train(config)


@pytest.mark.parametrize("schedule", ["stage", "run"])
@pytest.mark.parametrize("steps_survived", [2, 5, 7, 10])
def test_resumed_run_equals_the_uninterrupted_one(
    steps_survived: int,
    schedule: str,
    tmp_path: Path,
    vit_folder: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        vit_folder,
        image_folder,
        stages=STAGES,
        schedule=schedule,
        baselines=["frozen"],
        training={"save_strategy": "steps", "save_steps": 2},
    )
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > steps_survived)
    assert not (tmp_path / "run" / "metrics.json").exists()
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    for key in ("eval", "baselines"):
        assert metrics(tmp_path / "whole")[key] == metrics(tmp_path / "run")[key]


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_best_checkpoint_is_what_a_stage_ends_with(
    folder: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    """The highest loss counts as the best, so that the best epoch is not the last."""
    source = request.getfixturevalue(folder)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    training = {**best, "greater_is_better": True}
    config = write_config(tmp_path / "c.yaml", source, image_folder, training=training)
    result = hfft.train(config, ["strategy.epochs=3"])
    by_epoch = [e["eval_loss"] for e in log(tmp_path / "run") if "eval_loss" in e]
    assert by_epoch.index(max(by_epoch)) == 0
    assert result.metrics["eval"]["loss"] == pytest.approx(by_epoch[0])


def test_resuming_a_complete_run_returns_its_result(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    assert hfft.train(config, resume=True).metrics == hfft.train(config, resume=True).metrics


def test_half_written_checkpoint_is_not_resumed_from(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        vit_folder,
        image_folder,
        training={"save_strategy": "steps", "save_steps": 1},
    )
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    kill(config, monkeypatch, lambda trainer: trainer.state.global_step == 2)
    newest = tmp_path / "run" / "checkpoints" / "main" / "00-whole" / "checkpoint-2"
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_resuming_on_changed_data_is_refused(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    config = write_config(tmp_path / "c.yaml", vit_folder, images)
    kill(config, monkeypatch, lambda _: True)
    shutil.copy(images / "train" / "1" / "0.png", images / "train" / "1" / "new.png")
    with pytest.raises(InputError, match="the data has changed"):
        hfft.train(config, resume=True)
    (images / "train" / "1" / "new.png").unlink()
    hfft.train(config, resume=True)


def test_input_found_wrong_late_leaves_nothing_behind(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misfit(*args: object) -> None:
        raise InputError("model: its weights have other sizes")

    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    monkeypatch.setattr("hfft.stage_models.load_weights", misfit)
    with pytest.raises(InputError, match="other sizes"):
        hfft.train(config)
    assert not (tmp_path / "run").exists()


def test_config_made_in_python_is_checked_too(vit_folder: Path, image_folder: Path) -> None:
    config = hfft.Config.model_validate(
        {
            "task": {"name": "image-classification", "image_sise": 3},
            "model": str(vit_folder),
            "data": {"path": str(image_folder)},
            "training": {"learning_rte": 1.0},
            "output_dir": "unused",
        }
    )
    with pytest.raises(InputError) as caught:
        hfft.train(config)
    assert len(caught.value.messages) == 2


def test_output_dir_of_another_run_is_left_alone(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    hfft.train(config, ["training.max_steps=1"])
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(InputError, match=r"holds a run already.*--resume.*--overwrite"):
        hfft.train(config)
    with pytest.raises(InputError, match="was started with another training"):
        hfft.train(config, resume=True)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    hfft.train(config, overwrite=True)
    assert metrics(tmp_path / "run")["stages"][0]["steps"] == 3


def test_overwrite_keeps_files_that_are_not_a_runs(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    hfft.train(config, ["training.max_steps=1"], overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=[{name: a, freeze: [nothing.*]}]", r"stages.0.freeze: the pattern 'nothing.\*'"),
        ("stages=[{name: a, freeze: 7}]", "from 0 to 4"),
        ("stages=[{name: a, freeze: ['*']}]", "leaves nothing to learn"),
        ("model=no_such_folder/model", "model: "),
        ("training.learning_rte=1", "did you mean 'learning_rate'"),
        ("data.train=training", "data.train"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(
    override: str, message: str, tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder, strategy=None)
    with pytest.raises(InputError, match=message):
        hfft.train(config, [override])
    assert not (tmp_path / "run").exists()


def test_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    stages = [{"name": "a", "epochs": 1}, {"name": "b", "learning_rate": 1e36, "epochs": 1}]
    config = write_config(
        tmp_path / "c.yaml",
        vit_folder,
        image_folder,
        stages=stages,
        training={"max_grad_norm": 0, "weight_decay": 0.0},
    )
    with pytest.raises(RunFailedError, match=r"stage b: the loss is .* at step \d.*00-a/finished"):
        hfft.train(config)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_gradient_accumulation_equals_the_larger_batch(
    folder: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    config = write_config(tmp_path / "c.yaml", source, image_folder)
    # frozen: BatchNorm and dropout, which see one micro-batch at a time, are off
    frozen = "strategy={name: frozen, epochs: 2}"
    hfft.train(config, [frozen])
    accumulated = ["training.per_device_train_batch_size=2"]
    accumulated += ["training.gradient_accumulation_steps=3", f"output_dir={tmp_path / 'other'}"]
    hfft.train(config, [frozen, *accumulated])
    assert largest_difference(tmp_path / "run", tmp_path / "other") < 1e-6


def test_optimizer_state_is_carried_unless_switched_off(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    # a constant rate, so that two stages of one epoch can equal one stage of two
    constant = {"lr_scheduler_type": "constant"}
    two = [{"name": "a", "epochs": 1}, {"name": "b", "epochs": 1}]
    config = write_config(
        tmp_path / "c.yaml", vit_folder, image_folder, stages=two, training=constant
    )
    hfft.train(config)
    hfft.train(config, ["stages.1.carry_optimizer_state=false", f"output_dir={tmp_path / 'fresh'}"])
    assert not same_weights(tmp_path / "run", tmp_path / "fresh")


def test_schedule_over_the_whole_run_goes_on_where_the_stage_before_ended(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    two = [{"name": "a", "epochs": 1}, {"name": "b", "epochs": 1}]
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder, stages=two, schedule="run")
    hfft.train(config)
    rates = [e["learning_rate"] for e in log(tmp_path / "run") if "loss" in e]
    assert rates == pytest.approx([1e-3 * (1 - step / 6) for step in range(6)])


def test_a_new_head_is_said(
    tmp_path: Path, vit_folder: Path, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    with caplog.at_level("INFO", logger="hfft"):
        hfft.train(config, ["training.max_steps=1"])
    assert "the head is new: the source's has 2 outputs, the task 3" in caplog.text


def test_validation_is_held_out_where_none_is_named(
    tmp_path: Path, vit_folder: Path, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"path": str(image_folder / "train")}
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder, data=data)
    with caplog.at_level("INFO", logger="hfft"):
        hfft.train(config, ["training.max_steps=1"])
    assert "held out" in caplog.text


def test_undecodable_images_are_left_out_when_asked(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "train" / "1" / "bad.png").write_bytes(b"no image")
    data = {"path": str(images), "validation": "validation"}
    config = write_config(tmp_path / "c.yaml", vit_folder, images, data=data)
    with pytest.raises(InputError, match=r"bad\.png"):
        hfft.train(config)
    hfft.train(config, ["data.on_bad_example=skip", "training.max_steps=1"])
    assert (tmp_path / "run" / "metrics.json").exists()
