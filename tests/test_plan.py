from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfft.config_file import load_config
from hfft.encoding import Examples
from hfft.errors import InputError
from hfft.plan import Plan, make_plan, steps_per_epoch
from hfft.task import Split

from .runs import write_config

HUNDRED = Examples(range(100), Split([], []))


def plan(tmp_path: Path, model: Path, images: Path, **sections: Any) -> Plan:
    path = write_config(tmp_path / "c.yaml", model, images, **sections)
    return make_plan(load_config(path))


def test_baselines_take_the_fine_tunes_length_rate_and_recipe(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    recipe = {"weight_decay": 0.3, "warmup_steps": 0.2, "lr_scheduler_type": "cosine"}
    strategy = {"name": "gradual", "learning_rate": 2e-3, "head_multiplier": 5, **recipe}
    made = plan(
        tmp_path, vit_folder, image_folder, strategy=strategy, baselines=["scratch", "frozen"]
    )
    whole = sum(stage.steps for stage in made.main.stages)
    for trial in made.baselines:
        [stage] = trial.stages
        assert stage.steps == whole == 15
        assert {key: getattr(stage.stage, key) for key in recipe} == recipe
    rates = {trial.name: trial.stages[0].learning_rate for trial in made.baselines}
    assert rates == {"scratch": 2e-3, "frozen": pytest.approx(1e-2)}
    assert [trial.from_scratch for trial in made.baselines] == [True, False]


def test_baselines_keep_what_they_say_themselves(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    baseline = {"name": "scratch", "epochs": 4, "learning_rate": 0.1, "weight_decay": 0.0}
    strategy = {"name": "full", "epochs": 1, "weight_decay": 0.3}
    made = plan(tmp_path, vit_folder, image_folder, strategy=strategy, baselines=[baseline])
    [stage] = made.baselines[0].stages
    assert (stage.steps, stage.learning_rate, stage.stage.weight_decay) == (12, 0.1, 0.0)


def test_max_steps_caps_every_stage_and_a_baseline_is_as_long_as_all_of_them(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    made = plan(
        tmp_path,
        vit_folder,
        image_folder,
        strategy={"name": "gradual"},
        baselines=["frozen", {"name": "scratch", "epochs": 9}],
        training={"max_steps": 2},
    )
    assert [stage.steps for stage in made.main.stages] == [2] * 5
    assert [trial.stages[0].steps for trial in made.baselines] == [10, 2]


@pytest.mark.parametrize(
    ("training", "processes", "steps"),
    [
        ({}, 1, 13),
        ({"per_device_train_batch_size": 10}, 2, 5),
        ({"per_device_train_batch_size": 10, "gradient_accumulation_steps": 4}, 1, 3),
        ({"per_device_train_batch_size": 30, "dataloader_drop_last": True}, 1, 3),
    ],
)
def test_steps_of_an_epoch(training: dict[str, Any], processes: int, steps: int) -> None:
    assert steps_per_epoch(HUNDRED, training, processes) == steps


def test_no_whole_batch_is_an_error() -> None:
    training = {"per_device_train_batch_size": 64, "dataloader_drop_last": True}
    with pytest.raises(InputError, match="100 examples, fewer than one batch of 128"):
        steps_per_epoch(HUNDRED, training, 2)


def test_problems_of_data_and_model_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan(tmp_path, tmp_path / "no_model", tmp_path / "no_data")
    assert any(message.startswith("data.path") for message in caught.value.messages)
    assert any(message.startswith("model") for message in caught.value.messages)


def test_unknown_best_metric_is_named_before_the_first_evaluation(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    training = {"metric_for_best_model": "acuracy"}
    with pytest.raises(InputError, match=r"metric_for_best_model.*did you mean 'accuracy'"):
        plan(tmp_path, vit_folder, image_folder, training=training)
    for name in ("accuracy", "eval_macro_f1", "eval_loss"):
        plan(tmp_path, vit_folder, image_folder, training={"metric_for_best_model": name})
