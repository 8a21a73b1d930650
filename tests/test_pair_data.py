"""Pairs come alike from every form of data: tables, folders, tar files, classes with templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.plan import make_plan

from . import pair_models
from .pair_models import COLOURS, PLACES
from .test_data_readers import shard

EVERY = [(colour, place) for colour in COLOURS for place in PLACES]
CAPTIONS = [f"the {colour} square is on the {place}" for colour, place in EVERY]
Pairs = list[tuple[bytes, str]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_models.save(pair_models.clip(), tmp_path_factory.mktemp("clip"))


def pictures(folder: Path) -> list[Path]:
    """Write 18 pictures, in the order of `EVERY`."""
    names = [f"{number:02d}.png" for number in range(len(EVERY))]
    for (colour, place), name in zip(EVERY, names, strict=True):
        pair_models.picture(colour, place, folder / name)
    return [folder / name for name in names]


def pairs(clip: Path, folder: Path, path: Path | str, **sections: Any) -> Pairs:
    """The pairs that training is handed: an image's bytes, and the text of its tokens."""
    chosen = {"path": str(path), "train": "train", "validation": "train"}
    chosen |= sections.pop("data", {})
    file = pair_models.write_config(folder / "c.yaml", clip, folder, data=chosen, **sections)
    subject = make_plan(load_config(file)).subject
    read = subject.processor.tokenizer.decode
    rows = subject.examples["train"].rows
    return [
        (
            content(rows[n]["image"]),
            read(rows[n]["input_ids"], skip_special_tokens=True),
        )
        for n in range(len(rows))
    ]


def content(value: dict[str, Any]) -> bytes:
    return value["bytes"] or Path(value["path"]).read_bytes()


def expected(files: list[Path]) -> Pairs:
    return [(file.read_bytes(), text) for file, text in zip(files, CAPTIONS, strict=True)]


def rows_of(files: list[Path], key: str = "image") -> list[dict[str, Any]]:
    return [{key: f.name, "caption": text} for f, text in zip(files, CAPTIONS, strict=True)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(folder: Path, files: list[Path]) -> Path:
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    )
    rows = {"image": images, "caption": CAPTIONS}
    (folder / "parquet").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "parquet/train.parquet")
    return folder / "parquet"


def write_shards(folder: Path, files: list[Path], ending: str) -> str:
    samples = [
        {ending: file.read_bytes(), "txt": text} for file, text in zip(files, CAPTIONS, strict=True)
    ]
    for number in range(3):
        shard(folder / f"{number:04d}.tar", samples[6 * number : 6 * number + 6])
    return str(folder / "{0000..0002}.tar")


@pytest.mark.parametrize("form", ["lines", "folder", "csv", "parquet", "png.tar", "jpg.tar"])
def test_every_form_of_data_gives_the_same_pairs(form: str, clip: Path, tmp_path: Path) -> None:
    files = pictures(tmp_path / "images")
    path: Path | str
    if form == "lines":
        path = write_lines(tmp_path / "images" / "train.jsonl", rows_of(files))
    elif form == "folder":  # as datasets' imagefolder has it
        write_lines(tmp_path / "images" / "metadata.jsonl", rows_of(files, "file_name"))
        path = tmp_path / "images"
    elif form == "csv":
        path = tmp_path / "images" / "train.csv"
        lines = [f"{row['image']},{row['caption']}" for row in rows_of(files)]
        path.write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    elif form == "parquet":
        path = write_parquet(tmp_path, files)
    else:
        path = write_shards(tmp_path / "shards", files, form.partition(".")[0])
    assert pairs(clip, tmp_path, path) == expected(files)


def test_each_of_several_captions_makes_a_pair(clip: Path, tmp_path: Path) -> None:
    files = pictures(tmp_path)
    rows = rows_of(files)
    for row, (colour, _) in zip(rows, EVERY, strict=True):
        row["caption"] = [row["caption"], f"a {colour} square"]
    found = pairs(clip, tmp_path, write_lines(tmp_path / "train.jsonl", rows))
    own = expected(files)
    short = [
        (file.read_bytes(), f"a {c} square") for file, (c, _) in zip(files, EVERY, strict=True)
    ]
    assert found == [pair for both in zip(own, short, strict=True) for pair in both]


@pytest.mark.parametrize("form", ["folder", "cls.tar", "lines"])
def test_classes_with_templates_give_a_pair_each(form: str, clip: Path, tmp_path: Path) -> None:
    task = {
        "name": "zero-shot-image-classification",
        "augmentation": "none",
        "templates": ["a photo of a {} square"],
    }
    if form == "folder":
        path = pair_models.write_classes(tmp_path / "classes") / "train"
        files = {f.read_bytes(): f.parent.name for f in path.rglob("*.png")}
    else:
        pictured = pictures(tmp_path / "images")
        named = list(zip(pictured, EVERY, strict=True))
        files = {file.read_bytes(): colour for file, (colour, _) in named}
        if form == "lines":
            rows = [{"image": file.name, "label": colour} for file, (colour, _) in named]
            path = write_lines(tmp_path / "images" / "train.jsonl", rows)
        else:
            order = sorted(COLOURS)
            samples = [
                {"png": file.read_bytes(), "cls": str(order.index(colour))}
                for file, (colour, _) in named
            ]
            path = shard(tmp_path / "0.tar", samples)
            files = {one: str(order.index(colour)) for one, colour in files.items()}
            task["templates"] = ["a photo of a {} ."]
    found = pairs(clip, tmp_path, path, task=task)
    assert {one for one, _ in found} == {*files}
    if form != "cls.tar":  # whose classes are numbers, no words that the tokenizer knows
        assert all(text == f"a photo of a {files[one]} square" for one, text in found)


def test_captions_of_data_with_classes_and_templates_are_what_is_learned(
    clip: Path, tmp_path: Path
) -> None:
    files = pictures(tmp_path)
    rows = [row | {"label": colour} for row, (colour, _) in zip(rows_of(files), EVERY, strict=True)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    task = {
        "name": "zero-shot-image-classification",
        "augmentation": "none",
        "templates": ["a photo of a {} square"],
    }
    assert pairs(clip, tmp_path, path, task=task) == expected(files)


def test_streaming_is_answered_with_what_there_is_instead(clip: Path, tmp_path: Path) -> None:
    data = {"path": "some/dataset", "streaming": True}
    file = pair_models.write_config(tmp_path / "c.yaml", clip, tmp_path, data=data)
    with pytest.raises(InputError) as caught:
        load_config(file)
    [said] = caught.value.messages
    assert "data: there is no streaming: every example is checked before training" in said
    assert "train on a slice, train: train[:10%]" in said
