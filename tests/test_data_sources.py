"""Folders, tables and saved datasets are read, and what can't be is said in full."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from .data_files import (
    IMAGES,
    TEXTS,
    complaint,
    in_memory,
    load,
    pictures,
    rows,
    save,
    table,
)

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


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image,label,image\na,b,c\n", encoding="utf-8")
    assert 'the header names "image" more than once' in complaint(path)


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


# Plain text


def test_lines_of_text_are_examples_and_blank_ones_are_none(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeffone\r\n\n  \ntwo, 2\n\nthree".encode())
    data = load(path, {"text": TEXTS["text"]}, validation="train[:1]")
    assert data.splits["train"]["text"][:] == ["one", "two, 2", "three"]
    assert data.splits["validation"]["text"][:] == ["one"]


def test_folder_of_texts_is_read_by_the_names_of_splits(tmp_path: Path) -> None:
    for name in ("train", "validation", "README"):
        (tmp_path / f"{name}.txt").write_text(f"{name} 1\n{name} 2\n")
    data = load(tmp_path, {"text": TEXTS["text"]}, validation="validation")
    assert data.splits["train"]["text"][:] == ["train 1", "train 2"]
    assert data.splits["validation"]["text"][:] == ["validation 1", "validation 2"]


def test_texts_without_the_name_of_a_split_are_one_split(tmp_path: Path) -> None:
    for name in ("a", "b", "LICENSE"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    data = load(tmp_path, {"text": TEXTS["text"]}, validation="train")
    assert data.splits["train"]["text"][:] == ["a", "b"]


def test_texts_beside_tables_and_images_are_not_the_data(tmp_path: Path) -> None:
    pictures(tmp_path / "images", cat=3, dog=3)
    pictures(tmp_path / "split" / "train", cat=3, dog=3)
    table(tmp_path / "tables" / "reviews.csv", rows(6, "a", "b"))
    for folder in ("images", "split", "tables"):
        (tmp_path / folder / "labels.txt").write_text("cat\ndog\n")
        (tmp_path / folder / "train.txt").write_text("cat/0.png\n")
    assert load(tmp_path / "images", IMAGES).labels == ["cat", "dog"]
    assert load(tmp_path / "split", IMAGES).labels == ["cat", "dog"]
    assert load(tmp_path / "tables").labels == ["a", "b"]


def test_text_in_another_encoding_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("café\n".encode("latin-1"))
    assert "it is not written in UTF-8" in complaint(tmp_path / "d.txt")
    (tmp_path / "d.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    assert "save it as UTF-8" in complaint(tmp_path / "d.csv")


def test_file_of_blank_lines_holds_no_example(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("\n \n")
    assert "holds no example" in complaint(tmp_path / "d.txt")
