"""A config file is read as people mean it, and dotted overrides reach any place in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfft.errors import InputError
from hfft.yaml_file import apply_override, read_yaml


def parsed(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def message(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        parsed(folder, text)
    return str(caught.value)


def overridden(values: dict[str, Any], *assignments: str) -> dict[str, Any]:
    for assignment in assignments:
        apply_override(values, assignment)
    return values


@pytest.mark.parametrize(
    ("text", "number"),
    [("5e-5", 5e-5), ("1E3", 1e3), ("-2.5e-1", -0.25), (".5e1", 5.0), ("1.e+2", 100.0)],
)
def test_exponents_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    assert parsed(tmp_path, f"rate: {text}") == {"rate": number}
    assert overridden({}, f"rate={text}") == {"rate": number}


@pytest.mark.parametrize("text", ["e5", "5e", "1e5x", "v1e5", "'5e-5'"])
def test_what_only_resembles_an_exponent_is_text(tmp_path: Path, text: str) -> None:
    assert parsed(tmp_path, f"name: {text}") == {"name": text.strip("'")}


def test_key_that_stands_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    said = message(tmp_path, "seed: 1\ntraining:\n  max_steps: 2\n  max_steps: 3\n")
    assert "the key 'max_steps' stands twice" in said
    assert "line 4" in said


def test_same_key_in_two_sections_is_no_duplicate(tmp_path: Path) -> None:
    assert parsed(tmp_path, "a: {name: x}\nb: {name: y}") == {
        "a": {"name": "x"},
        "b": {"name": "y"},
    }


@pytest.mark.parametrize("text", ["? [a, b]\n: 1", "? {a: b}\n: 1"])
def test_key_that_is_no_word_is_an_error(tmp_path: Path, text: str) -> None:
    assert "a key is a plain word" in message(tmp_path, text)


@pytest.mark.parametrize(("key", "kind"), [("no", "bool"), ("1", "int"), ("~", "null")])
def test_key_that_is_read_as_another_type_is_an_error(tmp_path: Path, key: str, kind: str) -> None:
    said = message(tmp_path, f"seed: 1\n{key}: 2\n")
    assert f"the key {key} is read as {kind}; quote it" in said
    assert "line 2" in said


@pytest.mark.parametrize("value", ["2020-13-45", "9" * 5000, "[" * 3000])
def test_value_that_the_parser_breaks_on_is_an_error(tmp_path: Path, value: str) -> None:
    assert "not valid YAML" in message(tmp_path, f"seed: {value}")
    with pytest.raises(InputError, match="the value is not valid YAML"):
        overridden({}, f"seed={value}")


@pytest.mark.parametrize(("text", "kind"), [("", "nothing"), ("- a", "list"), ("word", "str")])
def test_file_without_keys_is_an_error(tmp_path: Path, text: str, kind: str) -> None:
    assert f"expected `key: value` lines, found {kind}" in message(tmp_path, text)


def test_broken_yaml_is_an_error_with_its_line(tmp_path: Path) -> None:
    said = message(tmp_path, "seed: 1\ntraining: [\n")
    assert "config.yaml: not valid YAML" in said
    assert "line 3" in said


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "cats_vs_dogs.yaml").touch()
    with pytest.raises(InputError) as caught:
        read_yaml(tmp_path / "cat_vs_dogs.yaml")
    assert f"did you mean {tmp_path / 'cats_vs_dogs.yaml'}?" in str(caught.value)


def test_missing_file_without_a_neighbour_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no such config file$"):
        read_yaml(tmp_path / "nowhere" / "config.yaml")


def test_folder_and_binary_file_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_yaml(tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read"):
        read_yaml(tmp_path / "weights.yaml")


# Overrides


def test_override_sets_replaces_and_makes_sections() -> None:
    values = {"seed": 1, "training": {"max_steps": 5}}
    assert overridden(
        values, "seed=2", "training.max_steps=10", "training.bf16=true", "hub.repo_id=me/x"
    ) == {
        "seed": 2,
        "training": {"max_steps": 10, "bf16": True},
        "hub": {"repo_id": "me/x"},
    }


def test_override_values_are_yaml() -> None:
    values = overridden({}, "a=[x, 1]", "b={k: v}", "c=", "d=1e-3", "e=x=y", 'f="7"')
    assert values == {"a": ["x", 1], "b": {"k": "v"}, "c": None, "d": 1e-3, "e": "x=y", "f": "7"}


def test_override_reaches_into_lists_by_number() -> None:
    values = {"stages": [{"name": "a"}, {"name": "b"}]}
    overridden(values, "stages.1.epochs=2", "stages.0={name: c}")
    assert values == {"stages": [{"name": "c"}, {"name": "b", "epochs": 2}]}


@pytest.mark.parametrize("number", ["2", "-1", "first"])
def test_place_that_a_list_lacks_is_an_error(number: str) -> None:
    with pytest.raises(InputError, match="expected a number from 0 to 1"):
        overridden({"stages": [{}, {}]}, f"stages.{number}.epochs=2")


@pytest.mark.parametrize("section", ["task", "model", "strategy"])
def test_option_of_what_is_given_by_name_alone_keeps_the_name(section: str) -> None:
    values = overridden({section: "some"}, f"{section}.option=3")
    assert values == {section: {"name": "some", "option": 3}}


def test_option_of_a_baseline_that_is_given_by_name_alone_keeps_the_name() -> None:
    values = overridden({"baselines": ["scratch", "frozen"]}, "baselines.1.epochs=2")
    assert values == {"baselines": ["scratch", {"name": "frozen", "epochs": 2}]}


def test_value_has_no_keys_below_it() -> None:
    with pytest.raises(InputError, match=r"'data\.path\.x=1': data\.path is a value"):
        overridden({"data": {"path": "here"}}, "data.path.x=1")


@pytest.mark.parametrize("assignment", ["seed", "=3", "a..b=1", ".a=1", "--resume"])
def test_malformed_override_shows_the_form(assignment: str) -> None:
    with pytest.raises(InputError, match="expected key=value, such as seed=1"):
        overridden({}, assignment)


def test_override_that_is_no_yaml_is_an_error() -> None:
    with pytest.raises(InputError, match=r"'seed=\[': the value is not valid YAML"):
        overridden({}, "seed=[")


@pytest.mark.parametrize(
    ("items", "said"), [([], "the list is empty"), ([{}], "expected a number from 0 to 0")]
)
def test_override_of_an_item_that_is_not_there_is_an_error(items: list[Any], said: str) -> None:
    for number in ("1", "²", "-1"):
        with pytest.raises(InputError, match=said):
            overridden({"stages": items}, f"stages.{number}.epochs=1")
