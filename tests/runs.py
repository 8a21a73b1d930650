"""Writing configs and comparing what runs leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

TRAINING = {
    "per_device_train_batch_size": 6,
    "per_device_eval_batch_size": 9,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}


def write_config(path: Path, model: Path, images: Path, **sections: Any) -> Path:
    """Write a config of three steps an epoch; sections replace the defaults."""
    values: dict[str, Any] = {
        "task": {"name": "image-classification", "augmentation": {"horizontal_flip": 0.5}},
        "model": str(model),
        "data": {"path": str(images), "validation": "validation"},
        "strategy": {"name": "full", "epochs": 1},
        "output_dir": str(path.parent / "run"),
    }
    values.update(sections)
    values["training"] = {**TRAINING, **sections.get("training", {})}
    if "stages" in sections:
        values.pop("strategy")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended at the same weights, bit for bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[str, str, int, float]]:
    """The training losses of a run: trial, stage, step, loss."""
    return [(e["trial"], e["stage"], e["step"], e["loss"]) for e in log(run) if "loss" in e]


def metrics(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return found
