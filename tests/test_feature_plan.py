"""What a plan says of the feature cache, before a weight is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hfft.plan import Plan
from hfft.report import plan_report

from .test_plan import plan

STILL = {"name": "image-classification", "augmentation": "none"}
FLIPPED = {"name": "image-classification", "augmentation": {"horizontal_flip": 0.5}}
PROBE: list[dict[str, Any]] = [{"name": "probe", "freeze": "backbone", "epochs": 50}]


def planned(folder: Path, model: Path, images: Path, cache: Any = "auto", **more: Any) -> Plan:
    sections = {"task": STILL, "stages": PROBE, **more}
    return plan(folder, model, images, feature_cache=cache, **sections)


def reasons(made: Plan) -> list[str]:
    return [stage.features.reason for stage in made.main.stages]


def test_a_long_probe_is_stored_before_the_head(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    made = planned(tmp_path, vit_folder, image_folder)
    [features] = [stage.features for stage in made.main.stages]
    assert features.splits == ("train", "validation")
    assert features.frozen == made.main.stages[0].frozen
    assert features.bytes == (18 + 9) * 16 * 4
    assert features.reason == (
        "stored before classifier, train, validation: 64 bytes an example, 1.73 kB in all; "
        "one pass instead of 50.3"  # the last evaluation beside the 50
    )
    assert f"  main, probe: {features.reason}" in plan_report(made)


def test_what_is_stored_of_each_example_follows_the_dtype(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    made = planned(tmp_path, vit_folder, image_folder, {"dtype": "bfloat16"})
    assert "32 bytes an example" in reasons(made)[0]
    assert made.main.stages[0].features.bytes == (18 + 9) * 16 * 2


def test_off_is_off(tmp_path: Path, vit_folder: Path, image_folder: Path) -> None:
    made = planned(tmp_path, vit_folder, image_folder, "off", task=FLIPPED)
    assert reasons(made) == ["computed in every epoch: feature_cache is off"]
    assert not made.main.stages[0].features.splits
    assert "feature_cache.views" not in " ".join(made.notes)


def test_nothing_frozen_is_nothing_to_store(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    full = [{"name": "all", "freeze": "none", "epochs": 9}]
    made = planned(tmp_path, vit_folder, image_folder, "on", stages=full)
    assert reasons(made) == ["computed in every epoch: nothing is frozen"]
    assert re.search(r"Frozen layers:\n  none", plan_report(made))


def test_learning_embeddings_below_frozen_blocks_are_told(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    middle = [{"name": "a", "freeze": ["vit.layers.1", "vit.layers.2"], "epochs": 9}]
    made = planned(tmp_path, vit_folder, image_folder, "on", stages=middle)
    assert reasons(made) == ["computed in every epoch: nothing frozen comes before what learns"]


def test_a_compiled_model_is_not_cut(tmp_path: Path, vit_folder: Path, image_folder: Path) -> None:
    made = planned(tmp_path, vit_folder, image_folder, "on", training={"torch_compile": True})
    assert reasons(made) == [
        "computed in every epoch: training.torch_compile compiles the whole model"
    ]


def test_a_penalty_that_runs_the_source_on_the_inputs_needs_them(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    penalty = {"kind": "delta", "strength": 0.01, "attention": "none"}
    held = [{"name": "a", "freeze": 1, "epochs": 9, "penalty": penalty}]
    made = planned(tmp_path, vit_folder, image_folder, "on", stages=held)
    assert reasons(made) == ["computed in every epoch: the penalty delta needs the model's inputs"]
    other = [{**held[0], "penalty": {"kind": "l2_sp", "strength": 0.01}}]
    made = planned(tmp_path, vit_folder, image_folder, "on", stages=other)
    assert reasons(made)[0].startswith("stored before vit.layers.0")


def test_augmentation_leaves_training_data_out_and_advises_views(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    made = planned(tmp_path, vit_folder, image_folder, "on", task=FLIPPED)
    assert made.main.stages[0].features.splits == ("validation",)
    [note] = [note for note in made.notes if "feature_cache.views" in note]
    assert "feature_cache.views=4 makes that 4 passes instead of 50" in note
    again = planned(tmp_path, vit_folder, image_folder, {"views": 4}, task=FLIPPED)
    assert again.main.stages[0].features.splits == ("train", "validation")
    assert again.main.stages[0].features.bytes == (18 * 4 + 9) * 16 * 4
    assert not [note for note in again.notes if "feature_cache.views" in note]


@pytest.mark.parametrize(
    ("task", "epochs"), [(STILL, 50), (FLIPPED, 1)], ids=["nothing random", "one epoch"]
)
def test_no_views_are_advised_where_they_save_nothing(
    task: dict[str, Any], epochs: int, tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    short = [{**PROBE[0], "epochs": epochs}]
    made = planned(tmp_path, vit_folder, image_folder, task=task, stages=short)
    assert not [note for note in made.notes if "feature_cache" in note]


def test_advised_views_save_passes(tmp_path: Path, vit_folder: Path, image_folder: Path) -> None:
    for epochs in (3, 5, 8, 20):
        short = [{**PROBE[0], "epochs": epochs}]
        made = planned(tmp_path, vit_folder, image_folder, task=FLIPPED, stages=short)
        [note] = [note for note in made.notes if "feature_cache" in note]
        views = int(re.search(r"views=(\d)", note)[1])  # type: ignore[index]
        assert 1 <= views < epochs


def test_a_limit_that_is_too_small_is_told(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    made = planned(tmp_path, vit_folder, image_folder, "1KB")
    assert reasons(made) == [
        "computed in every epoch: 1.73 kB (64 bytes an example) do not fit into 1 kB "
        "(feature_cache.limit)"
    ]
    enough = planned(tmp_path, vit_folder, image_folder, "2KB")
    assert reasons(enough)[0].startswith("stored")


def test_on_stores_what_does_not_pay(tmp_path: Path, vit_folder: Path, image_folder: Path) -> None:
    once = [{**PROBE[0], "epochs": 1}]
    [auto] = reasons(planned(tmp_path, vit_folder, image_folder, "auto", stages=once))
    [on] = reasons(planned(tmp_path, vit_folder, image_folder, "on", stages=once))
    assert on.startswith("stored before classifier")
    assert auto.startswith(("computed in every epoch", "stored before classifier"))


def test_stages_that_thaw_downwards_share_the_first_pass(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    gradual = [
        {"name": name, "freeze": freeze, "epochs": 3}
        for name, freeze in (("head", "backbone"), ("top", 3), ("more", 2), ("all", "none"))
    ]
    made = planned(tmp_path, vit_folder, image_folder, "on", stages=gradual)
    said = reasons(made)
    assert "one pass instead of" in said[0]
    assert said[1].endswith("made in the pass of stage head")
    assert said[2].endswith("made in the pass of stage head")
    assert said[3] == "computed in every epoch: nothing is frozen"


def test_a_stage_after_a_thaw_makes_a_pass_of_its_own(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    again = [
        {"name": "head", "freeze": "backbone", "epochs": 3},
        {"name": "all", "freeze": "none", "epochs": 1},
        {"name": "late", "freeze": "backbone", "epochs": 3},
    ]
    said = reasons(planned(tmp_path, vit_folder, image_folder, "on", stages=again))
    assert "one pass instead of" in said[0]
    assert "one pass instead of" in said[2]


def test_the_last_stage_is_scored_on_test_data_too(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    data = {"path": str(image_folder), "validation": "validation", "test": "test"}
    two = [{**PROBE[0], "name": name} for name in ("one", "two")]
    made = planned(tmp_path, vit_folder, image_folder, "on", stages=two, data=data)
    assert [stage.features.splits for stage in made.main.stages] == [
        ("train", "validation"),
        ("train", "validation", "test"),
    ]


def test_a_resnet_is_cut_before_the_layer_that_learns(
    tmp_path: Path, timm_folder: Path, image_folder: Path
) -> None:
    some = [{"name": "top", "freeze": 3, "epochs": 9}]
    [reason] = reasons(planned(tmp_path, timm_folder, image_folder, "on", stages=some))
    assert reason.startswith("stored before timm_model.layer3, train, validation: 512 bytes")


def test_biases_that_learn_leave_little_below(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    bitfit = [{"name": "bias", "freeze": ["*.weight", "*_token", "*embeddings"], "epochs": 9}]
    [reason] = reasons(planned(tmp_path, vit_folder, image_folder, "on", stages=bitfit))
    assert "vit.layers" not in reason or "layers.0" in reason


def test_baselines_are_planned_too(tmp_path: Path, vit_folder: Path, image_folder: Path) -> None:
    made = planned(tmp_path, vit_folder, image_folder, "on", baselines=["frozen", "scratch"])
    frozen, scratch = (trial.stages[0].features for trial in made.baselines)
    assert frozen.reason.startswith("stored before classifier")
    assert scratch.reason == "computed in every epoch: nothing is frozen"
