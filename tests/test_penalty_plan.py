"""What holds a stage is matched with the model before a weight is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hfft.errors import InputError
from hfft.plan import Plan
from hfft.report import plan_report, stages_yaml

from .test_plan import plan

L2SP = {"kind": "l2_sp", "strength": 0.1}


def covered(made: Plan) -> list[list[int]]:
    """How many tensors each penalty of each stage covers."""
    return [[len(p.coverage) for p in stage.penalties] for stage in made.main.stages]


def test_a_strategys_penalty_is_left_out_where_there_is_nothing_to_hold(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    strategy = {"name": "lp_ft", "epochs": 2, "penalty": L2SP, "mixout": 0.5}
    made = plan(tmp_path, vit_folder, image_folder, strategy=strategy)
    head, whole = made.main.stages
    assert head.penalties == ()
    assert head.stage.mixout is None
    assert len(whole.penalties) == 1
    assert whole.stage.mixout == 0.5
    assert not [name for name in whole.penalties[0].coverage.to_source if "classifier" in name]


def test_a_penalty_on_the_new_head_alone_holds_in_the_heads_stage(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    penalty = {**L2SP, "head_strength": 0.2}
    made = plan(
        tmp_path,
        vit_folder,
        image_folder,
        strategy={"name": "lp_ft", "epochs": 2, "penalty": penalty},
    )
    assert covered(made)[0] == [2]
    assert made.main.stages[0].penalties[0].coverage.to_zero.keys() == {
        "classifier.weight",
        "classifier.bias",
    }


def test_the_sources_own_head_is_held_where_the_classes_are_the_same(
    tmp_path: Path, image_folder: Path, vit_folder: Path
) -> None:
    import transformers

    own = transformers.ViTForImageClassification.from_pretrained(
        vit_folder, num_labels=3, id2label={0: "1", 1: "2", 2: "10"}, ignore_mismatched_sizes=True
    )
    own.save_pretrained(tmp_path / "own")
    transformers.ViTImageProcessor.from_pretrained(vit_folder).save_pretrained(tmp_path / "own")
    strategy = {"name": "frozen", "epochs": 1, "penalty": L2SP}
    made = plan(tmp_path, tmp_path / "own", image_folder, strategy=strategy)
    assert made.main.stages[0].penalties[0].coverage.to_source.keys() == {
        "classifier.weight",
        "classifier.bias",
    }


def test_hfft_plan_names_the_tensors_and_stages_that_can_be_pasted(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    strategy = {"name": "lp_ft", "epochs": 2, "penalty": [L2SP, {"kind": "spd", "strength": 1}]}
    made = plan(tmp_path, vit_folder, image_folder, strategy=strategy)
    report = plan_report(made)
    assert "Stage whole, penalty l2_sp, strength 0.1, covers" in report
    assert re.search(r"\.0: all 16\n", report)
    assert "Stage whole, penalty spd, strength 1, covers" in report
    import yaml

    stages = yaml.safe_load(stages_yaml(made.main))["stages"]
    again = plan(tmp_path, vit_folder, image_folder, stages=stages)
    assert covered(again) == covered(made) == [[], [covered(made)[1][0]] * 2]


def test_orthogonal_is_listed_by_what_it_covers_of_each_layer(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    strategy = {"name": "full", "penalty": {"kind": "orthogonal", "strength": 0.1}}
    report = plan_report(plan(tmp_path, vit_folder, image_folder, strategy=strategy))
    assert "layer.*.attention" in report or "layers.*.attention" in report
    assert "(0, 1, 2)" in report


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"strategy": {"name": "frozen", "penalty": L2SP}},
            "strategy.penalty.kind: nothing that l2_sp covers learns here",
        ),
        (
            {"stages": [{"name": "a", "freeze": "backbone", "epochs": 1, "penalty": L2SP}]},
            "stages.0.penalty.kind: nothing that l2_sp covers learns here",
        ),
        (
            {"strategy": {"name": "full", "penalty": {"kind": "l2_sp", "strength": {"x*": 1.0}}}},
            "strategy.penalty.strength: the pattern 'x*' matches no parameter",
        ),
        (
            {
                "strategy": {
                    "name": "full",
                    "penalty": [L2SP, {"kind": "spd", "strength": {"x": 1}}],
                }
            },
            "strategy.penalty.1.strength: the pattern 'x' matches no parameter",
        ),
        ({"strategy": {"name": "full", "stochnorm": 0.5}}, "strategy.stochnorm: "),
        ({"strategy": {"name": "frozen", "mixout": 0.5}}, "strategy.mixout: "),
    ],
)
def test_what_holds_nothing_is_an_error_with_its_place(
    tmp_path: Path, vit_folder: Path, image_folder: Path, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan(tmp_path, vit_folder, image_folder, **sections)
    assert any(message.startswith(said) for message in caught.value.messages), caught.value.messages


def test_the_data_of_fishers_information_is_read_by_the_plan(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    penalty = {"kind": "fisher", "strength": 1.0, "data": str(image_folder / "test")}
    made = plan(tmp_path, vit_folder, image_folder, strategy={"name": "full", "penalty": penalty})
    assert len(made.main.stages[0].penalties[0].data) == 9
    penalty["data"] = "nowhere/at_all"
    with pytest.raises(InputError, match=r"strategy.penalty.data: .*nowhere"):
        plan(tmp_path, vit_folder, image_folder, strategy={"name": "full", "penalty": penalty})


def test_baselines_have_no_penalty(tmp_path: Path, vit_folder: Path, image_folder: Path) -> None:
    made = plan(
        tmp_path,
        vit_folder,
        image_folder,
        strategy={"name": "full", "penalty": L2SP},
        baselines=["scratch", "frozen"],
    )
    assert all(stage.penalties == () for trial in made.baselines for stage in trial.stages)


@pytest.mark.parametrize(
    ("penalty", "said"),
    [
        ({"kind": "delta", "strength": 1, "layers": ["nonsense"]}, "strategy.penalty.layers: the"),
        ({"kind": "bss", "strength": {"*": 1}}, "strategy.penalty.strength: bss takes one number"),
    ],
)
def test_penalties_on_activations_are_checked_by_the_plan(
    tmp_path: Path, vit_folder: Path, image_folder: Path, penalty: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan(tmp_path, vit_folder, image_folder, strategy={"name": "full", "penalty": penalty})
    assert caught.value.messages[0].startswith(said)


@pytest.mark.parametrize("kind", ["bss", "delta"])
def test_penalties_on_activations_skip_the_stage_of_the_head_alone(
    tmp_path: Path, vit_folder: Path, image_folder: Path, kind: str
) -> None:
    import transformers

    own = transformers.ViTForImageClassification.from_pretrained(
        vit_folder, num_labels=3, id2label={0: "1", 1: "2", 2: "10"}, ignore_mismatched_sizes=True
    )
    own.save_pretrained(tmp_path / "own")
    transformers.ViTImageProcessor.from_pretrained(vit_folder).save_pretrained(tmp_path / "own")
    strategy = {"name": "lp_ft", "epochs": 2, "penalty": {"kind": kind, "strength": 1}}
    made = plan(tmp_path, tmp_path / "own", image_folder, strategy=strategy)
    assert [len(stage.penalties) for stage in made.main.stages] == [0, 1]
    assert not [n for n in made.main.stages[1].penalties[0].coverage.to_source if "classif" in n]
