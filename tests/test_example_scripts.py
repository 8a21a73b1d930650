"""The scripts in examples/ run as they are, offline, on tiny models and a few texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .text_models import TEXTS, causal_folder, classifier_folder, sentence_encoder

ROOT = Path(__file__).parents[1]
TWO_CPU = ROOT / "configs" / "accelerate" / "two_cpu.yaml"
MADE = {
    "plain_trainer": (classifier_folder, TEXTS),
    "sentence_transformers_trainer": (
        lambda folder: sentence_encoder(folder / "encoder").save_pretrained(str(folder)),
        [{"anchor": "a good film", "positive": "many people"}] * 16,
    ),
    "trl_sft": (causal_folder, [{"prompt": "a good film ", "completion": "was seen"}] * 16),
}


def run(name: str, folder: Path, *launcher: str) -> dict[str, Any]:
    """Return the last log entry with a loss."""
    make, rows = MADE[name]
    make(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    own |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    options = {
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "freeze": 2,
        "max-steps": 10,
        "output": folder / "out",
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **own},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [state] = (folder / "out").glob("checkpoint-*/trainer_state.json")
    return next(e for e in json.loads(state.read_text())["log_history"] if "loss" in e)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_example_trains_what_is_not_frozen_and_logs_the_penalty(name: str, tmp_path: Path) -> None:
    entry = run(name, tmp_path)
    assert entry["l2_sp"] > 0
    assert entry["l2_sp_weighted"] > 0
    before, after = weights(tmp_path / "model"), weights(tmp_path / "out")
    moved = {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    layers = {part for n in moved for part in n.split(".") if part.isdigit()}
    assert layers == {"1", "2"}  # layer 0 and the embeddings are frozen
    assert not any("embed" in n for n in moved)


@pytest.mark.slow
def test_example_runs_under_two_processes(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(TWO_CPU)]
    entry = run("plain_trainer", tmp_path, *launch, "--main_process_port", "0")
    assert entry["l2_sp"] > 0
    assert entry["epoch"] == 10 / (len(TEXTS) / 2 / 8)  # each process has half of the examples


def test_every_example_is_short_and_tested() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert scripts.keys() == MADE.keys()
    assert all(text.count("\n") < 60 for text in scripts.values())
    assert all(f"accelerate launch examples/{name}.py" in text for name, text in scripts.items())
