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
    is_multi_hot,
    list_problems,
    listing,
    lone_problems,
    lookalikes,
    natural_sort,
    read_label_lists,
    read_labels,
    recode,
    unknown_problems,
)


def read(values: list[Any], feature: Any = None) -> LabelColumn:
    features = datasets.Features({"label": feature}) if feature else None
    return read_labels(datasets.Dataset.from_dict({"label": values}, features=features), "label")


def read_lists(values: list[Any], feature: Any = None, first: str | None = None) -> LabelColumn:
    features = datasets.Features({"tags": feature}) if feature else None
    rows = datasets.Dataset.from_dict({"tags": values}, features=features)
    return read_label_lists(rows, "tags", first)


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


def test_fractions_in_lists_of_labels_are_not_told_to_be_a_regression() -> None:
    dataset = datasets.Dataset.from_dict({"tags": [[0.5, 1.0], [2.0]]})
    with pytest.raises(InputError, match=r"fractions such as 0.5.*not names of classes$"):
        read_label_lists(dataset, "tags")


def test_fractions_are_not_classes() -> None:
    with pytest.raises(
        InputError, match=r"such as 0\.5, which are quantities, .*problem_type: regression"
    ):
        read([0.5, 1.0])


def test_lists_are_not_classes() -> None:
    with pytest.raises(
        InputError, match=r"lists of string, .*problem_type: multi_label_classification"
    ):
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


# Lists of labels


@pytest.mark.parametrize(
    ("values", "names", "ids", "lengths"),
    [
        ([["b", "a"], [], ["a"], None], ["a", "b"], [1, 0, 0], [2, 0, 1, -1]),
        ([[10, 2], [1]], ["1", "2", "10"], [2, 1, 0], [2, 1]),
        ([["a", None, " "]], ["a"], [0, -1, -1], [3]),
        ([[], []], [], [], [0, 0]),
    ],
)
def test_lists_are_read_one_after_another(
    values: list[Any], names: list[str], ids: list[int], lengths: list[int]
) -> None:
    found = read_lists(values)
    assert found.lengths is not None
    assert (found.names, found.ids.tolist()) == (names, ids)
    assert (found.lengths.tolist(), found.declared) == (lengths, False)


def test_declared_classes_of_lists_keep_their_order() -> None:
    for kind in (datasets.List, datasets.LargeList):
        feature = kind(datasets.ClassLabel(names=["z", "O", "a"]))
        found = read_lists([[2, 0], [1]], feature, first="O")
        assert (found.names, found.ids.tolist()) == (["z", "O", "a"], [2, 0, 1])
        assert found.declared


def test_one_class_can_be_put_first() -> None:
    found = read_lists([["B-10", "O", "B-2", "A"]], first="O")
    assert (found.names, found.ids.tolist()) == (["O", "A", "B-2", "B-10"], [3, 0, 2, 1])
    assert read_lists([["B", "A"]], first="O").names == ["A", "B"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["a"], "holds string, not a list of names of classes an example"),
        ([[["a"]]], "holds lists of string, not names of classes"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(values: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_lists(values)


def test_examples_with_a_label_missing_in_their_list_are_known() -> None:
    assert read_lists([["a"], None, [], ["a", None, None]]).missing.tolist() == [1, 3]
    assert read(["a", None, " "]).missing.tolist() == [1, 2]


def test_labels_of_chosen_examples_are_found_in_the_lists() -> None:
    found = read_lists([["a", "b"], None, [], ["c"], ["d", "e"]])
    assert found.places(np.array([0, 2, 4])).tolist() == [0, 1, 3, 4]


def test_encoded_lists_keep_their_lengths_and_the_order_of_columns() -> None:
    tags = [["b", "a"], [], None, ["x"]]
    rows = datasets.Dataset.from_dict({"tags": tags, "n": [0, 1, 2, 3]})
    found = read_label_lists(rows, "tags")
    encoded = encode(rows, "tags", recode(found, ["b", "a"]), ["b", "a"], found.lengths)
    assert encoded[:] == {"tags": [[0, 1], [], [], [MISSING]], "n": [0, 1, 2, 3]}
    assert encoded.features["tags"] == datasets.List(datasets.ClassLabel(names=["b", "a"]))
    only = encode(rows.select_columns(["tags"]), "tags", found.ids, found.names, found.lengths)
    assert only["tags"][:] == [[1, 0], [], [], [2]]


def test_lists_may_declare_classes_without_an_example() -> None:
    feature = datasets.List(datasets.ClassLabel(names=["a", "b", "rare"]))
    columns = {"train": read_lists([[0], [1]], feature)}
    names, _, problems = agree(columns, {"train": np.arange(2)}, {"train": "data.train"})
    assert (names, problems) == (["a", "b", "rare"], [])


def test_lists_of_nothing_but_one_class_are_a_problem() -> None:
    (message,) = list_problems(np.array([1, 1]), ["a", "O"], 0, "data.train")
    assert message.startswith('data.train: every label is "O"; there is nothing to tell apart')
    assert list_problems(np.array([1, 1]), ["a", "O"], 1, "data.train") == []
    assert list_problems(np.array([]), ["a"], 2, "data.train") == [
        "data.train: no labelled example is left"
    ]


def test_classes_of_lists_come_from_the_training_rows_that_count() -> None:
    columns = {
        "train": read_lists([["a", "b"], ["c"]]),
        "test": read_lists([["b"], ["c", "c"]]),
    }
    rows = {"train": np.array([0]), "test": np.array([0, 1])}
    names, ids, problems = agree(columns, rows, {"train": "data.train", "test": "data.test"})
    assert (names, ids["test"].tolist()) == (["a", "b"], [1, UNKNOWN, UNKNOWN])
    assert problems == ['data.test: labels that data.train doesn\'t have: "c" (2 times)']


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 1, 1], [1, 0, 0]], True),
        ([[0.0, 0.0], [1.0, 0.0]], True),
        ([[True, True], [False, False]], True),
        ([["0", "1"], ["1"]], False),
        ([["a", "a"], ["b", "b"]], False),
        ([[0, None], [1]], False),
    ],
)
def test_zeros_and_ones_of_every_class_are_told_from_names(
    values: list[Any], expected: bool
) -> None:
    assert is_multi_hot(read_lists(values)) == expected
