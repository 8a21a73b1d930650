"""Tiny models of images and texts, and pairs of both, in folders as a user has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
COLOURS = {
    "red": (230, 20, 20),
    "green": (20, 200, 30),
    "blue": (20, 30, 230),
    "yellow": (220, 220, 20),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
}
PLACES = ("left", "right", "top")
WORDS = [*SPECIAL, "a", "photo", "of", "the", "square", "is", "on", ".", *COLOURS, *PLACES]
SIDE = 16

TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 8,
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        bos_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=16,
    )


def image_processor() -> Any:
    return hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )


def clip(**projection: int) -> Any:
    sizes = {"projection_dim": 16, **projection}
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, **sizes))


def siglip() -> Any:
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION))


def dual() -> Any:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**VISION, **still), hf.BertConfig(**TEXT, **still), projection_dim=16
    )
    return hf.VisionTextDualEncoderModel(config)


def save(model: Any, folder: Path) -> Path:
    """Write a model with wide weights, so that a few steps move them, and what prepares for it."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def picture(colour: str, place: str, path: Path) -> str:
    image = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    box = {"left": (0, 4, 8, 12), "right": (8, 4, 16, 12), "top": (4, 0, 12, 8)}[place]
    image.paste(COLOURS[colour], box)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def write_pairs(folder: Path, *, several: bool = False) -> Path:
    """Write 18 pictures, all of them in train and in validation; return the folder."""
    every = [(colour, place) for colour in COLOURS for place in PLACES]
    for split in ("train", "validation"):
        rows = []
        for number, (colour, place) in enumerate(every):
            name = picture(colour, place, folder / f"{split}-{number}.png")
            captions = [f"the {colour} square is on the {place}", f"a {colour} square"]
            said = {"captions": captions} if several else {"caption": captions[0]}
            rows.append({"image": name, **said})
        lines = "\n".join(map(json.dumps, rows))
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def write_classes(folder: Path) -> Path:
    """Write pictures in folders by colour; return the folder."""
    for split in ("train", "validation"):
        for colour in COLOURS:
            for place in PLACES:
                picture(colour, place, folder / split / colour / f"{place}.png")
    return folder


def write_config(path: Path, model: Any, data: Path, /, **sections: Any) -> Path:
    config: dict[str, Any] = {
        "task": {"name": "zero-shot-image-classification", "augmentation": "none"},
        "model": str(model) if isinstance(model, Path) else model,
        "data": {"path": str(data)},
        "strategy": "full",
        "training": {
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 6,
            "use_cpu": True,
        },
        "output_dir": str(path.parent / "run"),
    }
    if "stages" in sections:
        del config["strategy"]
    path.write_text(yaml.safe_dump(config | sections), encoding="utf-8")
    return path
