"""Class names: in the order that people expect, whatever the column holds."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from hfft.errors import InputError
from hfft.labels import (
    MISSING,
    UNKNOWN,
    LabelColumn,
    agree,
    class_problems,
    encode,
    hold_out,
    listing,
    lone_problems,
    lookalikes,
    natural_sort,
    read_labels,
    recode,
    unknown_problems,
)


def read(values: list[Any], feature: Any = None) -> LabelColumn:
    features = datasets.Features({"label": feature}) if feature else None
    return read_labels(datasets.Dataset.from_dict({"label": values}, features=features), "label")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["2", "-1", "0", "-10"], ["-10", "-1", "0", "2"]),
        (["img10", "Img2", "img1"], ["img1", "Img2", "img10"]),
        (["b", "A", "a", "B"], ["A", "a", "B", "b"]),
        (["1a", "a1", "01", "1", "²"], ["01", "1", "1a", "a1", "²"]),
        (["é", "", "z 2", "z 10"], ["", "z 2", "z 10", "é"]),
    ],
)
def test_names_sort_naturally(names: list[str], expected: list[str]) -> None:
    assert natural_sort(names) == expected
    assert natural_sort(reversed(names)) == expected


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        (["b", "a", None, " "], ["a", "b"], [1, 0, -1, -1]),
        ([10, 2, None, 1], ["1", "2", "10"], [2, 1, -1, 0]),
        ([True, False], ["False", "True"], [1, 0]),
        ([1.0, 0.0, float("nan"), None], ["0", "1"], [1, 0, -1, -1]),
        ([None, None], [], [-1, -1]),
        ([], [], []),
    ],
)
def test_labels_are_read_from_any_plain_type(
    values: list[Any], names: list[str], ids: list[int]
) -> None:
    found = read(values)
    assert (found.names, found.ids.tolist(), found.declared) == (names, ids, False)


def test_declared_classes_keep_their_order() -> None:
    found = read([1, 0, -1, None], datasets.ClassLabel(names=["z", "a"]))
    assert (found.names, found.ids.tolist(), found.declared) == (["z", "a"], [1, 0, -1, -1], True)


def test_selected_and_sliced_rows_are_read_in_their_order() -> None:
    rows = datasets.Dataset.from_dict({"label": ["a", "b", "c", "d"]})
    assert read_labels(rows.select([3, 0]), "label").ids.tolist() == [1, 0]
    assert read_labels(rows.select(range(2, 4)), "label").names == ["c", "d"]


def test_fractions_are_not_classes() -> None:
    with pytest.raises(InputError, match=r"fractions such as 0\.5, which are quantities"):
        read([0.5, 1.0])


def test_lists_are_not_classes() -> None:
    with pytest.raises(InputError, match="not names of classes"):
        read([["a"], ["b"]])


def test_encoding_keeps_the_rows_and_the_order_of_columns() -> None:
    rows = datasets.Dataset.from_dict({"label": ["b", "a"], "text": ["x", "y"]})
    encoded = encode(rows, "label", np.array([1, UNKNOWN]), ["a", "b"])
    assert encoded.column_names == ["label", "text"]
    assert encoded[:] == {"label": [1, MISSING], "text": ["x", "y"]}
    assert encoded.features["label"].names == ["a", "b"]


def test_recoding_goes_by_name() -> None:
    column = LabelColumn(["a", "b", "x"], np.array([0, 1, 2, -1]))
    assert recode(column, ["b", "a"]).tolist() == [1, 0, UNKNOWN, MISSING]


def test_single_class_is_a_problem_that_names_it() -> None:
    (message,) = class_problems(np.array([1, 1]), ["cat", "dog"], "data.train")
    assert message.startswith('data.train: every example is of one class, "dog"')


def test_empty_classes_are_named_with_the_remedy() -> None:
    (message,) = class_problems(np.array([0, 1]), ["a", "b", "c"], "data.train")
    assert 'no example of "c", out of 3 classes' in message
    assert "leave data.validation out" in message


def test_no_label_at_all_is_one_problem_only() -> None:
    assert class_problems(np.array([-1, -1]), ["a", "b"], "data.train") == [
        "data.train: no labelled example is left"
    ]


def test_unknown_labels_are_named_with_their_counts() -> None:
    column = LabelColumn(["a", "cow", "pig"], np.array([0, 1, 1, 2]))
    (message,) = unknown_problems(column, recode(column, ["a"]), "data.train", "data.test")
    assert message == (
        'data.test: labels that data.train doesn\'t have: "cow" (2 examples), "pig" (1 example)'
    )


def test_lone_examples_are_a_problem_that_names_the_class() -> None:
    (message,) = lone_problems(np.array([0, 0, 1]), ["a", "b"], "data.train")
    assert 'a single example of "b"' in message
    assert "data.validation" in message


def test_classes_come_from_the_training_rows_that_count() -> None:
    columns = {
        "train": LabelColumn(["a", "b", "c"], np.array([0, 1, 2])),
        "test": LabelColumn(["b", "c"], np.array([0, 1])),
    }
    rows = {"train": np.array([0, 1]), "test": np.array([0, 1])}
    names, ids, problems = agree(columns, rows, {"train": "data.train", "test": "data.test"})
    assert names == ["a", "b"]
    assert ids["test"].tolist() == [1, UNKNOWN]
    assert problems == ['data.test: labels that data.train doesn\'t have: "c" (1 example)']


def test_names_that_differ_only_in_case_or_spaces_are_grouped() -> None:
    assert lookalikes(["Cat", "cat ", "dog"]) == [["Cat", "cat "]]


def test_long_listings_are_counted() -> None:
    assert listing(map(str, range(12))).endswith('"9" and 2 more')


def test_held_out_share_is_taken_of_every_class_and_at_least_one() -> None:
    ids = np.array([0] * 50 + [1] * 3)
    kept, held = hold_out(ids, 53, 0.1, seed=0)
    assert np.bincount(ids[held]).tolist() == [5, 1]
    assert sorted([*kept, *held]) == list(range(53))


def test_held_out_rows_depend_on_the_seed_alone() -> None:
    ids = np.arange(100) % 2
    assert np.array_equal(hold_out(ids, 100, 0.1, 3)[1], hold_out(ids, 100, 0.1, 3)[1])
    assert not np.array_equal(hold_out(ids, 100, 0.1, 3)[1], hold_out(ids, 100, 0.1, 4)[1])


def test_rows_without_classes_are_held_out_too() -> None:
    kept, held = hold_out(None, 20, 0.1, seed=0)
    assert (len(kept), len(held)) == (18, 2)


def test_a_single_example_cannot_be_parted() -> None:
    with pytest.raises(ValueError, match="parted"):
        hold_out(np.array([0, 0, 1]), 3, 0.1, seed=0)
