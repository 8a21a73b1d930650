"""Columns of every kind are read and checked, and the rows that are bad are named at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfft.data import Column, Needs
from hfft.errors import InputError

from .data_files import (
    ANSWERS,
    CHATS,
    SCORES,
    TAGS,
    TEXTS,
    TOPICS,
    complaint,
    lines,
    load,
    rows,
    table,
    topics,
)

NESTED = {
    "tags": (TAGS, {"words": [["a", "b"], ["c"]], "tags": [["O", "X"], ["X"]]}),
    "labels": (TOPICS, {"text": ["a", "b"], "labels": [["X", "O"], []]}),
    "messages": (CHATS, {"messages": [[{"role": "user", "content": "a"}]] * 2}),
    "answers": (ANSWERS, {"answers": [{"text": ["a"], "answer_start": [0]}] * 2}),
}
ENCODED = {"tags": [[0, 1], [1]], "labels": [[1, 0], []]}


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("kind", NESTED)
def test_lists_and_records_are_read_from_every_kind_of_file(
    tmp_path: Path, kind: str, ending: str
) -> None:
    roles, columns = NESTED[kind]
    written, path = datasets.Dataset.from_dict(columns), tmp_path / f"d.{ending}"
    if ending == "jsonl":
        written.to_json(path)
    elif ending == "parquet":
        written.to_parquet(path)
    else:
        written.save_to_disk(path)
    data = load(path, roles, validation="train")
    assert data.splits["train"][:] == columns | {kind: ENCODED.get(kind, columns[kind])}
    assert data.labels == (["O", "X"] if kind in ENCODED else None)


# Texts, numbers and lists


def tagged(path: Path, *tags: list[str] | None) -> Path:
    return lines(path, [{"tokens": ["w"] * len(t or [1]), "ner_tags": t} for t in tags])


def test_blank_texts_are_numbered_or_left_out(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [*rows(6, "a", "b"), ("  ", "a"), ("", "b")])
    assert "2 of 8 examples have no text: rows 6, 7 (the first is 0)" in complaint(path)
    data = load(path, on_bad_example="skip")
    assert sum(len(split) for split in data.splits.values()) == 6


def test_texts_that_may_be_blank_are_no_bad_examples(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"text": "a", "more": None}, {"text": "b", "more": "c"}])
    more = Column("text", ("more",), optional=True, blank=True)
    data = load(path, {"text": TEXTS["text"], "more": more}, validation="train")
    assert data.splits["train"]["more"][:] == ["", "c"]


def test_numbers_are_read_from_csv_and_held_out_at_random(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [(f"t{n}", n / 4) for n in range(20)], "text,score")
    data = load(path, SCORES)
    both = [*data.splits["train"]["label"], *data.splits["validation"]["label"]]
    assert sorted(both) == [n / 4 for n in range(20)]
    assert data.labels is None
    assert data.notes[0].endswith("held out 2 of the 20 training examples.")


def test_what_is_no_number_is_shown_by_row_ten_at_most(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("t", "1.5"), *[("t", "n/a")] * 12], "text,score")
    said = complaint(path, SCORES)
    assert "12 of 13 examples have no usable label:\n  row 1 is 'n/a', no finite number\n" in said
    assert said.count("'n/a'") == 10
    assert "and 2 more\n  (the first row is 0). Mend or remove them" in said
    assert "data.on_bad_example: skip" in said
    data = load(path, SCORES, validation="train", on_bad_example="skip")
    assert data.splits["train"]["label"][:] == [1.5]


def test_fractions_and_lists_as_labels_point_to_the_problem_type(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.0}])
    assert "set task.problem_type: regression" in complaint(path)
    path = lines(tmp_path / "e.jsonl", [{"text": "a", "label": ["x", "y"]}])
    assert "set task.problem_type: multi_label_classification" in complaint(path)


def test_tags_are_encoded_by_the_training_splits_classes_with_o_first(tmp_path: Path) -> None:
    path = tagged(tmp_path / "train.jsonl", ["B-10", "O"], ["A"], ["B-2"])
    tagged(tmp_path / "validation.jsonl", ["O", "B-2"])
    data = load(tmp_path, TAGS, validation="validation")
    assert data.labels == ["O", "A", "B-2", "B-10"]
    assert data.splits["train"]["tags"][:] == [[3, 0], [1], [2]]
    assert data.splits["validation"]["tags"][:] == [[0, 2]]
    names = data.splits["validation"].features["tags"].feature.names
    assert (names, path.exists()) == (data.labels, True)


def test_tags_that_train_lacks_are_named_with_how_often_they_are_there(tmp_path: Path) -> None:
    tagged(tmp_path / "train.jsonl", ["O", "A"])
    tagged(tmp_path / "validation.jsonl", ["O", "B", "B"], ["C"])
    said = complaint(tmp_path, TAGS, validation="validation")
    assert 'labels that data.train doesn\'t have: "B" (2 times), "C" (1 times)' in said


def test_rows_without_tags_are_bad_and_tags_of_one_class_teach_nothing(tmp_path: Path) -> None:
    path = tagged(tmp_path / "d.jsonl", ["O", "A"], [], None, ["O", "A"])
    said = complaint(path, TAGS)
    assert "2 of 4 examples have no tags: rows 1, 2 (the first is 0)" in said
    path = tagged(tmp_path / "e.jsonl", ["O", "O"], ["O"])
    assert 'every label is "O"; there is nothing to tell apart' in complaint(path, TAGS)


def test_no_label_may_apply_where_there_may_be_several(tmp_path: Path) -> None:
    data = load(topics(tmp_path / "d.jsonl", *[["b", "a"], []] * 10), TOPICS)
    assert sorted(data.splits["validation"]["labels"]) in ([[], [1, 0]], [[], []], [[1, 0]] * 2)
    assert data.notes[0].endswith("held out 2 of the 20 training examples.")
    data = load(topics(tmp_path / "e.jsonl", ["a"], []), TOPICS, validation="train")
    assert data.labels == ["a"]
    said = complaint(topics(tmp_path / "f.jsonl", ["a"], None, ["b"]), TOPICS)
    assert "1 of 3 examples have no labels: rows 1 (the first is 0)" in said


def test_lists_of_zeros_and_ones_are_refused_as_labels(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"text": "a", "labels": [1, 0, 1]}] * 2)
    assert "holds lists of 0 and 1 for every class, not lists of the names" in complaint(
        path, TOPICS
    )


def test_labels_in_csv_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(4, "a;b", "c"))
    said = complaint(path, TOPICS, columns={"labels": "label"})
    assert 'data.columns.labels: column "label" of' in said
    assert "CSV holds no lists; JSON Lines and Parquet do" in said


# What the task itself finds


def short(batch: Mapping[str, list[Any]]) -> list[str]:
    return [
        f'is row {row}, "{text}"' if len(text) < 3 else ""
        for row, text in zip(batch["index"], batch["text"], strict=True)
    ]


def test_flaws_that_the_task_finds_are_named_or_left_out(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(2005, "a", "b"))
    needs = Needs(TEXTS, flaws=short)
    said = complaint(path, needs)
    assert '10 of 2005 examples can\'t be used:\n  row 0 is row 0, "t0"\n' in said
    data = load(path, needs, on_bad_example="skip")
    assert "left out 10 of 2005 examples" in data.notes[0]


def test_task_is_not_handed_examples_that_are_bad_already(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("", "a"), *rows(4, "a", "b"), ("x", "")])
    said = complaint(path, Needs(TEXTS, flaws=short))
    assert "1 of 6 examples have no text: rows 0" in said
    assert '4 of 6 examples can\'t be used:\n  row 1 is row 1, "t0"' in said
    data = lines(tmp_path / "d.jsonl", [{"text": ["x"], "label": "a"}] * 2)
    assert "holds lists of string, not text" in complaint(data, Needs(TEXTS, flaws=short))


def test_task_must_say_of_every_example_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"))
    with pytest.raises(ValueError, match="zip"):
        load(path, Needs(TEXTS, flaws=lambda batch: [""]))


def test_roles_that_do_not_suffice_are_an_error_of_their_place(tmp_path: Path) -> None:
    def roles(found: Collection[str]) -> Collection[str]:
        raise InputError(f"{sorted(found)} are not enough")

    path = table(tmp_path / "d.csv", rows(6, "a", "b"))
    assert f"\"{path}\": ['label', 'text'] are not enough" in complaint(path, Needs(TEXTS, roles))
