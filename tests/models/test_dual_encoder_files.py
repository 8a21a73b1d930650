from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

from hfft.models.dual_encoder import DualEncoderModel
from hfft.models.timm_images import TimmImageProcessor
from tests.dual_models import dual, hearing, pairs, sounds, texts
from tests.fresh import fresh
from tests.text_models import save, tokenizer


@pytest.mark.parametrize(
    ("image", "text"), [("vit", "bert"), ("timm cnn", "t5"), ("dinov3", "bert")]
)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_saved_model_comes_back(image: str, text: str, loss: str, tmp_path: Path) -> None:
    model = dual(image, text, loss=loss)
    model.save_pretrained(tmp_path)
    stored = model.state_dict()
    for auto in (hf.AutoModel, hf.AutoModelForZeroShotImageClassification):
        again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(again, DualEncoderModel)
        assert not any(
            info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        assert all(torch.equal(stored[name], own) for name, own in again.state_dict().items())
        # kernels of convolutions may choose by where in memory weights lie
        found, wanted = (one.eval()(**pairs()).logits_per_text for one in (again, model))
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("audio", ["wav2vec2", "whisper"])
def test_saved_model_of_sounds_comes_back(audio: str, tmp_path: Path) -> None:
    model = hearing(audio)
    model.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path).eval()
    found, wanted = (one(**texts(), **sounds(model)).logits_per_audio for one in (again, model))
    assert torch.equal(found, wanted)


def test_loss_can_be_changed_and_brings_its_bias(tmp_path: Path) -> None:
    model = dual()
    model.save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    config.loss = "sigmoid"
    again, info = hf.AutoModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"] == {"logit_bias"}
    assert again.logit_bias.item() == -10
    assert torch.equal(again.logit_scale, model.logit_scale)


@pytest.mark.parametrize("image", ["vit", "timm cnn"])
def test_pipeline_classifies_images_where_hfft_is_not_installed(image: str, tmp_path: Path) -> None:
    model = dual(image)
    folder = save(model, tmp_path / "model")
    processor: Any = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    if image == "timm cnn":
        processor = TimmImageProcessor(model.config.vision_config.pretrained_cfg, "resnet10t")
    processor.save_pretrained(folder)
    Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "image.png")
    names = ["good", "bad", "many people"]
    scores = fresh(
        f"""
import json
from transformers import pipeline
run = pipeline("zero-shot-image-classification", model={str(folder)!r}, trust_remote_code=True)
found = run({str(tmp_path / "image.png")!r}, candidate_labels={names}, hypothesis_template="a {{}}")
run.model.save_pretrained({str(tmp_path / "again")!r})
print(json.dumps({{one["label"]: one["score"] for one in found}}))
""",
        tmp_path,
    )
    words = tokenizer()([f"a {name}" for name in names], padding=True, return_tensors="pt")
    pixels = processor(Image.open(tmp_path / "image.png"), return_tensors="pt")["pixel_values"]
    words.pop("token_type_ids", None)
    wanted = model(**words, pixel_values=pixels).logits_per_image[0].softmax(0).tolist()
    assert [scores[name] for name in names] == pytest.approx(wanted, abs=1e-5)
    again = hf.AutoModel.from_pretrained(tmp_path / "again")  # its code is here, whoever saved it
    assert isinstance(again, DualEncoderModel)


def test_pipeline_classifies_sounds_where_hfft_is_not_installed(tmp_path: Path) -> None:
    model = hearing("wav2vec2")
    folder = save(model, tmp_path / "model")
    hf.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    wave = torch.randn(800, generator=torch.Generator().manual_seed(2)).tolist()
    found = fresh(
        f"""
import json
import numpy as np
from transformers import pipeline
run = pipeline("zero-shot-audio-classification", model={str(folder)!r}, trust_remote_code=True)
wave = np.array({wave}, dtype=np.float32)
print(json.dumps(run(wave, candidate_labels=["good", "bad"], hypothesis_template="{{}}")))
""",
        tmp_path,
    )
    assert sum(one["score"] for one in found) == pytest.approx(1)
