"""Columns find their roles: by the config's map, else by usual names, and never two the same."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest

from hfft.errors import InputError
from hfft.roles import Column, Needs, match_roles

PAIR = {
    "text": Column("text", ("text", "sentence")),
    "pair": Column("text", ("pair", "sentence"), optional=True),
    "label": Column("label", ("label", "labels")),
}
EITHER = {
    "text": Column("text", ("text", "body"), optional=True),
    "prompt": Column("text", ("prompt",), optional=True),
    "completion": Column("text", ("completion",), optional=True),
}


def text_before_prompts(found: Collection[str]) -> Collection[str]:
    if "text" in found:
        return ["text"]
    if {"prompt", "completion"} <= set(found):
        return ["prompt", "completion"]
    raise InputError("there is nothing to learn from")


def match(
    there: str,
    columns: dict[str, Column] = PAIR,
    roles: Callable[[Collection[str]], Collection[str]] | None = None,
    **chosen: str,
) -> dict[str, str]:
    needs = Needs(columns, roles) if roles else Needs(columns)
    return match_roles(needs, chosen, there.split(), "here")


def complaint(there: str, *arguments: object, **chosen: str) -> str:
    with pytest.raises(InputError) as caught:
        match(there, *arguments, **chosen)  # type: ignore[arg-type]
    return "\n".join(caught.value.messages)


def test_optional_columns_may_be_absent() -> None:
    assert match("text label") == {"text": "text", "label": "label"}
    assert match("text Pair label x")["pair"] == "Pair"


def test_earlier_role_takes_a_name_that_is_usual_for_two() -> None:
    assert match("sentence label") == {"text": "sentence", "label": "label"}
    assert match("sentence text label") == {"text": "text", "pair": "sentence", "label": "label"}


def test_later_role_tries_its_next_name() -> None:
    columns = {"a": Column("label", ("labels",)), "b": Column("tags", ("labels", "tags"))}
    assert match("labels tags", columns) == {"a": "labels", "b": "tags"}


def test_mapped_columns_are_taken_before_usual_ones() -> None:
    assert match("text sentence label", pair="text") == {
        "text": "sentence",
        "pair": "text",
        "label": "label",
    }


def test_mapped_column_must_exist_even_for_an_optional_role() -> None:
    assert 'data.columns.pair: here has no "x"; its columns are' in complaint(
        "text label", pair="x"
    )


def test_one_column_for_two_roles_is_an_error_that_names_both() -> None:
    said = complaint("text label", text="label", label="label")
    assert 'data.columns.text: "label" of here can\'t serve twice; it is its label' in said
    said = complaint("text label", text="label")
    assert 'data.columns.label: "label" of here can\'t serve twice; it is its text' in said


def test_task_chooses_among_the_roles_found() -> None:
    there = "prompt completion text"
    assert match(there, EITHER, text_before_prompts) == {"text": "text"}
    assert set(match("completion prompt", EITHER, text_before_prompts)) == {"prompt", "completion"}


def test_mapped_roles_come_before_those_found_by_name() -> None:
    chosen = {"prompt": "prompt", "completion": "answer"}
    assert match("prompt answer text", EITHER, text_before_prompts, **chosen) == chosen


def test_missing_roles_are_said_with_the_place() -> None:
    assert complaint("a b", EITHER, text_before_prompts) == "here: there is nothing to learn from"


def test_mapped_role_that_does_not_serve_is_an_error() -> None:
    said = complaint("text prompt", EITHER, text_before_prompts, text="text", prompt="prompt")
    assert said == "data.columns.prompt: here is read without this column"
