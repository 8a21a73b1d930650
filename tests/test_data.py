"""Data is found, split and checked before training, and what is wrong is said in full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from PIL import Image

from hfft.data import Column, LoadedData, load_data, load_split
from hfft.errors import InputError

IMAGES = {
    "image": Column("image", ("image", "img", "path", "file_name", "file")),
    "label": Column("label", ("label", "labels", "class", "target")),
}
TEXTS = {
    "text": Column("text", ("text", "sentence")),
    "label": Column("label", ("label", "labels", "class", "target")),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(
    path: Path | str, roles: Mapping[str, Column] = TEXTS, seed: int = 0, **settings: Any
) -> LoadedData:
    config: Any = SimpleNamespace(
        **{
            "path": str(path),
            "train": "train",
            "validation": None,
            "test": None,
            "columns": {},
            "on_bad_example": "error",
            **settings,
        }
    )
    return load_data(config, roles, seed=seed)


def complaint(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(*arguments, **settings)
    return "\n".join(caught.value.messages)


def save(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), colour).save(path)
    return path


def pictures(folder: Path, **classes: int) -> Path:
    for name, count in classes.items():
        for number in range(count):
            save(folder / name / f"{number}.png")
    return folder


def table(path: Path, rows: list[tuple[Any, Any]], header: str = "text,label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(f"{a},{b}" for a, b in rows)]) + "\n", encoding="utf-8")
    return path


def rows(count: int, *classes: str) -> list[tuple[str, str]]:
    return [(f"t{n}", classes[n % len(classes)]) for n in range(count)]


def in_memory(*classes: str, count: int = 20) -> datasets.Dataset:
    texts, labels = zip(*rows(count, *classes), strict=True)
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


# Folders of images


def test_folder_of_classes_is_read_in_natural_order_with_a_tenth_held_out(tmp_path: Path) -> None:
    data = load(pictures(tmp_path, **{"10": 20, "2": 10, "1": 3}), IMAGES)
    assert data.labels == ["1", "2", "10"]
    assert data.splits["train"].features["label"].names == ["1", "2", "10"]
    assert sorted(data.splits["validation"]["label"]) == [0, 1, 2, 2]
    assert len(data.splits["train"]) == 29
    assert data.splits["train"].column_names == ["image", "label"]
    assert not data.splits["train"].features["image"].decode
    assert "held out 4 of the 33 training examples" in data.notes[0]


def test_split_folders_serve_under_their_usual_names(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        pictures(tmp_path / split, cat=2, dog=2)
    data = load(tmp_path, IMAGES, validation="validation", test="test")
    assert [(name, len(split)) for name, split in data.splits.items()] == [
        ("train", 4),
        ("validation", 4),
        ("test", 4),
    ]
    assert data.notes == []


def test_held_out_share_tells_of_a_validation_split_that_goes_unused(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        pictures(tmp_path / split, cat=2, dog=2)
    assert "data.validation: dev" in load(tmp_path, IMAGES).notes[0]


def test_unlabelled_test_folder_is_an_error_only_if_asked_for(tmp_path: Path) -> None:
    pictures(tmp_path / "train", cat=2, dog=2)
    save(tmp_path / "test" / "1.png")
    assert load(tmp_path, IMAGES).labels == ["cat", "dog"]
    assert "data.path: images lie directly in" in complaint(tmp_path, IMAGES, test="test")


def test_odd_names_nested_files_and_upper_case_endings_are_read(tmp_path: Path) -> None:
    for name in ("Über uns/a b.PNG", "Über uns/deep/[1].png", "猫/*.JPG", "猫/x.jpeg"):
        save(tmp_path / name)
    data = load(tmp_path, IMAGES)
    assert data.labels == ["Über uns", "猫"]
    assert sum(len(split) for split in data.splits.values()) == 4


def test_class_folder_without_images_is_named(tmp_path: Path) -> None:
    (pictures(tmp_path, cat=3, dog=3) / "cow").mkdir()
    assert 'no example of "cow", out of 3 classes' in complaint(tmp_path, IMAGES)


def test_single_class_is_an_error(tmp_path: Path) -> None:
    assert 'every example is of one class, "cat"' in complaint(pictures(tmp_path, cat=3), IMAGES)


def test_class_with_one_example_cannot_be_held_out(tmp_path: Path) -> None:
    said = complaint(pictures(tmp_path, cat=3, dog=1), IMAGES)
    assert 'a single example of "dog"' in said
    assert "name validation data in data.validation" in said


def test_slice_of_sorted_classes_is_found_out(tmp_path: Path) -> None:
    said = complaint(
        pictures(tmp_path, a=8, b=1, c=1), IMAGES, train="train[:90%]", validation="train[90%:]"
    )
    assert 'no example of "c"' in said
    assert "a slice of sorted data also loses whole classes" in said


def test_classes_that_train_lacks_are_named_with_counts(tmp_path: Path) -> None:
    pictures(tmp_path / "train", cat=2, dog=2)
    pictures(tmp_path / "val", cat=2, cow=3)
    said = complaint(tmp_path, IMAGES, validation="val")
    assert 'labels that data.train doesn\'t have: "cow" (3 examples)' in said


def test_empty_folder_says_what_it_could_hold(tmp_path: Path) -> None:
    assert "holds neither folders of images" in complaint(tmp_path, IMAGES)


def test_bad_images_of_all_splits_are_named_at_once_ten_each(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pictures(tmp_path / split, cat=3, dog=3)
    for number in range(12):
        (tmp_path / "train" / "cat" / f"bad{number}.png").touch()
    (tmp_path / "val" / "dog" / "worse.png").write_text("no image")
    said = complaint(tmp_path, IMAGES, validation="val")
    assert "12 of 18 images can't be decoded" in said
    assert said.count("the file is empty") == 10
    assert "and 2 more" in said
    assert "worse.png: its content is not an image" in said
    assert "data.on_bad_example: skip" in said


def test_bad_images_can_be_skipped_and_are_listed(tmp_path: Path) -> None:
    bad = pictures(tmp_path, cat=3, dog=3) / "cat" / "bad.png"
    bad.touch()
    data = load(tmp_path, IMAGES, on_bad_example="skip")
    assert data.skipped == [str(bad)]
    assert sum(len(split) for split in data.splits.values()) == 6
    assert "left out 1 of 7 examples" in data.notes[0]


def test_class_of_bad_images_only_is_empty_once_they_are_skipped(tmp_path: Path) -> None:
    (pictures(tmp_path, cat=3, dog=3) / "cow").mkdir()
    (tmp_path / "cow" / "bad.png").touch()
    assert 'no example of "cow"' in complaint(tmp_path, IMAGES, on_bad_example="skip")


def test_same_file_in_two_splits_is_noted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pictures(tmp_path / split, cat=2, dog=2)
    os.symlink(tmp_path / "train" / "cat" / "0.png", tmp_path / "val" / "cat" / "leak.png")
    (note,) = load(tmp_path, IMAGES, validation="val").notes
    assert "data.train and data.validation share 1 example " in note
    assert "leak.png" in note


# Tables


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_table_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"my [data].{ending}"
    if ending == "parquet":
        in_memory("b", "a").to_parquet(path)
    elif ending in ("csv", "tsv"):
        in_memory("b", "a").to_csv(path, sep="\t" if ending == "tsv" else ",")
    else:
        in_memory("b", "a").to_json(path, lines=ending == "jsonl")
    data = load(path)
    assert (data.labels, len(data.splits["train"])) == (["a", "b"], 18)
    assert set(data.splits["train"].features) == {"text", "label"}


def test_folder_of_tables_is_read_by_their_names_and_ignores_others(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", rows(6, "a", "b"))
    table(tmp_path / "val.csv", rows(4, "b", "a"))
    (tmp_path / "sample_submission.csv").write_text("broken\n1,2,3\n")
    data = load(tmp_path, validation="validation")
    assert data.splits["validation"]["label"][:] == [1, 0, 1, 0]


def test_shards_of_one_split_are_read_together(tmp_path: Path) -> None:
    for shard in range(2):
        in_memory("a", "b").to_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet")
    assert len(load(tmp_path, validation="train").splits["train"]) == 40


def test_one_unnamed_table_in_a_folder_is_the_training_split(tmp_path: Path) -> None:
    table(tmp_path / "reviews.csv", rows(6, "a", "b"))
    assert load(tmp_path).labels == ["a", "b"]


def test_two_kinds_of_file_for_one_split_are_ambiguous(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", rows(6, "a", "b"))
    in_memory("a", "b").to_json(tmp_path / "train.jsonl")
    assert "keep or name one file" in complaint(tmp_path)


def test_csv_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("x", name) for name in ("007", "NA", "None", "1e5") * 2])
    assert load(path).labels == ["1e5", "007", "NA", "None"]


def test_csv_with_a_byte_order_mark_has_its_first_column(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path).labels == ["a", "b"]


def test_relative_image_paths_are_relative_to_the_table(tmp_path: Path) -> None:
    pictures(tmp_path / "img", a=2, b=2)
    path = table(
        tmp_path / "d.csv",
        [(f"img/{name}/{n}.png", name) for name in "ab" for n in range(2)],
        "file_name,class",
    )
    data = load(path, IMAGES)
    found = {row["image"]["path"] for split in data.splits.values() for row in split}
    assert found == {str(tmp_path / f"img/{name}/{n}.png") for name in "ab" for n in range(2)}


def test_missing_image_file_of_a_table_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("gone.png", "a"), ("", "b")], "file_name,class")
    said = complaint(path, IMAGES)
    assert "gone.png: there is no such file" in said
    assert "the row names no image" in said


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_table_without_rows_holds_no_example(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.csv").write_text(content)
    assert "holds no example" in complaint(tmp_path / "d.csv")


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_empty_file_holds_no_example(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"d.{ending}").touch()
    assert "holds no example" in complaint(tmp_path / f"d.{ending}")


def test_broken_table_is_named_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('text,label\n"open,a\n')
    assert "EOF inside string" in complaint(tmp_path / "d.csv")
    (tmp_path / "l.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    assert "can't read" in complaint(tmp_path / "l.csv")
    (tmp_path / "d.jsonl").write_text("{]\n")
    assert "data.path: can't read \"" in complaint(tmp_path / "d.jsonl")


def test_rows_longer_than_the_header_are_not_shifted(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [("x", "a,1"), ("y", "b,2")])
    assert "the header has 2 fields, the first row 3" in complaint(path)


def test_column_without_a_name_is_no_obstacle(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [(n, f"t{n},{n % 2}") for n in range(6)], ",text,label")
    assert load(path).labels == ["0", "1"]


def test_table_beside_a_folder_of_images_describes_it(tmp_path: Path) -> None:
    pictures(tmp_path, images=4)
    named = [(f"images/{n}.png", "ab"[n % 2]) for n in range(4)]
    table(tmp_path / "metadata.csv", named, "file_name,label")
    assert load(tmp_path, IMAGES).labels == ["a", "b"]


def test_labels_of_mixed_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y", "label": "one"}\n')
    said = complaint(tmp_path / "d.jsonl")
    assert "can't read" in said or "not names of classes" in said


def test_reader_reports_a_broken_table_once_and_logs_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "d.csv", [("x", "a"), ("y", "b,2")])
    assert complaint(path, validation="train").count("can't read") == 1
    assert capfd.readouterr() == ("", "")


def test_empty_path_and_saved_dataset_without_rows_are_said(tmp_path: Path) -> None:
    assert "data.path: is empty" in complaint("")
    datasets.Dataset.from_dict({"text": [], "label": []}).save_to_disk(tmp_path / "saved")
    assert "holds no example" in complaint(tmp_path / "saved")


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.xlsx").touch()
    assert "is of no single kind out of .csv, .tsv" in complaint(tmp_path / "d.xlsx")


def test_numbers_as_text_become_text(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": n, "label": n % 2}) + "\n" for n in range(6)))
    data = load(path, validation="train")
    assert data.splits["train"]["text"][:2] == ["0", "1"]
    assert data.labels == ["0", "1"]


# Saved datasets and the Hub


def test_saved_dataset_with_images_in_its_rows_is_read(tmp_path: Path) -> None:
    paths = [str(save(tmp_path / f"{n}.png")) for n in range(6)]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a"])}
    )
    columns = {"img": paths, "label": [0, 1] * 3}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    for path in paths:
        Path(path).unlink()
    data = load(tmp_path / "saved", IMAGES)
    assert data.labels == ["z", "a"]
    assert data.splits["train"][0]["image"]["bytes"]


def test_saved_dict_is_read_by_split(tmp_path: Path) -> None:
    splits = {"train": in_memory("a", "b"), "test": in_memory("b", "a", count=4)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", test="test")
    assert data.splits["test"]["label"][:] == [1, 0, 1, 0]


def test_declared_class_without_an_example_is_an_error(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    columns = {"text": ["x"] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    assert 'no example of "c"' in complaint(tmp_path / "saved")


def test_damaged_saved_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    assert "data.path: can't load" in complaint(tmp_path)


def test_hub_dataset_is_asked_for_where_nothing_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def hub(path: str) -> datasets.DatasetDict:
        asked.append(path)
        return datasets.DatasetDict({"train": in_memory("a", "b")})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load("someone/some_data").labels == ["a", "b"]
    assert asked == ["someone/some_data"]


def test_unreachable_hub_is_said_with_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(path: str) -> datasets.DatasetDict:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    said = complaint("someone/some_data")
    assert 'there is no file or folder "someone/some_data"' in said
    assert "nor could it be had from the Hub: Couldn't reach" in said


def test_missing_path_names_the_nearest_and_leaves_the_hub_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    pictures(tmp_path / "data" / "cats_vs_dogs", cat=2, dog=2)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "data" / "cats_v_dogs", "data/cats_v_dogs"):
        assert '(did you mean "cats_vs_dogs"?)' in complaint(path, IMAGES)
    assert 'no file or folder "nothing.csv"' in complaint("nothing.csv")


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


def test_fingerprint_changes_with_a_file_and_with_the_choice(tmp_path: Path) -> None:
    pictures(tmp_path, cat=4, dog=4)
    first = load(tmp_path, IMAGES, validation="train").fingerprint
    assert first == load(tmp_path, IMAGES, validation="train").fingerprint
    assert first != load(tmp_path, IMAGES, validation="train[:6]").fingerprint
    os.utime(tmp_path / "cat" / "0.png", ns=(1, 1))
    assert first != load(tmp_path, IMAGES, validation="train").fingerprint


# One split, for a trained model


def test_split_is_encoded_by_the_models_classes(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(4, "a", "b"))
    split = load_split(str(path), None, TEXTS, labels=["b", "c", "a"])
    assert split["label"][:] == [2, 0, 2, 0]
    assert split.features["label"].names == ["b", "c", "a"]


def test_split_defaults_to_test(tmp_path: Path) -> None:
    datasets.DatasetDict(
        {"train": in_memory("a", "b"), "test": in_memory("a", "b", count=4)}
    ).save_to_disk(tmp_path / "saved")
    assert len(load_split(str(tmp_path / "saved"), None, TEXTS, labels=["a", "b"])) == 4


def test_undecidable_split_is_asked_for(tmp_path: Path) -> None:
    for name in ("train", "extra"):
        table(tmp_path / f"{name}.csv", rows(4, "a", "b"))
    with pytest.raises(InputError, match=r"--split: .* name one of them"):
        load_split(str(tmp_path), None, TEXTS, labels=["a", "b"])


def test_labels_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(4, "a", "x"))
    with pytest.raises(InputError, match=r'the model doesn\'t have: "x" \(2 examples\)'):
        load_split(str(path), "train", TEXTS, labels=["a", "b"])


def test_labels_with_no_name_in_common_say_so(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(4, "0", "1"))
    with pytest.raises(InputError, match=r'no label in .* \("0", "1"\) is one of the model\'s'):
        load_split(str(path), None, TEXTS, labels=["cat", "dog"])


def test_importing_data_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, hfft.data; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
