"""A strategy expands to the stages that its description promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from hfft.config import Stage, StrategyConfig
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.layers import LayerGroup, LayerGroups
from hfft.plan import make_plan
from hfft.report import stages_yaml
from hfft.strategies import DEFAULT_EPOCHS, expand

STRATEGY: TypeAdapter[StrategyConfig] = TypeAdapter(StrategyConfig)


def tower(name: str, depth: int) -> tuple[LayerGroup, ...]:
    return tuple(LayerGroup(f"{name}.{n}", (f"{name}.{n}.w",)) for n in range(depth))


HEAD = LayerGroup("head", ("head.w",))
FOUR = LayerGroups({"backbone": tower("block", 4)}, HEAD)
UNEQUAL = LayerGroups({"text": tower("text", 4), "vision": tower("vision", 2)}, HEAD)


def stages(
    name: str, groups: LayerGroups = FOUR, total: float | None = None, **options: Any
) -> list[Stage]:
    return expand(STRATEGY.validate_python({"name": name, **options}), groups, total)


def column(expanded: list[Stage], field: str) -> list[Any]:
    return [getattr(stage, field) for stage in expanded]


# frozen, full, lp_ft


def test_frozen_is_one_stage_of_the_head() -> None:
    (stage,) = stages("frozen", learning_rate=0.1, epochs=2)
    assert (stage.freeze, stage.learning_rate, stage.epochs) == ("backbone", 0.1, 2)


def test_full_is_one_stage_of_everything_with_its_fields() -> None:
    (stage,) = stages("full", layer_decay=0.7, head_multiplier=10, steps=5)
    assert stage.freeze == "none"
    assert (stage.layer_decay, stage.head_multiplier, stage.steps) == (0.7, 10, 5)


@pytest.mark.parametrize(
    ("options", "total", "epochs"),
    [
        ({}, None, [DEFAULT_EPOCHS / 2] * 2),
        ({}, 8, [4, 4]),
        ({"epochs": 6}, 8, [3, 3]),
        ({"epochs": 6, "head_epochs": 1}, None, [1, 5]),
        ({"head_epochs": 1}, 8, [1, 7]),
    ],
)
def test_lp_ft_halves_its_length_unless_the_probe_has_its_own(
    options: dict[str, Any], total: float | None, epochs: list[float]
) -> None:
    expanded = stages("lp_ft", total=total, **options)
    assert column(expanded, "freeze") == ["backbone", "none"]
    assert column(expanded, "epochs") == epochs


def test_lp_ft_halves_steps_too() -> None:
    expanded = stages("lp_ft", steps=11)
    assert (column(expanded, "steps"), column(expanded, "epochs")) == ([5, 6], [None, None])
    with pytest.raises(ValidationError, match="with head_epochs give the whole as epochs"):
        stages("lp_ft", steps=11, head_epochs=1)


@pytest.mark.parametrize("options", [{"epochs": 2, "head_epochs": 2}, {"steps": 1}])
def test_lp_ft_without_anything_left_for_the_whole_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="nothing is left to fine-tune everything"):
        stages("lp_ft", **options)


def test_lp_ft_gives_the_probe_its_own_rate_and_both_the_rest() -> None:
    expanded = stages("lp_ft", learning_rate=1e-4, head_learning_rate=1e-2, weight_decay=0.1)
    assert column(expanded, "learning_rate") == [1e-2, 1e-4]
    assert column(expanded, "weight_decay") == [0.1, 0.1]


# gradual


def test_gradual_thaws_from_the_head_down_one_group_a_stage() -> None:
    expanded = stages("gradual")
    assert column(expanded, "freeze") == ["backbone", 3, 2, 1, "none"]
    assert column(expanded, "name") == ["head", "top-1", "top-2", "top-3", "whole"]
    assert column(expanded, "epochs") == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("together", "freeze"),
    [(2, ["backbone", 2, "none"]), (3, ["backbone", 1, "none"]), (9, ["backbone", "none"])],
)
def test_groups_per_step_thaw_together(together: int, freeze: list[Any]) -> None:
    assert column(stages("gradual", groups_per_step=together), "freeze") == freeze


@pytest.mark.parametrize("last", [2, "block.2"])
def test_last_group_is_the_lowest_that_thaws_by_number_or_name(last: int | str) -> None:
    expanded = stages("gradual", last_group=last)
    assert column(expanded, "freeze") == ["backbone", 3, 2]
    assert column(expanded, "name") == ["head", "top-1", "top-2"]


def test_unknown_last_group_names_the_nearest_or_the_range() -> None:
    with pytest.raises(InputError, match=r"no group 'blok\.2'; did you mean 'block\.2'\?"):
        stages("gradual", last_group="blok.2")
    with pytest.raises(InputError, match="4 is not a number from 0 to 3"):
        stages("gradual", last_group=4)


@pytest.mark.parametrize(
    ("options", "total", "epochs"),
    [
        ({"epochs_per_group": 0.5}, None, [0.5] * 5),
        ({"epochs": 12}, None, [1, 1, 1, 1, 8]),
        ({}, 12, [1, 1, 1, 1, 8]),
        ({"epochs": 7}, 12, [1, 1, 1, 1, 3]),
        ({"epochs": 12, "epochs_per_group": 2}, None, [2, 2, 2, 2, 4]),
    ],
)
def test_gradual_gives_what_is_left_of_the_whole_length_to_the_last_stage(
    options: dict[str, Any], total: float | None, epochs: list[float]
) -> None:
    assert column(stages("gradual", total=total, **options), "epochs") == epochs


@pytest.mark.parametrize(
    ("options", "lengths", "last"),
    [
        ({"epochs": 3}, [1, 1, 1], 2),
        ({"epochs": 2.5}, [1, 1, 0.5], 2),
        ({"epochs": 0.5}, [0.5], "backbone"),
        ({"epochs": 1.1, "epochs_per_group": 1.1 / 3}, [pytest.approx(1.1 / 3, abs=1e-5)] * 3, 2),
    ],
)
def test_run_too_short_to_thaw_everything_stops_where_it_is(
    options: dict[str, Any], lengths: list[float], last: Any
) -> None:
    expanded = stages("gradual", **options)
    assert column(expanded, "epochs") == lengths
    assert expanded[-1].freeze == last


def test_rounding_never_makes_a_stage_of_no_length() -> None:
    assert 2.1 / 0.7 > 3
    assert column(stages("gradual", epochs=2.1, epochs_per_group=0.7), "epochs") == [0.7] * 3


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"steps_per_group": 10}, [10] * 5),
        ({"steps_per_group": 10, "steps": 70}, [10, 10, 10, 10, 30]),
        ({"steps_per_group": 10, "steps": 25}, [10, 10, 5]),
        ({"steps": 52}, [10, 10, 10, 10, 12]),
        ({"steps": 3}, [1, 1, 1]),
    ],
)
def test_gradual_counts_in_steps_where_it_is_asked_to(
    options: dict[str, Any], steps: list[int]
) -> None:
    expanded = stages("gradual", total=3, **options)
    assert column(expanded, "steps") == steps
    assert set(column(expanded, "epochs")) == {None}


def test_rate_decay_is_layer_decay_in_every_stage() -> None:
    assert set(column(stages("gradual", rate_decay=0.4), "layer_decay")) == {0.4}


def test_gradual_needs_an_order_of_layers() -> None:
    unordered = LayerGroups({"backbone": tower("all", 1)}, HEAD, ordered=False)
    with pytest.raises(InputError, match="strategy gradual needs an order of layers"):
        stages("gradual", unordered)


# Two towers of unequal depth


def test_towers_thaw_together_from_the_top_and_the_short_one_is_done_first() -> None:
    learning = [
        {g.name for g in UNEQUAL} - names for names in frozen_groups(stages("gradual", UNEQUAL))
    ]
    assert learning == [
        {"head"},
        {"head", "text.3", "vision.1"},
        {"head", "text.3", "vision.1", "text.2", "vision.0"},
        {"head", "text.3", "vision.1", "text.2", "vision.0", "text.1"},
        {"head", "text.3", "vision.1", "text.2", "vision.0", "text.1", "text.0"},
    ]


def test_last_group_by_name_counts_from_the_top_of_its_own_tower() -> None:
    expanded = stages("gradual", UNEQUAL, last_group="vision.1")
    assert frozen_groups(expanded)[-1] == {"text.0", "text.1", "text.2", "vision.0"}
    assert len(expanded) == 2


def frozen_groups(expanded: list[Stage]) -> list[set[str]]:
    covered = [UNEQUAL.frozen(stage.freeze, stage.of_towers("freeze")) for stage in expanded]
    return [{g.name for g in UNEQUAL if set(g.parameters) <= names} for names in covered]


@pytest.mark.parametrize(
    ("locked", "free", "depth"), [("vision", "text", 4), ("text", "vision", 2)]
)
def test_a_locked_tower_stays_locked_while_the_other_thaws_group_by_group(
    locked: str, free: str, depth: int
) -> None:
    expanded = stages("gradual", UNEQUAL, towers={locked: {"freeze": "backbone"}})
    below = {group.name for group in UNEQUAL.towers[locked]}
    others = [group.name for group in UNEQUAL.towers[free]]
    assert frozen_groups(expanded) == [
        below | set(others[: depth - count]) for count in range(depth + 1)
    ]


def test_towers_keep_their_rates_while_they_thaw() -> None:
    expanded = stages("gradual", UNEQUAL, towers={"text": {"learning_rate": 0.1}})
    assert [stage.of_towers("learning_rate") for stage in expanded] == [{"text": 0.1}] * 5
    assert frozen_groups(expanded) == frozen_groups(stages("gradual", UNEQUAL))


def test_gradual_with_every_tower_frozen_by_itself_is_an_error() -> None:
    towers = {name: {"freeze": "backbone"} for name in UNEQUAL.towers}
    with pytest.raises(InputError, match=r"strategy\.towers: each tower has a freeze of its own"):
        stages("gradual", UNEQUAL, towers=towers)


def test_last_group_of_a_tower_that_does_not_thaw_is_an_error() -> None:
    towers = {"vision": {"freeze": "backbone"}}
    with pytest.raises(InputError, match=r"last_group: no group 'vision\.1'"):
        stages("gradual", UNEQUAL, towers=towers, last_group="vision.1")


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("full", [{"vision.0", "vision.1"}]),
        ("frozen", [{"vision.0", "vision.1", "text.0", "text.1", "text.2", "text.3"}]),
        (
            "lp_ft",
            [
                {"vision.0", "vision.1", "text.0", "text.1", "text.2", "text.3"},
                {"vision.0", "vision.1"},
            ],
        ),
    ],
)
def test_a_locked_tower_is_locked_in_all_stages_of_a_strategy(
    name: str, frozen: list[set[str]]
) -> None:
    expanded = stages(name, UNEQUAL, towers={"vision": {"freeze": "backbone"}})
    assert frozen_groups(expanded) == frozen


# As YAML


def test_freezes_by_tower_survive_being_written_and_pasted() -> None:
    expanded = stages("gradual", UNEQUAL)
    text = yaml.safe_dump([stage.model_dump(mode="json") for stage in expanded])
    assert [Stage.model_validate(values) for values in yaml.safe_load(text)] == expanded


@pytest.mark.parametrize(
    "strategy",
    [
        "{name: frozen, learning_rate: 1.0e-2, epochs: 2}",
        "{name: full, layer_decay: 0.8, warmup_steps: 0.1}",
        "{name: lp_ft, head_learning_rate: 0.01, epochs: 3}",
        "{name: gradual, steps_per_group: 2, steps: 20, last_group: layer2, rate_decay: 0.5}",
    ],
)
def test_stages_that_plan_prints_give_the_same_plan_when_pasted(
    strategy: str, tmp_path: Path, timm_folder: Path, image_folder: Path
) -> None:
    common = (
        f"task: image-classification\nmodel: {timm_folder}\n"
        f"data: {{path: {image_folder}, validation: validation}}\n"
        "training: {learning_rate: 3.0e-4, num_train_epochs: 4, per_device_train_batch_size: 6}\n"
    )

    def planned(how: str) -> Any:
        path = tmp_path / "config.yaml"
        path.write_text(common + how, encoding="utf-8")
        return make_plan(load_config(path)).main

    first = planned(f"strategy: {strategy}\n")
    assert first.stages
    assert planned(stages_yaml(first)).stages == first.stages
