"""Few labelled images: the quickstart's network and recipe on 5 or 10 jittered digits a class.

`few_labels.py` runs this. The source is `models/glyph-resnet`, pretrained on letters and symbols.
Validation (300 images) and test (900) stay the same; a seed draws the training images, the head and
the order. All methods take the same number of optimizer steps.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import hfft

ROOT = Path(__file__).resolve().parents[1]
SIZES = (5, 10)
"""Training images a class."""
TUNING_SEEDS = (100, 101, 102)
MOST_PER_CLASS = 49  # digits of the rarest class that are in neither validation nor test
STEPS, BATCH = 84, 25
HEAD_RATE = 1e-2  # of the quickstart's frozen baseline

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "scratch": {"learning_rate": (3e-4, 1e-3, 3e-3)},
    "frozen": {"learning_rate": (3e-3, 1e-2, 3e-2)},
    "full": {"learning_rate": (3e-4, 1e-3, 3e-3)},
    "lp_ft": {"learning_rate": (3e-4, 1e-3, 3e-3)},
    "gradual": {"learning_rate": (3e-4, 1e-3, 3e-3)},
    "l2_sp": {"strength": (0.1, 1.0, 10.0)},
    "cosine": {"strength": (1.0, 10.0, 100.0)},
    "spd": {"strength": (0.3, 1.0, 3.0)},
    "mixout": {"p": (0.5, 0.8, 0.9)},
}
"""Method to the one setting that is tuned, and its values.

What has a strength or a probability goes on top of `full`, at its highest rate.
"""

CHOSEN: dict[int, dict[str, dict[str, float]]] = {
    5: {
        "scratch": {"learning_rate": 3e-3},
        "frozen": {"learning_rate": 3e-3},
        "full": {"learning_rate": 3e-4},
        "lp_ft": {"learning_rate": 1e-3},
        "gradual": {"learning_rate": 1e-3},
        "l2_sp": {"learning_rate": 3e-3, "strength": 0.1},
        "cosine": {"learning_rate": 3e-3, "strength": 10.0},
        "spd": {"learning_rate": 3e-3, "strength": 3.0},
        "mixout": {"learning_rate": 3e-3, "p": 0.9},
    },
    10: {
        "scratch": {"learning_rate": 1e-3},
        "frozen": {"learning_rate": 3e-3},
        "full": {"learning_rate": 1e-3},
        "lp_ft": {"learning_rate": 3e-4},
        "gradual": {"learning_rate": 1e-3},
        "l2_sp": {"learning_rate": 3e-3, "strength": 0.1},
        "cosine": {"learning_rate": 3e-3, "strength": 1.0},
        "spd": {"learning_rate": 3e-3, "strength": 3.0},
        "mixout": {"learning_rate": 3e-3, "p": 0.9},
    },
}
"""What tuning came to: training images a class, to method, to settings."""


def prepare(work: Path) -> None:
    """Draw the digits, unless they are there.

    Args:
        work: the folder for what this benchmark makes.
    """
    script = ROOT / "scripts" / "make_digits.py"
    command = [sys.executable, script, work / "digits", "--per-class", str(MOST_PER_CLASS)]
    subprocess.run([*command, "--jitter", "--seed", "0"], check=True)


def run(
    work: Path, method: str, size: int, seed: int, settings: Mapping[str, float], split: str
) -> dict[str, Any]:
    """Fine-tune once and score.

    Args:
        work: the folder that `prepare` filled.
        method: a key of `GRIDS`.
        size: training images a class.
        seed: draws the training images and seeds the fine-tune.
        settings: `learning_rate`, and `strength` for a penalty or `p` for mixout.
        split: `validation` or `test`.

    Returns:
        The accuracy, the CPU seconds of the call, and the optimizer steps.
    """
    started = time.process_time()
    chosen = {"steps": STEPS, **settings}
    baselines = []
    match method:
        case "scratch":  # a baseline in hfft, which goes with a fine-tune
            baselines = [{"name": "scratch", **chosen}]
            strategy = {"name": "frozen", "steps": 1}
        case "frozen" | "full":
            strategy = {"name": method, **chosen}
        case "lp_ft":
            strategy = {"name": "lp_ft", "head_learning_rate": HEAD_RATE, **chosen}
        case "gradual":
            head = HEAD_RATE / settings["learning_rate"]
            strategy = {"name": "gradual", "head_multiplier": head, **chosen}
        case "mixout":
            strategy = {"name": "full", "mixout": chosen.pop("p"), **chosen}
        case kind:
            penalty = {"kind": kind, "strength": chosen.pop("strength")}
            strategy = {"name": "full", "penalty": penalty, **chosen}
    with TemporaryDirectory(dir=work) as folder:
        train = _draw(work / "digits" / "train", Path(folder) / "train", size, seed)
        values = {
            "data": {
                "path": str(work / "digits"),
                "train": str(train),
                "validation": "validation",
                "test": "test" if split == "test" else None,
            },
            "model": str(ROOT / "models" / "glyph-resnet"),
            "strategy": strategy,
            "baselines": baselines,
            "training.per_device_train_batch_size": min(BATCH, 10 * size),
            "training.use_cpu": True,
            "seed": seed,
            "output_dir": os.path.join(folder, "run"),
        }
        overrides = [f"{key}={_inline(value)}" for key, value in values.items()]
        metrics = hfft.train(ROOT / "configs" / "quickstart.yaml", overrides).metrics
    scores = metrics["baselines"]["scratch"] if method == "scratch" else metrics
    return {
        "accuracy": scores["test" if split == "test" else "eval"]["accuracy"],
        "seconds": round(time.process_time() - started, 1),
        "steps": STEPS if baselines else sum(stage["steps"] for stage in metrics["stages"]),
    }


def _draw(pool: Path, folder: Path, size: int, seed: int) -> Path:
    """Copy a random sample of every class; a larger sample of a seed holds the smaller."""
    rng = random.Random(seed)
    for label in sorted(pool.iterdir()):
        images = sorted(label.iterdir())
        rng.shuffle(images)
        (folder / label.name).mkdir(parents=True)
        for image in images[:size]:
            shutil.copy(image, folder / label.name)
    return folder


def _inline(value: object) -> str:
    """Write a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()
