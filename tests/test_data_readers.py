"""Shards of tar files, and images with captions in every layout, are read as tables are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from hfft.data import Column
from hfft.data_readers import expand

from .data_files import IMAGES, complaint, lines, load, pictures, rows, save, table

CAPTIONED = {
    "image": Column("image", ("image", "file_name", "jpg", "png")),
    "caption": Column("captions", ("caption", "captions", "txt")),
}
SPOKEN = {
    "audio": Column("audio", ("audio", "wav")),
    "caption": CAPTIONED["caption"],
}


def picture(colour: int = 0, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(800, np.float32), 8_000, format="WAV")
    return buffer.getvalue()


def shard(path: Path, samples: Sequence[Mapping[str, bytes | str | dict[str, Any]]]) -> Path:
    """A tar file of samples; each a file's ending to its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                text = json.dumps(content) if isinstance(content, dict) else content
                encoded = text.encode() if isinstance(text, str) else text
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(encoded)
                archive.addfile(member, io.BytesIO(encoded))
    return path


def pairs(path: Path, *captions: str) -> Path:
    return shard(path, [{"png": picture(n), "txt": text} for n, text in enumerate(captions)])


def captions(data: Any, split: str = "train") -> list[list[str]]:
    return list(data.splits[split]["caption"])


# Shards


def test_a_tar_file_of_images_and_captions_is_read(tmp_path: Path) -> None:
    data = load(pairs(tmp_path / "0000.tar", "a", "b", "c"), CAPTIONED, validation="train[:1]")
    assert captions(data) == [["a"], ["b"], ["c"]]
    assert captions(data, "validation") == [["a"]]
    assert data.splits["train"][1]["image"] == {"path": "0001.png", "bytes": picture(1)}


def test_a_folder_of_shards_is_read_by_the_names_of_splits(tmp_path: Path) -> None:
    for name, text in (("train-0000", "a"), ("train-0001", "b"), ("cc3m-val-00", "c")):
        pairs(tmp_path / f"{name}.tar", text)
    data = load(tmp_path, CAPTIONED, validation="validation")
    assert (captions(data), captions(data, "validation")) == ([["a"], ["b"]], [["c"]])


def test_numbered_shards_beside_what_was_counted_of_them_are_one_split(tmp_path: Path) -> None:
    for number in range(2):
        pairs(tmp_path / f"0000{number}.tar", f"a{number}", f"b{number}")
        (tmp_path / f"0000{number}_stats.json").write_text('{"count": 2}')
        (tmp_path / f"0000{number}.parquet").write_bytes(b"no matter")
    data = load(tmp_path, CAPTIONED, validation="train")
    assert captions(data) == [["a0"], ["b0"], ["a1"], ["b1"]]


def test_shards_in_the_folders_of_splits_are_read(tmp_path: Path) -> None:
    pairs(tmp_path / "train" / "part-0.tar", "a")
    pairs(tmp_path / "train" / "part-1.tar", "b")
    pairs(tmp_path / "val" / "part-0.tar", "c")
    data = load(tmp_path, CAPTIONED, validation="validation")
    assert (captions(data), captions(data, "validation")) == ([["a"], ["b"]], [["c"]])


def test_a_tar_file_beside_folders_of_classes_is_not_the_data(tmp_path: Path) -> None:
    pictures(tmp_path, cat=2, dog=2)
    (tmp_path / "images.tar").write_bytes(b"no matter")
    assert load(tmp_path, IMAGES, validation="train").labels == ["cat", "dog"]


def test_braces_name_several_shards_in_path_and_splits(tmp_path: Path) -> None:
    for number in range(9, 12):
        pairs(tmp_path / "s" / f"t-{number:03d}.tar", str(number))
    pattern = tmp_path / "s" / "t-{009..011}.tar"
    assert captions(load(pattern, CAPTIONED, validation="train")) == [["9"], ["10"], ["11"]]
    chosen = {"train": "t-{009..010}.tar", "validation": "t-{010,011}.tar[50%:]"}
    data = load(tmp_path / "s", CAPTIONED, **chosen)
    assert (captions(data), captions(data, "validation")) == ([["9"], ["10"]], [["11"]])
    said = complaint(tmp_path / "s" / "t-{009..014}.tar", CAPTIONED)
    assert "stands for 6 files, and 3 of them are not there (the first is" in said
    assert "t-012.tar" in said


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a}", ["{a}"]),
        ("{3..1}", []),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(pattern: str, paths: list[str]) -> None:
    assert expand(pattern) == paths


def test_fields_of_json_files_are_columns(tmp_path: Path) -> None:
    samples = [
        {"jpg": picture(n, "JPEG"), "json": {"caption": text, "width": 4}}
        for n, text in enumerate("abc")
    ]
    data = load(shard(tmp_path / "0.tar", samples), CAPTIONED, validation="train")
    assert captions(data) == [["a"], ["b"], ["c"]]
    path = shard(tmp_path / "1.tar", [{**sample, "txt": "own"} for sample in samples])
    mapped = load(path, CAPTIONED, validation="train", columns={"caption": "txt"})
    assert captions(mapped) == [["own"]] * 3
    lists = [{"png": picture(), "json": {"captions": ["a", "b"]}}]
    path = shard(tmp_path / "2.tar", lists)
    assert captions(load(path, CAPTIONED, validation="train")) == [["a", "b"]]


def test_sounds_in_shards_need_no_other_decoder_and_keep_their_names(tmp_path: Path) -> None:
    samples = [{"wav": sound(), "txt": "a"}, {"wav": b"broken", "txt": "b"}]
    path = shard(tmp_path / "0.tar", samples)
    assert "0001.wav: its content is not a sound" in complaint(path, SPOKEN, validation="train")
    data = load(path, SPOKEN, validation="train", on_bad_example="skip")
    assert data.splits["train"][0]["audio"] == {"path": "0000.wav", "bytes": sound()}


def test_damaged_and_empty_samples_of_shards_are_named(tmp_path: Path) -> None:
    samples = [{"png": picture(), "txt": "a"}] * 5 + [{"png": b"?", "txt": " "}, {"txt": "b"}]
    said = complaint(shard(tmp_path / "0.tar", samples), CAPTIONED, validation="train")
    assert "2 of 7 images can't be decoded" in said
    assert "0005.png: its content is not an image" in said
    assert "the row names no image" in said
    assert "row 5 has an empty caption" in said


def test_tar_files_of_something_else_are_named_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"no tar file" * 100)
    assert f'data.path: can\'t read "{tmp_path / "0.tar"}": ' in complaint(
        tmp_path / "0.tar", CAPTIONED
    )
    odd = shard(tmp_path / "1.tar", [{"png": picture(), "txt": "a"}, {"txt": "b"}])
    assert "don't share the same prefix or the same types" in complaint(odd, CAPTIONED)


def test_shards_are_read_anew_once_they_changed(tmp_path: Path) -> None:
    path = pairs(tmp_path / "0.tar", "a")
    first = load(path, CAPTIONED, validation="train")
    pairs(path, "a", "b")
    second = load(path, CAPTIONED, validation="train")
    assert (captions(first), captions(second)) == ([["a"]], [["a"], ["b"]])
    assert first.fingerprint != second.fingerprint


# Captions of images in folders


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl", "train.jsonl"])
@pytest.mark.parametrize("role", ["image", "file_name"])
def test_folder_of_images_with_a_table_of_captions_is_read(
    name: str, role: str, tmp_path: Path
) -> None:
    pictures(tmp_path, images=3)
    lines(tmp_path / name, [{role: f"images/{n}.png", "caption": f"c{n}"} for n in range(3)])
    data = load(tmp_path, CAPTIONED, validation="train")
    assert captions(data) == [["c0"], ["c1"], ["c2"]]
    paths = [value["path"] for value in data.splits["train"]["image"]]
    assert paths == [str(tmp_path / "images" / f"{n}.png") for n in range(3)]


def test_table_of_captions_beside_images_or_several_folders_describes_them(tmp_path: Path) -> None:
    save(tmp_path / "flat" / "a.png")
    save(tmp_path / "flat" / "more" / "b.png")
    save(tmp_path / "flat" / "others" / "c.png")
    lines(tmp_path / "flat" / "metadata.jsonl", [{"image": "a.png", "caption": "a"}] * 2)
    assert captions(load(tmp_path / "flat", CAPTIONED, validation="train")) == [["a"], ["a"]]
    pictures(tmp_path / "deep", train2017=1, val2017=1)
    examples = [{"image": "train2017/0.png", "captions": ["a", "b"]}]
    lines(tmp_path / "deep" / "captions.jsonl", examples)
    assert captions(load(tmp_path / "deep", CAPTIONED, validation="train")) == [["a", "b"]]


def test_tables_in_the_folders_of_splits_describe_them(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        save(tmp_path / split / "a.png")
        lines(tmp_path / split / "metadata.jsonl", [{"file_name": "a.png", "caption": split}] * 2)
    data = load(tmp_path, CAPTIONED, validation="validation")
    assert captions(data) == [["train"]] * 2
    assert captions(data, "validation") == [["validation"]] * 2


def test_one_caption_or_several_of_an_image_are_read_alike(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    path = lines(
        tmp_path / "d.jsonl",
        [{"image": "a.png", "caption": ["x", "y"]}, {"image": "a.png", "caption": "z"}],
    )
    assert captions(load(path, CAPTIONED, validation="train")) == [["x", "y"], ["z"]]
    path = table(tmp_path / "d.csv", [("a.png", "x"), ("a.png", "y")], "image,caption")
    assert captions(load(path, CAPTIONED, validation="train")) == [["x"], ["y"]]


def test_rows_without_captions_are_named_or_left_out_with_a_count(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    given: list[Any] = [["x"], [], ["y", " "], None, ["z"]]
    path = lines(tmp_path / "d.jsonl", [{"image": "a.png", "caption": c} for c in given])
    said = complaint(path, CAPTIONED, validation="train")
    assert "3 of 5 examples have no usable caption:" in said
    for flaw in ("row 1 has no caption", "row 2 has an empty caption", "row 3 has no caption"):
        assert flaw in said
    data = load(path, CAPTIONED, validation="train[:3]", on_bad_example="skip")
    assert captions(data) == [["x"], ["z"]]
    assert "left out 3 of 5 examples" in data.notes[0]


def test_column_without_captions_is_refused_with_its_name(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    path = lines(tmp_path / "d.jsonl", [{"image": "a.png", "caption": n} for n in range(3)])
    assert 'column "caption" of' in (said := complaint(path, CAPTIONED))
    assert "holds int64, not a caption or a list of them an example" in said


def test_several_tables_are_still_told_apart_by_their_names(tmp_path: Path) -> None:
    table(tmp_path / "train" / "part.csv", rows(6, "a", "b"))
    table(tmp_path / "test" / "part.csv", rows(4, "a", "b"))
    data = load(tmp_path, validation="test")
    assert [len(split) for split in data.splits.values()] == [6, 4]
