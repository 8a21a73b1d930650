"""Runs with and without stored features, side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hfft

from .runs import largest_difference, losses, metrics, write_config

PLAIN = {"name": "image-classification", "augmentation": "none"}
FLIPPED = {"name": "image-classification", "augmentation": {"horizontal_flip": 0.5}}
SGD = {"optim": "sgd", "learning_rate": 1e-3}
"""For networks with BatchNorm: Adam makes steps of the rounding of gradients that are zero."""


def stages(**second: Any) -> list[dict[str, Any]]:
    """The head alone, then what lies above the second group."""
    return [
        {"name": "head", "freeze": "backbone", "epochs": 1},
        {"name": "top", "freeze": 2, "epochs": 2, **second},
    ]


def config_of(run: Path, model: Path, images: Path, cache: Any, **sections: Any) -> Path:
    """Write the config of a run into `run`; two stages by default."""
    run.parent.mkdir(parents=True, exist_ok=True)
    if "strategy" not in sections:
        sections = {"stages": stages(), **sections}
    sections = {"task": PLAIN, **sections}
    return write_config(
        run.with_suffix(".yaml"),
        model,
        images,
        **{**sections, "feature_cache": cache, "output_dir": str(run)},
    )


def train(run: Path, model: Path, images: Path, cache: Any = "on", **sections: Any) -> Path:
    """Train into the folder `run`; return it."""
    hfft.train(config_of(run, model, images, cache, **sections), overwrite=True)
    return run


def both(
    folder: Path, model: Path, images: Path, on: Any = "on", off: Any = "off", **sections: Any
) -> tuple[Path, Path]:
    """Train with stored features, then without."""
    return (
        train(folder / "stored", model, images, on, **sections),
        train(folder / "computed", model, images, off, **sections),
    )


def stored(run: Path) -> list[bool]:
    """Of each stage, whether it trained on stored features."""
    return [stage["feature_cache"] is not None for stage in metrics(run)["stages"]]


def reused(run: Path) -> list[bool | None]:
    """Of each stage, whether all its features had been there; None: it stored none."""
    found = [stage["feature_cache"] for stage in metrics(run)["stages"]]
    return [None if one is None else one["reused"] for one in found]


def furthest(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference between the losses of two runs, and between their weights."""
    first, second = losses(one), losses(other)
    assert [entry[:3] for entry in first] == [entry[:3] for entry in second]
    apart = max(abs(a[3] - b[3]) for a, b in zip(first, second, strict=True))
    return apart, largest_difference(one, other)


def entries() -> list[Path]:
    """The folders of the entries in this test's feature cache."""
    return sorted(path.parent for path in cache_folder().glob("features/*/manifest.json"))


def chunks() -> list[Path]:
    """The files of all entries; others may be at work in the folder."""
    found = []
    for folder, _, names in os.walk(cache_folder() / "features"):
        found += [Path(folder, name) for name in names if name.endswith(".safetensors")]
    return sorted(found)


def cache_folder() -> Path:
    return Path(os.environ["HFFT_CACHE"])


@contextmanager
def warnings_of_runs() -> Iterator[list[str]]:
    """Collect what runs warn of."""
    found: list[str] = []

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    handler, logger = Collecting(), logging.getLogger("hfft")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
