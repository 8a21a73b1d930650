"""Small data of every kind, written on the spot, and what loading it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from PIL import Image

from hfft.data import Column, LoadedData, load_data
from hfft.errors import InputError

IMAGES = {
    "image": Column("image", ("image", "img", "path", "file_name", "file")),
    "label": Column("label", ("label", "labels", "class", "target")),
}
TEXTS = {
    "text": Column("text", ("text", "sentence")),
    "label": Column("label", ("label", "labels", "class", "target")),
}


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
