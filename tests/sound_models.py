"""Tiny models of sounds and texts, and tones with captions, in folders as a user has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers as hf

from tests.dual_models import AUDIO_TOWERS
from tests.pair_models import COLOURS, TEXT, tokenizer, write_config

RATE = 16_000
HERTZ = {colour: 300.0 * 1.5**n for n, colour in enumerate(COLOURS)}
"""The colour of a tone."""


def extractor(kind: str) -> Any:
    if kind == "ast":
        return hf.ASTFeatureExtractor(num_mel_bins=16, max_length=32)
    return hf.Wav2Vec2FeatureExtractor(do_normalize=True)


def save_towers(folder: Path, kind: str = "wav2vec2") -> dict[str, str]:
    """Write an audio and a text tower; return what `model.towers` names."""
    torch.manual_seed(0)
    text = hf.BertModel(hf.BertConfig(**TEXT, hidden_dropout_prob=0.0), add_pooling_layer=False)
    audio = hf.AutoModel.from_config(AUDIO_TOWERS[kind][0])
    text.save_pretrained(folder / "text")
    tokenizer().save_pretrained(folder / "text")
    audio.save_pretrained(folder / "audio")
    extractor(kind).save_pretrained(folder / "audio")
    return {name: str(folder / name) for name in ("audio", "text")}


def save_tone(path: Path, colour: str, seconds: float = 0.2, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * HERTZ[colour] * times), rate)
    return path


def write_tones(folder: Path) -> Path:
    """Write a tone of every colour, in two lengths, for train and validation; return the folder."""
    for split in ("train", "validation"):
        rows = []
        for number, (colour, seconds) in enumerate((c, s) for c in COLOURS for s in (0.15, 0.2)):
            path = save_tone(folder / f"{split}-{number}.wav", colour, seconds)
            rows.append({"audio": path.name, "caption": f"a {colour} square"})
        lines = "\n".join(map(json.dumps, rows))
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def write_tone_classes(folder: Path) -> Path:
    """Write tones in folders by colour; return the folder."""
    for split in ("train", "validation"):
        for colour in COLOURS:
            for number, seconds in enumerate((0.15, 0.2)):
                save_tone(folder / split / colour / f"{number}.wav", colour, seconds)
    return folder


def config(path: Path, towers: dict[str, str], data: Path, /, **sections: Any) -> Path:
    """Write a config of the task; a `task` among the sections adds to its options."""
    task = {"name": "zero-shot-audio-classification", **sections.pop("task", {})}
    model = {"towers": towers, "projection": 8}
    return write_config(path, model, data, task=task, **sections)
