"""Small data of every kind, written on the spot, and what loading it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from PIL import Image

from hfft.data import Column, LoadedData, Needs, load_data
from hfft.errors import InputError

IMAGES = {
    "image": Column("image", ("image", "img", "path", "file_name", "file")),
    "label": Column("label", ("label", "labels", "class", "target")),
}
TEXTS = {
    "text": Column("text", ("text", "sentence")),
    "label": Column("label", ("label", "labels", "class", "target")),
}

TAGS = {
    "words": Column("words", ("tokens", "words")),
    "tags": Column("tags", ("ner_tags", "tags", "labels")),
}
TOPICS = {"text": TEXTS["text"], "labels": Column("labels", ("labels", "topics"))}
SCORES = {"text": TEXTS["text"], "label": Column("number", ("label", "score"))}
ANSWERS = {"answers": Column("answers", ("answers",))}
CHATS = {"messages": Column("messages", ("messages", "conversations"))}


def load(
    path: Path | str,
    roles: Mapping[str, Column] | Needs = TEXTS,
    seed: int = 0,
    **settings: Any,
) -> LoadedData:
    needs = roles if isinstance(roles, Needs) else Needs(roles)
    config: Any = SimpleNamespace(
        **{
            "path": str(path),
            "subset": None,
            "train": "train",
            "validation": None,
            "test": None,
            "columns": {},
            "on_bad_example": "error",
            **settings,
        }
    )
    return load_data(config, needs, seed=seed)


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


def lines(path: Path, examples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")
    return path


def topics(path: Path, *labels: list[str] | None) -> Path:
    return lines(path, [{"text": f"t{n}", "labels": names} for n, names in enumerate(labels)])


def rows(count: int, *classes: str) -> list[tuple[str, str]]:
    return [(f"t{n}", classes[n % len(classes)]) for n in range(count)]


def in_memory(*classes: str, count: int = 20) -> datasets.Dataset:
    texts, labels = zip(*rows(count, *classes), strict=True)
    return datasets.Dataset.from_dict({"text": texts, "label": labels})
