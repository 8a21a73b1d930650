"""What the tests share: one thread, no network, and a data set and models made on the spot."""

from __future__ import annotations

import os

os.environ.update(  # before torch and transformers are imported, and for the processes tests start
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error"
)

from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

torch.set_num_threads(1)

COLOURS = {"1": (200, 40, 40), "2": (40, 200, 40), "10": (40, 40, 200)}
IMAGES_PER_CLASS = {"train": 6, "validation": 3, "test": 3}
SIDE = 32  # pixels


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is prepared out of the user's own caches, and one test's from another's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HFFT_CACHE", str(tmp_path_factory.mktemp("features")))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPLIT/CLASS/IMAGE: noisy squares, a colour a class; `1, 2, 10` is their natural order."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in IMAGES_PER_CLASS.items():
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noisy = colour + random.normal(0, 20, (SIDE, SIDE, 3))
                image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet with BatchNorm of timm's, for images of 32 x 32 pixels and two other classes."""
    folder = tmp_path_factory.mktemp("timm")
    sizes = {"channels": (8, 8, 16, 16), "stem_width": 8}
    made = timm.create_model("resnet10t", num_classes=2, **sizes)
    config = TimmWrapperConfig(
        architecture="resnet10t",
        model_args=sizes,
        num_labels=2,
        pretrained_cfg={**made.pretrained_cfg, "input_size": (3, SIDE, SIDE), "num_classes": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TimmWrapperForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of three blocks with dropout, and its image processor, for 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=8,
        hidden_dropout_prob=0.1,
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder
