"""A config is checked to the last key, and all that is wrong with it is said at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from hfft import registry
from hfft.config import Config, Stage
from hfft.config_file import dump_config, json_schema, load_config
from hfft.errors import InputError
from hfft.sections import Section
from hfft.training_fields import SET_ELSEWHERE
from hfft.yaml_file import read_yaml

SHIPPED = sorted(
    path
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml")
    if path.parent.name != "accelerate"
)
BASE: dict[str, Any] = {"task": "image-classification", "model": "m", "data": {"path": "d"}}


class Crop(Section):
    size: int = 1


class Options(Section):
    image_size: int | None = None
    crop: Literal["none", "centre"] | Crop = "none"


class Task:
    Options = Options


def task(name: str) -> type[Task]:
    if name != "image-classification":
        raise InputError(f"there is no task {name!r}")
    return Task


def load(folder: Path, *overrides: str, **sections: Any) -> Config:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**BASE, **sections}, sort_keys=False), encoding="utf-8")
    return read(path, *overrides)


def read(path: Path, *overrides: str) -> Config:
    """Read a config for a task with the options above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "get", task)
        return load_config(path, overrides)


def complaints(folder: Path, *overrides: str, **sections: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(folder, *overrides, **sections)
    return [said.removeprefix(f"{folder / 'mine.yaml'}: ") for said in caught.value.messages]


# Keys and values


def test_wrong_item_of_a_list_is_the_only_complaint_of_it(tmp_path: Path) -> None:
    penalty = {"kind": "l2_sp", "strength": 0.1, "source": "adopted"}
    stages = [{"name": "a", "penalty": penalty}]
    [said] = complaints(tmp_path, stages=stages)
    assert "stages.0.penalty.source: 'adopted'" in said


def test_test_data_of_a_stage_would_go_unscored(tmp_path: Path) -> None:
    first = {"name": "a", "task": "image-classification", "data": {"path": "d", "test": "x"}}
    [said] = complaints(tmp_path, stages=[first, {"name": "b"}])
    assert said.startswith("stages.0: data.test is scored at a run's end")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"strateg": "full"}, "strateg: unknown key; did you mean 'strategy'?"),
        ({"data": {"path": "d", "trian": "x"}}, "data.trian: unknown key; did you mean 'train'?"),
        (
            {"strategy": {"name": "gradual", "epoch_per_group": 1}},
            "strategy.epoch_per_group: unknown key; did you mean 'epochs_per_group'?",
        ),
        (
            {"stages": [{"name": "a"}, {"name": "b", "freez": 1}]},
            "stages.1.freez: unknown key; did you mean 'freeze'?",
        ),
        (
            {"baselines": [{"name": "scratch", "epoch": 1}]},
            "baselines.0.epoch: unknown key; did you mean 'epochs'?",
        ),
        (
            {"task": {"name": "image-classification", "image_siz": 8}},
            "task.image_siz: unknown key; did you mean 'image_size'?",
        ),
        (
            {"task": {"name": "image-classification", "crop": {"siz": 8}}},
            "task.crop.siz: unknown key; did you mean 'size'?",
        ),
    ],
)
def test_unknown_key_is_named_with_its_place_and_the_nearest(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    assert complaints(tmp_path, **sections) == [said]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"strategy": "gradul"},
            "strategy: 'gradul' is none of its values; did you mean 'gradual'?",
        ),
        (
            {"baselines": ["scrach"]},
            "baselines.0.name: 'scrach' is none of its values; did you mean 'scratch'?",
        ),
        ({"schedule": "runs"}, "schedule: 'runs' is none of its values; did you mean 'run'?"),
        (
            {"task": {"name": "image-classification", "crop": "center"}},
            "task.crop: 'center' is none of its values; did you mean 'centre'?",
        ),
        ({"task": "image"}, "task: there is no task 'image'"),
        (
            {"strategy": {"name": "full", "lr_scheduler_type": "cosin"}},
            "strategy.lr_scheduler_type: 'cosin' is none of its values; did you mean 'cosine'?",
        ),
    ],
)
def test_unknown_value_is_named_with_the_nearest(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    assert complaints(tmp_path, **sections) == [said]


@pytest.mark.parametrize(
    ("sections", "place"),
    [
        ({"seed": 1.5}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"output_dir": ""}, "output_dir"),
        ({"strategy": {"name": "full", "learning_rate": float("inf")}}, "strategy.learning_rate"),
        ({"hub": {"repo_id": "-me-/model"}}, "hub.repo_id"),
        ({"strategy": {"name": "full", "epochs": "3"}}, "strategy.epochs"),
        ({"strategy": {"name": "full", "epochs": 0}}, "strategy.epochs"),
        ({"strategy": {"epochs": 3}}, "strategy.name"),
        ({"strategy": {"name": "full", "layer_decay": 1.5}}, "strategy.layer_decay"),
        ({"stages": []}, "stages"),
        ({"stages": {"name": "a"}}, "stages"),
        ({"stages": [{"freeze": "none"}]}, "stages.0.name"),
        ({"stages": [{"name": "a b"}]}, "stages.0.name"),
        ({"hub": {"repo_id": "a b"}}, "hub.repo_id"),
        ({"training": [1]}, "training"),
        ({"task": {"name": "image-classification", "image_size": "8"}}, "task.image_size"),
        ({"task": {"name": "image-classification", "crop": {"size": "x"}}}, "task.crop.size"),
    ],
)
def test_wrong_type_or_range_is_one_complaint_with_its_place(
    tmp_path: Path, sections: dict[str, Any], place: str
) -> None:
    (said,) = complaints(tmp_path, **sections)
    assert said.startswith(f"{place}: ")


@pytest.mark.parametrize("freeze", ["backbon", True, 1.5, [], [1], {"n": 1}])
def test_freeze_of_another_kind_is_refused(tmp_path: Path, freeze: Any) -> None:
    (said,) = complaints(tmp_path, stages=[{"name": "a", "freeze": freeze}])
    assert said.startswith("stages.0.freeze: expected none, backbone, a number of groups")


@pytest.mark.parametrize(
    ("freeze", "value"),
    [("none", "none"), ("backbone", "backbone"), (0, 0), (3, 3), (["a.*", "b"], ("a.*", "b"))],
)
def test_freeze_takes_a_word_a_number_or_patterns(tmp_path: Path, freeze: Any, value: Any) -> None:
    (stage,) = load(tmp_path, stages=[{"name": "a", "freeze": freeze}]).stages or []
    assert stage.freeze == value


@pytest.mark.parametrize("freeze", ["head", True, 1.5, ["text_model.*"]])
def test_a_tower_is_frozen_by_a_word_or_a_number_only(tmp_path: Path, freeze: Any) -> None:
    towers = {"vision": {"freeze": freeze}}
    (said,) = complaints(tmp_path, stages=[{"name": "a", "towers": towers}])
    assert said.startswith("stages.0.towers.vision.freeze: expected none, backbone or a number")


@pytest.mark.parametrize(
    ("towers", "said"),
    [
        ({}, "stages.0.towers: "),
        ({"vision": {}}, "stages.0.towers.vision: give one or more of freeze, learning_rate"),
        ({"vision": {"freze": 1}}, "stages.0.towers.vision.freze: unknown key; did you mean"),
        ({"vision": {"layer_decay": 2}}, "stages.0.towers.vision.layer_decay: "),
        ({"text": "backbone"}, "stages.0.towers.text: expected `key: value` lines"),
    ],
)
def test_wrong_fields_of_a_tower_are_said_with_their_place(
    tmp_path: Path, towers: Any, said: str
) -> None:
    (complaint,) = complaints(tmp_path, stages=[{"name": "a", "towers": towers}])
    assert complaint.startswith(said)


def test_strategies_take_fields_of_towers_too(tmp_path: Path) -> None:
    towers = {"vision": {"freeze": "backbone"}, "text": {"learning_rate": 1e-5, "freeze": 2}}
    config = load(tmp_path, strategy={"name": "gradual", "towers": towers})
    assert config.strategy is not None
    assert config.strategy.of_towers("freeze") == {"vision": "backbone", "text": 2}
    assert config.strategy.of_towers("learning_rate") == {"text": 1e-5}
    assert config.strategy.of_towers("layer_decay") == {}


def test_an_adapter_stands_beside_towers_that_are_frozen_whole(tmp_path: Path) -> None:
    stage = {"name": "a", "freeze": "backbone", "lora": {"r": 4}}
    (said,) = complaints(tmp_path, stages=[{**stage, "towers": {"text": {"freeze": "none"}}}])
    assert "lora goes with freeze: backbone" in said
    load(tmp_path, stages=[{**stage, "towers": {"text": {"learning_rate": 1e-4}}}])
    (said,) = complaints(
        tmp_path, strategy={"name": "lora", "r": 4, "towers": {"text": {"freeze": 1}}}
    )
    assert said.startswith("strategy: lora goes with freeze: backbone")
    load(tmp_path, strategy={"name": "lora", "towers": {"text": {"freeze": "backbone"}}})


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = complaints(
        tmp_path,
        "seed",
        "stages.3.epochs=1",
        task={"name": "image-classification", "image_size": "big"},
        data={},
        stages=[{"name": "a", "epochs": -1}],
        training={"learning_rat": 1, "seed": 2},
        sed=1,
    )
    assert [line.split(":")[0] for line in said] == [
        "override 'seed'",
        "override stages.3",
        "data.path",
        "stages.0.epochs",
        "sed",
        "task.image_size",
        "training.learning_rat",
        "training.seed",
    ]


# What excludes each other


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"strategy": "full", "stages": [{"name": "a"}]}, "strategy and stages both say"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "each needs a name of its own"),
        ({"stages": [{"name": "a", "epochs": 1, "steps": 2}]}, "epochs and steps both set"),
        ({"baselines": ["scratch", "scratch"]}, "baselines: each can stand once"),
        (
            {"strategy": {"name": "gradual", "epochs_per_group": 1, "steps_per_group": 1}},
            "strategy: epochs_per_group and steps_per_group exclude each other",
        ),
        (
            {"strategy": {"name": "gradual", "epochs_per_group": 1, "steps": 9}},
            "strategy: steps and epochs_per_group don't add up",
        ),
        (
            {"strategy": {"name": "gradual", "steps_per_group": 1, "epochs": 9}},
            "strategy: epochs and steps_per_group don't add up",
        ),
        (
            {"strategy": {"name": "gradual", "rate_decay": 0.5, "layer_decay": 0.5}},
            "strategy: rate_decay and layer_decay are the same thing",
        ),
    ],
)
def test_two_ways_to_say_one_thing_exclude_each_other(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    (complaint,) = complaints(tmp_path, **sections)
    assert said in complaint


# The training section


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("learning_rat", 1, "unknown key; did you mean 'learning_rate'?"),
        ("learning_rate", "high", "Input should be a valid number, found 'high'"),
        ("max_steps", "10", "Input should be a valid integer, found '10'"),
        ("per_device_train_batch_size", 4.5, "Input should be a valid integer, found 4.5"),
        ("bf16", "yess", "Input should be a valid boolean, found 'yess'"),
        ("max_steps", 0, "Input should be greater than 0, found 0"),
        ("per_device_train_batch_size", 0, "Input should be greater than 0, found 0"),
        ("gradient_accumulation_steps", -1, "Input should be greater than 0, found -1"),
        ("num_train_epochs", 0, "Input should be greater than 0, found 0"),
        ("num_train_epochs", float("inf"), "expected a finite number, found inf"),
        ("learning_rate", float("nan"), "expected a finite number, found nan"),
        ("eval_strategy", False, 'found False; YAML reads no as false: write "no"'),
        ("eval_strategy", "step", "'step' is none of its values; did you mean 'steps'?"),
        ("lr_scheduler_type", "linea", "'linea' is none of its values; did you mean 'linear'?"),
    ],
)
def test_training_fields_are_checked_by_name_and_type(
    tmp_path: Path, key: str, value: Any, said: str
) -> None:
    (complaint,) = complaints(tmp_path, training={key: value})
    assert complaint.startswith(f"training.{key}: ")
    assert said in complaint


def test_right_training_fields_pass_as_they_are(tmp_path: Path) -> None:
    training = {
        "learning_rate": 1,
        "warmup_steps": 0.1,
        "max_steps": 10,
        "optim": "adamw_torch",
        "report_to": ["tensorboard"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "ddp_find_unused_parameters": None,
    }
    assert load(tmp_path, training=training).training == training


@pytest.mark.parametrize("key", SET_ELSEWHERE)
def test_training_field_that_is_set_elsewhere_says_where(tmp_path: Path, key: str) -> None:
    (said,) = complaints(tmp_path, training={key: None})
    assert said == f"training.{key}: is set by {SET_ELSEWHERE[key]}; remove it here"


# Overrides and defaults


def test_overrides_count_as_if_they_stood_in_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "task.image_size=64",
        "stages.0.learning_rate=5e-5",
        "training.max_steps=2",
        "data.columns={label: topic}",
        stages=[{"name": "a"}],
    )
    assert config.task.model_extra == {"image_size": 64}
    assert config.stages == [Stage(name="a", learning_rate=5e-5)]
    assert config.training == {"max_steps": 2}
    assert config.data.columns == {"label": "topic"}


def test_output_dir_is_named_after_the_file(tmp_path: Path) -> None:
    assert load(tmp_path).output_dir == "runs/mine"
    assert load(tmp_path, "output_dir=elsewhere").output_dir == "elsewhere"


def test_home_folder_is_written_as_in_a_shell(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load(tmp_path, model="~/m", output_dir="~/runs/x")
    assert (config.model.name, config.output_dir) == ("/home/me/m", "/home/me/runs/x")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"stages": {"name": "a"}}, "stages: expected a list, found {'name': 'a'}"),
        (
            {"average": {"kind": "wise_ft", "alphas": 0.5}},
            "average.alphas: expected a list, found 0.5",
        ),
    ],
)
def test_one_thing_where_a_list_belongs_is_said_in_yamls_words(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    assert complaints(tmp_path, **sections) == [said]


def test_value_where_a_section_belongs_is_said_in_yamls_words(tmp_path: Path) -> None:
    assert complaints(tmp_path, data="d") == ["data: expected `key: value` lines, found 'd'"]


def test_config_survives_being_dumped_and_loaded(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        task={"name": "image-classification", "image_size": 8, "crop": {"size": 2}},
        model={"name": "m", "revision": "main"},
        data={"path": "dätä", "columns": {"label": "topic"}},
        stages=[
            {"name": "head", "freeze": ["a.*"], "learning_rate": 5e-5, "steps": 3},
            {"name": "all", "freeze": 2, "epochs": 0.5, "carry_optimizer_state": False},
        ],
        baselines=["scratch", {"name": "frozen", "epochs": 1}],
        training={"learning_rate": 1e-5},
        hub={"repo_id": "me/x"},
    )
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert read(path) == config


# Penalties


def penalised(**penalty: Any) -> dict[str, Any]:
    return {"stages": [{"name": "a", "epochs": 1, "penalty": {"kind": "l2_sp", **penalty}}]}


def test_one_penalty_stands_for_a_list_of_one(tmp_path: Path) -> None:
    one = load(tmp_path, **penalised(strength=0.1))
    assert one.stages is not None
    assert one.stages[0].penalty is not None
    assert [penalty.kind for penalty in one.stages[0].penalty] == ["l2_sp"]
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(one), encoding="utf-8")
    assert read(path) == one


@pytest.mark.parametrize(
    ("penalty", "said"),
    [
        ({"strength": -0.1}, "stages.0.penalty.strength"),
        ({"strength": float("nan")}, "stages.0.penalty.strength"),
        ({"strength": float("inf")}, "stages.0.penalty.strength"),
        ({"strength": {"*": -1}}, "stages.0.penalty.strength"),
        ({}, "stages.0.penalty.strength: is missing"),
        ({"strength": 1, "kind": "l2sp"}, "stages.0.penalty.kind: there is no penalty 'l2sp'"),
        ({"strength": 1, "head_strenth": 1}, "stages.0.penalty.head_strenth: unknown key"),
        ({"strength": 1, "end_factor": 0.5}, "end_factor goes with schedule"),
        ({"strength": 1, "mode": "coupledd"}, "stages.0.penalty.mode"),
        ({"strength": 1, "kind": "spd", "mode": "decoupled"}, "spd has no decoupled form"),
    ],
)
def test_a_wrong_penalty_is_named_with_its_place(
    tmp_path: Path, penalty: dict[str, Any], said: str
) -> None:
    messages = complaints(tmp_path, **penalised(**penalty))
    assert any(said in message for message in messages), messages


def test_one_of_several_penalties_has_a_number(tmp_path: Path) -> None:
    both = [{"kind": "l2_sp", "strength": 1}, {"kind": "spd", "strength": -1}]
    stage = {"name": "a", "epochs": 1, "penalty": both}
    assert complaints(tmp_path, stages=[stage])[0].startswith("stages.0.penalty.1.strength: ")
    empty = complaints(tmp_path, stages=[{**stage, "penalty": []}])
    assert empty[0].startswith("stages.0.penalty: ")
    [bare] = complaints(tmp_path, stages=[{**stage, "penalty": "spd"}])
    assert bare == "stages.0.penalty: a penalty needs a strength: {kind: spd, strength: ...}"


def test_a_baseline_takes_no_penalty(tmp_path: Path) -> None:
    baseline = {"name": "scratch", "penalty": {"kind": "l2_sp", "strength": 1}}
    assert "baselines.0.penalty: unknown key" in complaints(tmp_path, baselines=[baseline])[0]


# Shipped configs and the JSON Schema


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Enough of JSON Schema for ours."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema or "oneOf" in schema:
        return any(accepts(one, value, root) for one in schema.get("anyOf", schema.get("oneOf")))
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": type(None),
    }
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", [])) <= value.keys() and all(
            accepts(known[key], one, root) if key in known else others is not False
            for key, one in value.items()
        )
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), one, root) for one in value)
    return not isinstance(value, str) or bool(re.search(schema.get("pattern", ""), value))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    made = json_schema()
    read: dict[str, Any] = json.loads(json.dumps(made))
    return read


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_config_is_right_by_the_loader_and_by_the_schema(
    path: Path, schema: dict[str, Any]
) -> None:
    load_config(path)
    assert accepts(schema, read_yaml(path), schema)


@pytest.mark.parametrize(
    ("sections", "right"),
    [
        ({}, True),
        ({"strategy": "gradual", "baselines": ["scratch"]}, True),
        ({"strategy": {"name": "gradual", "epochs_per_group": 1}}, True),
        ({"task": {"name": "image-classification", "image_size": 64}}, True),
        ({"stages": [{"name": "a", "freeze": ["x"]}, {"name": "b", "freeze": 2}]}, True),
        ({"sed": 1}, False),
        ({"strategy": "gradul"}, False),
        ({"strategy": {"name": "gradual", "epoch_per_group": 1}}, False),
        ({"task": {"name": "image-classification", "image_siz": 64}}, False),
        ({"task": "image"}, False),
        ({"stages": [{"freeze": "none"}]}, False),
        ({"stages": [{"name": "a", "freeze": "backbon"}]}, False),
        ({"data": {}}, False),
        ({"model": {"towers": {"image": "a", "text": {"name": "b", "pooling": "cls"}}}}, True),
        ({"model": {"towers": {"image": "a"}}}, False),
        (penalised(strength=0.1), True),
        (penalised(strength={"*": 0.1}, schedule="cosine", head_strength=1), True),
        (penalised(kind="spd", strength=0.1, head_strength=1), False),
        (penalised(kind="l2sp", strength=0.1), False),
    ],
)
def test_schema_accepts_what_is_right_and_nothing_else(
    schema: dict[str, Any], sections: dict[str, Any], right: bool
) -> None:
    assert accepts(schema, {**BASE, **sections}, schema) is right


def test_every_reference_in_the_schema_resolves(schema: dict[str, Any]) -> None:
    named = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)))
    assert named
    assert named <= schema["$defs"].keys()


def test_every_key_of_the_schema_is_described(schema: dict[str, Any]) -> None:
    bare = [
        f"{section}.{key}"
        for section, form in schema["$defs"].items()
        for key, field in form.get("properties", {}).items()
        if "description" not in field and "const" not in field and key != "name"
    ]
    assert bare == []
