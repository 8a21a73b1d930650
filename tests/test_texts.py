"""Texts, captions, numbers, words, answers and chats come in many forms and leave in one."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfft.errors import InputError
from hfft.texts import (
    as_answers_column,
    as_captions_column,
    as_messages_column,
    as_number_column,
    as_text_column,
    as_words_column,
)

from .data_files import lines

TEXT = datasets.Value("string")
ONE = {"text": ["x"], "answer_start": [3]}
NONE: dict[str, list[Any]] = {"text": [], "answer_start": []}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def column(values: list[Any], feature: Any = None) -> datasets.Dataset:
    features = datasets.Features({"c": feature, "n": datasets.Value("int64")}) if feature else None
    rows = {"c": values, "n": list(range(len(values)))}
    return datasets.Dataset.from_dict(rows, features=features)


def mixed(folder: Path, values: list[Any]) -> datasets.Dataset:
    """As datasets reads values of several types out of JSON Lines."""
    path = str(lines(folder / "d.jsonl", [{"c": value} for value in values]))
    cache = str(folder / "cache")
    return datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)


def test_text_is_left_as_it_is_and_blanks_are_flaws() -> None:
    rows = column(["a ", " ", None, "", "\u00a0\n", "b"])
    turned, flaws = as_text_column(rows, "c")
    assert turned is rows
    assert flaws == dict.fromkeys([1, 2, 3, 4], "is empty")


def test_text_that_may_be_blank_has_no_nulls() -> None:
    turned, flaws = as_text_column(column(["a", None, " "]), "c", blank=True)
    assert (turned["c"][:], turned.column_names, flaws) == (["a", "", " "], ["c", "n"], {})


@pytest.mark.parametrize(
    ("values", "feature", "said"),
    [
        ([["a"]], None, "holds lists of string, not text"),
        ([b"a"], None, "holds binary, not text"),
        ([{"a": 1}], None, "holds records of a, not text"),
        ([0], datasets.ClassLabel(names=["a"]), "holds names of classes, not text"),
    ],
)
def test_columns_without_text_are_refused(values: list[Any], feature: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        as_text_column(column(values, feature), "c")


def test_a_caption_alone_becomes_a_list_of_one() -> None:
    for kind in (TEXT, datasets.Value("large_string")):
        turned, flaws = as_captions_column(column(["a", "b c"], kind), "c")
        assert (turned["c"][:], flaws) == ([["a"], ["b c"]], {})
        assert turned.features["c"] == datasets.List(TEXT)
        assert turned.column_names == ["c", "n"]


def test_lists_of_captions_are_left_as_they_are() -> None:
    rows = column([["a", "b"], ["c"]])
    assert as_captions_column(rows, "c") == (rows, {})
    turned, flaws = as_captions_column(column([["a", "b"]], datasets.LargeList(TEXT)), "c")
    assert (turned["c"][:], turned.features["c"], flaws) == ([["a", "b"]], datasets.List(TEXT), {})


def test_missing_and_empty_captions_are_flaws_of_their_rows() -> None:
    said = {
        1: "has an empty caption",
        2: "has an empty caption",
        3: "has no caption",
        4: "has no caption",
    }
    rows = column([["a"], ["b", " "], [None, "c", ""], [], None, ["d"]])
    assert as_captions_column(rows, "c")[1] == said
    parts = datasets.concatenate_datasets([rows.select(range(4)), rows.select([4, 5])])
    assert as_captions_column(parts, "c")[1] == said
    turned, flaws = as_captions_column(column(["a", None, " ", "", "b"]), "c")
    assert flaws == dict.fromkeys([1, 2, 3], "has an empty caption")
    assert (turned["c"][0], turned["c"][4]) == (["a"], ["b"])
    for empty in ([None, None], [[], []]):
        turned, flaws = as_captions_column(column(empty), "c")
        assert (turned.features["c"], flaws) == (
            datasets.List(TEXT),
            dict.fromkeys([0, 1], said[3]),
        )


def test_captions_of_mixed_types_become_lists_and_what_is_no_text_is_a_flaw(tmp_path: Path) -> None:
    values = ["a", ["b", "c"], 3, ["d", 4], {"e": "f"}, [" "], "", ["g", None]]
    turned, flaws = as_captions_column(mixed(tmp_path, values), "c")
    assert (turned["c"][:2], turned.features["c"]) == ([["a"], ["b", "c"]], datasets.List(TEXT))
    assert flaws == {
        2: "is 3, no caption",
        3: "has a caption that is 4, no text",
        4: "is {'e': 'f'}, no caption",
        5: "has an empty caption",
        6: "has an empty caption",
        7: "has an empty caption",
    }


@pytest.mark.parametrize(
    ("values", "holds"),
    [([1], "int64"), ([[1]], "lists of int64"), ([{"a": "b"}], "records of a"), ([b"a"], "binary")],
)
def test_columns_without_captions_are_refused(values: list[Any], holds: str) -> None:
    with pytest.raises(InputError, match=f"holds {holds}, not a caption or a list of them"):
        as_captions_column(column(values), "c")


@pytest.mark.parametrize(
    "values", [[1, 2], [1.0, 2.0], [Decimal("1.0"), Decimal("2.0")], ["1", " 2.0 "], ["1e0", "+2"]]
)
def test_numbers_of_any_kind_become_floats(values: list[Any]) -> None:
    turned, flaws = as_number_column(column(values), "c")
    assert (turned["c"][:], flaws) == ([1.0, 2.0], {})
    assert turned.features["c"] == datasets.Value("float64")
    assert turned.column_names == ["c", "n"]


def test_what_is_no_finite_number_is_a_flaw_that_shows_it(tmp_path: Path) -> None:
    values = ["1", "n/a", "", "inf", None, "1,5"]
    turned, flaws = as_number_column(column(values), "c")
    assert turned["c"][:] == [1.0, None, None, None, None, None]
    assert flaws == {
        1: "is 'n/a', no finite number",
        2: "is empty",
        3: "is 'inf', no finite number",
        4: "is empty",
        5: "is '1,5', no finite number",
    }
    assert as_number_column(column([0.5, float("nan")]), "c")[1].keys() == {1}
    turned, flaws = as_number_column(mixed(tmp_path, [1, "2.5", True]), "c")
    assert (turned["c"][:2], flaws) == ([1.0, 2.5], {2: "is True, no finite number"})


@pytest.mark.parametrize(
    ("values", "feature", "said"),
    [
        ([True], None, "holds bool, not numbers"),
        ([[1]], None, "holds lists of int64, not numbers"),
        ([0], datasets.ClassLabel(names=["a"]), "holds names of classes, not numbers"),
    ],
)
def test_columns_without_numbers_are_refused(values: list[Any], feature: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        as_number_column(column(values, feature), "c")


def test_words_are_left_as_they_are_and_rows_without_them_are_flaws() -> None:
    rows = column([["a", ""], None, [], ["b", None]])
    turned, flaws = as_words_column(rows, "c")
    assert turned is rows
    assert flaws == {
        1: "has no words",
        2: "has no words",
        3: "has a word that is None, no text",
    }


def test_large_lists_and_mixed_ones_become_plain_lists(tmp_path: Path) -> None:
    turned, flaws = as_words_column(column([["a"]], datasets.LargeList(TEXT)), "c")
    assert (turned.features["c"], turned["c"][:], flaws) == (datasets.List(TEXT), [["a"]], {})
    turned, flaws = as_words_column(mixed(tmp_path, [["a"], ["b", 2], "cd"]), "c")
    assert (turned.features["c"], turned["c"][0]) == (datasets.List(TEXT), ["a"])
    assert flaws == {1: "has a word that is 2, no text", 2: "is 'cd', no list"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["a b"], r"holds string, not a list of words an example \(CSV holds no lists; JSON Lines"),
        ([[1, 2]], "holds lists of int64, not a list of words"),
        ([[["a"]]], "holds lists of lists of string, not a list of words"),
        ([1], "holds int64, not a list of words an example$"),
    ],
)
def test_columns_without_words_are_refused(values: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        as_words_column(column(values), "c")


@pytest.mark.parametrize(
    "values",
    [
        [ONE, NONE, None],
        [[{"text": "x", "answer_start": 3, "more": 1}], [], None],
        [{"text": "x", "answer_start": 3}, {"text": None, "answer_start": None}, None],
    ],
)
def test_answers_of_every_form_become_lists(values: list[Any]) -> None:
    turned, flaws = as_answers_column(column(values), "c")
    assert (turned["c"][:], flaws) == ([ONE, NONE, NONE], {})
    assert turned.features["c"]["answer_start"] == datasets.List(datasets.Value("int64"))


def test_answers_of_mixed_forms_become_lists(tmp_path: Path) -> None:
    values = [ONE, {"text": "x", "answer_start": 3}, {}, [{"text": "x", "answer_start": 3}], "x"]
    turned, flaws = as_answers_column(mixed(tmp_path, values), "c")
    assert turned["c"][:4] == [ONE, ONE, NONE, ONE]
    assert flaws == {4: "is 'x', no record"}


def test_answers_in_their_form_are_not_copied() -> None:
    rows = column(
        [ONE, NONE],
        {"text": datasets.List(TEXT), "answer_start": datasets.List(datasets.Value("int64"))},
    )
    assert as_answers_column(rows, "c") == (rows, {})


def test_a_split_without_any_answer_is_read() -> None:
    assert as_answers_column(column([None, None]), "c")[0]["c"][:] == [NONE, NONE]
    assert as_answers_column(column([NONE, NONE]), "c")[0]["c"][:] == [NONE, NONE]


def test_answers_that_lack_something_are_flaws() -> None:
    values = [
        {"text": ["x", "y"], "answer_start": [1]},
        {"text": ["x"], "answer_start": None},
        {"text": [" "], "answer_start": [0]},
        {"text": ["x"], "answer_start": [-1]},
        {"text": ["x"], "answer_start": [None]},
    ]
    assert as_answers_column(column(values), "c")[1] == {
        0: "has text and answer_start of several lengths",
        1: "has an answer whose answer_start is None",
        2: "has an answer whose text is ' '",
        3: "has an answer whose answer_start is -1",
        4: "has an answer whose answer_start is None",
    }


@pytest.mark.parametrize(
    ("value", "holds"), [("x", "string"), (["x"], "lists of string"), ({"text": "x"}, "records of")]
)
def test_columns_without_answers_are_refused(value: Any, holds: str) -> None:
    with pytest.raises(InputError, match=f'holds {holds}.*, not answers of the form {{"text"'):
        as_answers_column(column([value]), "c")


@pytest.mark.parametrize(
    "chat",
    [
        CHAT,
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        [{"from": "user", "value": "Hi", "w": 1}, {"from": "assistant", "value": "Ho", "w": 0}],
        {"role": ["user", "assistant"], "content": ["Hi", "Ho"]},
    ],
)
def test_chats_of_every_form_become_lists_of_messages(chat: Any) -> None:
    turned, flaws = as_messages_column(column([chat, None]), "c")
    assert (turned["c"][0], flaws) == (CHAT, {1: "has no message"})
    assert turned.features["c"] == datasets.List({"role": TEXT, "content": TEXT})


def test_chats_in_their_form_are_not_copied() -> None:
    rows = column([CHAT])
    assert as_messages_column(rows, "c") == (rows, {})


def test_more_rows_than_are_held_at_once_stay_in_order() -> None:
    chats = [[{"from": "human", "value": str(number)}] for number in range(2500)]
    turned, flaws = as_messages_column(column(chats), "c")
    assert [chat[0]["content"] for chat in turned["c"]] == [str(n) for n in range(2500)]
    assert (turned["n"][:], flaws) == (list(range(2500)), {})


def test_messages_that_lack_something_are_flaws(tmp_path: Path) -> None:
    values = [
        [],
        [CHAT[0], {"role": None, "content": "x"}],
        [{"role": "user", "content": None}],
        [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        ["Hi"],
        CHAT,
    ]
    turned, flaws = as_messages_column(mixed(tmp_path, values), "c")
    assert turned["c"][6] == CHAT
    assert flaws == {
        0: "has no message",
        1: "has no role in message 2",
        2: "has no text in message 1",
        3: "calls a tool in message 2, where text alone can be learned",
        4: "has no text in message 1",
        5: "is ['Hi'], no record",
    }


@pytest.mark.parametrize(
    ("value", "holds"), [("x", "string"), (["x"], "lists of string"), ([{"say": "x"}], "lists of")]
)
def test_columns_without_messages_are_refused(value: Any, holds: str) -> None:
    with pytest.raises(InputError, match=f"holds {holds}.*, not messages of the form"):
        as_messages_column(column([value]), "c")
