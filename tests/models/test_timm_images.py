from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

from hfft.models.timm_images import TimmImageProcessor
from tests.dual_models import dual
from tests.families import batchnorm_resnet


@pytest.fixture
def processor() -> Any:
    config = batchnorm_resnet().config
    pretrained = {**config.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 0.5}
    return TimmImageProcessor(pretrained, config.architecture)


def test_images_are_prepared_as_for_a_timm_model_alone(processor: Any) -> None:
    own = hf.TimmWrapperImageProcessor(processor.pretrained_cfg, processor.architecture)
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    found, wanted = (one(image, return_tensors="pt")["pixel_values"] for one in (processor, own))
    assert found.shape == (1, 3, 32, 32)
    assert torch.equal(found, wanted)


def test_it_comes_back_from_the_folder_of_a_model_with_a_timm_tower(
    processor: Any, tmp_path: Path
) -> None:
    dual("timm cnn").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = hf.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is TimmImageProcessor
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    found, wanted = (one(image, return_tensors="pt")["pixel_values"] for one in (again, processor))
    assert torch.equal(found, wanted)


def test_what_prepares_is_read_from_its_own_file_not_from_the_models_config(
    processor: Any, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    found, _ = TimmImageProcessor.get_image_processor_dict(tmp_path)
    assert found["pretrained_cfg"]["crop_pct"] == 0.5
    assert {path.name for path in tmp_path.iterdir()} >= {"preprocessor_config.json"}
    assert not (tmp_path / "config.json").exists()
