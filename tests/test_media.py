"""Images and sounds are found in folders by class, and named in tables in every form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfft.audio import SOUNDS
from hfft.errors import InputError
from hfft.images import IMAGES
from hfft.media import Medium, check

from .data_files import save


def test_finding_ignores_hidden_files_and_takes_upper_case_nested_and_unicode(
    tmp_path: Path,
) -> None:
    for name in ("b c.PNG", "é/ü 1.JPeG", "a.png", ".hidden.png", "__MACOSX/x.png", ".git/y.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    found = [str(path.relative_to(tmp_path)) for path in IMAGES.find(tmp_path)]
    assert found == ["a.png", "b c.PNG", "é/ü 1.JPeG"]


def test_finding_survives_a_loop_of_links(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    os.symlink(tmp_path, tmp_path / "cat" / "loop")
    assert len(list(IMAGES.find(tmp_path))) == 1


def test_linked_class_folder_counts(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "cat")
    assert len(IMAGES.classes(tmp_path / "data")["cat"]) == 1


def test_a_folder_named_train_with_images_is_a_class(tmp_path: Path) -> None:
    for name in ("car", "train"):
        save(tmp_path / name / "a.png")
    assert IMAGES.splits(tmp_path) == {"train": tmp_path}


def test_split_folders_are_recognised_whatever_their_case(tmp_path: Path) -> None:
    for name in ("Train", "val"):
        save(tmp_path / name / "cat" / "a.png")
    assert IMAGES.splits(tmp_path) == {"train": tmp_path / "Train", "val": tmp_path / "val"}


def test_images_outside_any_class_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"directly in .* move each into the folder of its class"):
        IMAGES.classes(tmp_path)


def test_sounds_are_told_from_images(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "cover.png")
    for name in ("a.WAV", "b.flac", "c.ogg", "d.mp3", "e.txt", ".f.wav"):
        (tmp_path / "cat" / name).touch()
    assert [path.name for path in SOUNDS.find(tmp_path)] == ["a.WAV", "b.flac", "c.ogg", "d.mp3"]
    assert [path.name for path in IMAGES.find(tmp_path)] == ["cover.png"]
    (tmp_path / "b.wav").touch()
    with pytest.raises(InputError, match=r"sounds lie directly in .*/CLASS/SOUND\)"):
        SOUNDS.classes(tmp_path)


@pytest.mark.parametrize("medium", [IMAGES, SOUNDS])
@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (["a.x", None, "/b.x"], datasets.Value("string")),
        (["a.x", None, "/b.x"], datasets.Value("large_string")),
        ([{"path": "a.x"}, {"path": None}, {"path": "/b.x"}], {"path": datasets.Value("string")}),
    ],
)
def test_paths_of_every_form_become_undecoded_files(
    medium: Medium, values: list[Any], feature: Any, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict(
        {"c": values, "n": [1, 2, 3]},
        features=datasets.Features({"c": feature, "n": datasets.Value("int64")}),
    )
    turned = medium.as_column(rows, "c", tmp_path)
    assert (turned.column_names, turned.features["c"]) == (["c", "n"], medium.feature)
    first = "a.x" if isinstance(feature, dict) else str(tmp_path / "a.x")
    assert [value["path"] for value in turned["c"]] == [first, None, "/b.x"]
    assert [value["bytes"] for value in turned["c"]] == [None] * 3


@pytest.mark.parametrize("medium", [IMAGES, SOUNDS])
def test_bytes_become_undecoded_files(medium: Medium) -> None:
    turned = medium.as_column(datasets.Dataset.from_dict({"c": [b"x", b"y"]}), "c", None)
    assert turned["c"][:] == [{"path": None, "bytes": b"x"}, {"path": None, "bytes": b"y"}]


@pytest.mark.parametrize(
    ("values", "holds"),
    [([[1]], "lists of int64"), ([{"url": "x"}], "records of url"), ([1], "int64")],
)
def test_columns_of_something_else_are_refused(values: list[Any], holds: str) -> None:
    rows = datasets.Dataset.from_dict({"c": values})
    with pytest.raises(InputError, match=f"holds {holds}, not sounds or paths of sounds"):
        SOUNDS.as_column(rows, "c", None)


def test_a_file_of_many_rows_is_checked_once() -> None:
    looked: list[Any] = []

    def flaw(value: Any) -> str:
        looked.append(value["path"])
        return "bad" if value["path"] == "b" else ""

    features = datasets.Features({"c": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"c": ["a", "b", "a", "b"] * 200}, features=features)
    assert [row for row, _, _ in check(rows, "c", flaw)] == list(range(1, 800, 2))
    assert len(looked) < 50
