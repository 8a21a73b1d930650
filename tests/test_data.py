"""Data is split, checked and named before training, and what is wrong is said in full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from hfft.data import Column, Needs, load_scored, load_split
from hfft.errors import InputError
from hfft.sections import DataConfig

from .data_files import (
    IMAGES,
    TEXTS,
    TOPICS,
    complaint,
    in_memory,
    lines,
    load,
    pictures,
    rows,
    table,
    topics,
)

# Splits


def test_slices_are_taken_as_datasets_takes_them(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(20, "a", "b"))
    data = load(path, train="train[:40%]+train[18:]", validation="train[10:12]")
    assert data.splits["train"]["text"][:] == [*(f"t{n}" for n in range(8)), "t18", "t19"]
    assert data.splits["validation"]["text"][:] == ["t10", "t11"]
    assert data.notes == []


def test_overlapping_slices_are_noted_with_the_count(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(20, "a", "b"))
    (note,) = load(path, train="train[:90%]", validation="train[80%:]").notes
    assert "data.train and data.validation share 2 examples" in note


@pytest.mark.parametrize("choice", ["train[:x]", "train[30:]", "train[", "train[1"])
def test_impossible_slices_are_errors_of_their_key(tmp_path: Path, choice: str) -> None:
    path = table(tmp_path / "d.csv", rows(20, "a", "b"))
    assert "data.validation: " in complaint(path, validation=choice)


def test_empty_slice_is_an_error(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(20, "a", "b"))
    assert 'data.validation: "train[5:5]" of' in complaint(path, validation="train[5:5]")


def test_unknown_split_names_those_there_are(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", rows(6, "a", "b"))
    table(tmp_path / "test.csv", rows(6, "a", "b"))
    said = complaint(tmp_path, validation="validation")
    assert 'has no split "validation"; it has the splits "test", "train"' in said


def test_files_and_folders_inside_and_outside_the_path_can_be_chosen(tmp_path: Path) -> None:
    pictures(tmp_path / "in" / "train", cat=2, dog=2)
    pictures(tmp_path / "in" / "more data", cat=2, dog=2)
    pictures(tmp_path / "out", cat=3, dog=2)
    data = load(tmp_path / "in", IMAGES, validation="more data", test=str(tmp_path / "out"))
    assert [len(split) for split in data.splits.values()] == [4, 4, 5]


def test_file_beside_the_file_can_be_chosen_and_sliced(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"))
    table(tmp_path / "e.csv", rows(6, "b", "a"))
    data = load(path, validation="e.csv[:50%]")
    assert data.splits["validation"]["label"][:] == [1, 0, 1]


def test_folder_of_several_splits_is_no_split(tmp_path: Path) -> None:
    for place in ("train", "other/train", "other/val"):
        pictures(tmp_path / place, cat=2, dog=2)
    assert "holds several splits" in complaint(tmp_path, IMAGES, validation="other")


def test_held_out_rows_depend_on_the_seed(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(200, "a", "b"))
    first, again, other = (load(path, seed=seed) for seed in (0, 0, 1))
    assert first.splits["validation"]["text"][:] == again.splits["validation"]["text"][:]
    assert first.splits["validation"]["text"][:] != other.splits["validation"]["text"][:]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not set(first.splits["train"]["text"]) & set(first.splits["validation"]["text"])


# Columns and labels


def test_missing_columns_are_named_with_those_there_are_and_the_remedy(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"), "body,topic")
    said = complaint(path)
    assert said.count('its columns are "body", "topic"') == 2
    assert "`data.columns.label: NAME`" in said
    data = load(path, columns={"text": "body", "label": "topic"})
    assert data.splits["train"].column_names == ["text", "label"]


def test_usual_names_match_whatever_their_case(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"), "Sentence,LABEL")
    assert load(path).labels == ["a", "b"]


def test_columns_can_swap_names(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"), "label,text")
    data = load(path, columns={"text": "label", "label": "text"})
    assert data.labels == ["a", "b"]


def test_mistyped_column_gets_the_nearest(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"))
    said = complaint(path, columns={"label": "lable"})
    assert "data.columns.label: " in said
    assert 'has no "lable" (did you mean "label"?); its columns are "text", "label"' in said


def test_unknown_role_and_missing_path_are_reported_together(tmp_path: Path) -> None:
    said = complaint(tmp_path / "nothing", columns={"txt": "text"})
    assert 'data.columns.txt: the task has no such column (did you mean "text"?)' in said
    assert "there is no file or folder" in said


def test_one_column_cannot_serve_twice(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"))
    assert "can't serve twice" in complaint(path, columns={"text": "label"})


def test_rows_without_labels_are_numbered_or_left_out(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [*rows(6, "a", "b"), ("x", ""), ("y", "")])
    said = complaint(path)
    assert "2 of 8 examples have no label: rows 6, 7 (the first is 0)" in said
    data = load(path, on_bad_example="skip")
    assert sum(len(split) for split in data.splits.values()) == 6
    assert "left out 2 of 8" in data.notes[0]


def test_label_column_of_nothing_but_nulls_is_one_clear_problem(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("x", ""), ("y", "")])
    assert "2 of 2 examples have no label" in complaint(path)
    assert "no usable example is left" in complaint(path, on_bad_example="skip")


def test_row_that_is_bad_twice_is_listed_by_its_file(tmp_path: Path) -> None:
    pictures(tmp_path / "img", a=2, b=2)
    named = [(f"img/{c}/{n}.png", c) for c in "ab" for n in range(2)]
    path = table(tmp_path / "d.csv", [*named, ("gone.png", "")], "path,label")
    data = load(path, IMAGES, on_bad_example="skip")
    assert data.skipped == [str(tmp_path / "gone.png")]


def test_column_of_another_kind_is_refused_with_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [{"text": [n], "label": n / 4, "file": n} for n in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert 'data.columns.label: column "label" of' in complaint(path, IMAGES)
    said = complaint(path, {"text": TEXTS["text"], "image": IMAGES["image"]})
    assert "not text" in said
    assert "not images or paths of images" in said


def test_lookalike_classes_are_noted(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(12, "cat", "Cat", "dog"))
    assert 'The classes "Cat", "cat" differ only in case' in load(path).notes[0]


def test_task_without_labels_needs_none(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(20, "a", "b"))
    data = load(path, {"text": TEXTS["text"]})
    assert (data.labels, data.splits["train"].column_names) == (None, ["text"])
    assert len(data.splits["validation"]) == 2


def test_splits_must_have_the_same_roles(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", [("a", "b,x"), ("c", "d,y")], "text,pair,label")
    table(tmp_path / "val.csv", [("a", "x"), ("c", "y")])
    columns = {**TEXTS, "pair": Column("text", ("pair",), optional=True)}
    assert "has columns for text, label, but data.train for text, label, pair" in complaint(
        tmp_path, columns, validation="val"
    )
    assert load(tmp_path / "val.csv", columns, validation="train").splits["train"].column_names == [
        "text",
        "label",
    ]


def test_fingerprint_changes_with_a_file_and_with_the_choice(tmp_path: Path) -> None:
    pictures(tmp_path, cat=4, dog=4)
    first = load(tmp_path, IMAGES, validation="train").fingerprint
    assert first == load(tmp_path, IMAGES, validation="train").fingerprint
    assert first != load(tmp_path, IMAGES, validation="train[:6]").fingerprint
    os.utime(tmp_path / "cat" / "0.png", ns=(1, 1))
    assert first != load(tmp_path, IMAGES, validation="train").fingerprint


def test_fingerprint_changes_with_the_labels_and_with_how_lists_part_them(tmp_path: Path) -> None:
    prints = set()
    for number, labels in enumerate([(["a", "b"], []), (["a"], ["b"]), (["a"], ["c"])]):
        path = topics(tmp_path / str(number) / "d.jsonl", *labels)
        os.utime(path, ns=(1, 1))
        prints.add(load(path, TOPICS, validation="train").fingerprint)
    assert len(prints) == 3


# One split, for a trained model


def test_split_is_encoded_by_the_models_classes(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(4, "a", "b"))
    split = load_split(str(path), None, Needs(TEXTS), labels=["b", "c", "a"])
    assert split["label"][:] == [2, 0, 2, 0]
    assert split.features["label"].names == ["b", "c", "a"]


def test_split_defaults_to_test(tmp_path: Path) -> None:
    datasets.DatasetDict(
        {"train": in_memory("a", "b"), "test": in_memory("a", "b", count=4)}
    ).save_to_disk(tmp_path / "saved")
    assert len(load_split(str(tmp_path / "saved"), None, Needs(TEXTS), labels=["a", "b"])) == 4


def test_undecidable_split_is_asked_for(tmp_path: Path) -> None:
    for name in ("train", "extra"):
        table(tmp_path / f"{name}.csv", rows(4, "a", "b"))
    with pytest.raises(InputError, match=r"--split: .* name one of them"):
        load_split(str(tmp_path), None, Needs(TEXTS), labels=["a", "b"])


def test_labels_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(4, "a", "x"))
    with pytest.raises(InputError, match=r'the model doesn\'t have: "x" \(2 examples\)'):
        load_split(str(path), "train", Needs(TEXTS), labels=["a", "b"])


def test_labels_with_no_name_in_common_say_so(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(4, "0", "1"))
    with pytest.raises(InputError, match=r'no label in .* \("0", "1"\) is one of the model\'s'):
        load_split(str(path), None, Needs(TEXTS), labels=["cat", "dog"])


def test_lists_of_labels_are_encoded_by_the_models_classes(tmp_path: Path) -> None:
    path = topics(tmp_path / "d.jsonl", ["a", "b"], [], ["b"])
    split = load_split(str(path), None, Needs(TOPICS), labels=["b", "c", "a"])
    assert split["labels"][:] == [[2, 0], [], [0]]
    assert split.features["labels"].feature.names == ["b", "c", "a"]
    with pytest.raises(InputError, match=r'the model doesn\'t have: "b" \(2 times\)'):
        load_split(str(path), None, Needs(TOPICS), labels=["a"])
    nothing = lines(tmp_path / "e.jsonl", [{"text": "x", "labels": []}])
    assert load_split(str(nothing), None, Needs(TOPICS), labels=["a"])["labels"][:] == [[]]


def test_split_without_a_models_classes_keeps_its_labels(tmp_path: Path) -> None:
    path = topics(tmp_path / "d.jsonl", ["a", "b"], [])
    assert load_split(str(path), None, Needs(TOPICS), labels=None)["labels"][:] == [["a", "b"], []]


def test_importing_data_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, hfft.data; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Data that is only scored


@pytest.mark.parametrize(
    ("there", "chosen", "taken"),
    [
        (("train", "validation", "test"), {}, "validation"),
        (("train", "test"), {}, "test"),
        (("train",), {}, "train"),
        (("train", "validation", "test"), {"test": "test"}, "test"),
        (("train", "validation"), {"validation": "train[:2]"}, "train"),
    ],
)
def test_one_split_is_scored(
    there: tuple[str, ...], chosen: dict[str, str], taken: str, tmp_path: Path
) -> None:
    for split in there:
        table(tmp_path / f"{split}.csv", [(f"{split} {n}", "ab"[n % 2]) for n in range(4)])
    data = load_scored(DataConfig(path=str(tmp_path), **chosen), Needs(TEXTS), [])
    assert list(data.splits) == ["validation"]
    texts = data.splits["validation"]["text"][:]
    assert {text.split()[0] for text in texts} == {taken}
    assert len(texts) == (2 if "[" in chosen.get("validation", "") else 4)


@pytest.mark.parametrize(
    ("known", "expected"), [(["c", "b", "a"], ["c", "b", "a"]), (["b", "c"], ["a", "b"])]
)
def test_scored_examples_go_by_the_models_classes_where_it_knows_all_of_theirs(
    known: list[str], expected: list[str], tmp_path: Path
) -> None:
    path = table(tmp_path / "d.csv", rows(4, "a", "b"))
    data = load_scored(DataConfig(path=str(path)), Needs(TEXTS), known)
    assert data.labels == expected
    numbers = data.splits["validation"]["label"][:]
    assert [expected[n] for n in numbers] == ["a", "b", "a", "b"]
