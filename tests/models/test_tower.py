from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hfft.models.tower import make_tower, tower_of, width_of
from tests.dual_models import (
    AUDIO_TOWERS,
    IMAGE_TOWERS,
    PICTURE,
    T5,
    TEXT_TOWERS,
    WHISPER,
    dual,
    hearing,
    pairs,
    sounds,
    texts,
)
from tests.text_models import SIZES


@pytest.mark.parametrize(
    ("image", "text"),
    [*((image, "bert") for image in IMAGE_TOWERS), *(("vit", text) for text in TEXT_TOWERS)],
)
def test_every_parameter_of_any_two_towers_learns(image: str, text: str) -> None:
    model = dual(image, text)
    output = model(**pairs(), return_loss=True)
    assert output.logits_per_image.shape == output.logits_per_text.shape == (2, 2)
    for embeds in (output.image_embeds, output.text_embeds):
        assert embeds.shape == (2, 8)
        assert torch.allclose(embeds.norm(dim=1), torch.ones(2))
    output.loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("audio", AUDIO_TOWERS)
def test_every_parameter_of_an_audio_tower_learns(audio: str) -> None:
    model = hearing(audio)
    output = model(**texts(), **sounds(model), return_loss=True)
    assert output.logits_per_image is None
    assert output.logits_per_audio.shape == (2, 2)
    assert torch.allclose(output.audio_embeds.norm(dim=1), torch.ones(2))
    output.loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("audio", ["wav2vec2", "hubert"])
def test_padding_of_a_sound_changes_nothing(audio: str) -> None:
    model = hearing(audio)
    whole = sounds(model)["input_values"]
    mask = torch.ones(2, 800, dtype=torch.long)
    mask[1, 500:] = 0
    padded = whole * mask
    together = model.get_audio_features(input_values=padded, attention_mask=mask).pooler_output
    alone = model.get_audio_features(input_values=whole[1:, :500]).pooler_output
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    unmasked = model.get_audio_features(input_values=padded).pooler_output
    assert not torch.allclose(unmasked[1], alone[0], atol=1e-3)


def test_frames_of_a_spectrogram_count_where_any_of_their_samples_does() -> None:
    model = hearing("whisper")
    features = sounds(model)["input_features"]
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 21:] = 0
    output = model.get_audio_features(input_features=features, attention_mask=mask)
    mean = output.last_hidden_state[1, :11].mean(dim=0)  # two samples a frame
    assert torch.allclose(output.pooler_output[1], model.audio_projection(mean), atol=1e-6)


def test_pretrained_without_a_mask_it_is_not_given_one_but_pools_by_it() -> None:
    model = hearing("wav2vec2 without mask")
    values, mask = sounds(model)["input_values"], torch.ones(2, 800, dtype=torch.long)
    mask[1, 500:] = 0
    with_mask = model.get_audio_features(input_values=values, attention_mask=mask)
    without = model.get_audio_features(input_values=values)
    assert torch.equal(with_mask.last_hidden_state, without.last_hidden_state)
    assert not torch.allclose(with_mask.pooler_output[1], without.pooler_output[1])


def test_pooler_that_is_not_there_is_named() -> None:
    model = dual("vit mae")
    model.config.vision_pooling = "pooler"
    with pytest.raises(ValueError, match="ViTMAEModel has no pooled output"):
        model(**pairs())


def test_model_whose_width_is_not_told_is_named() -> None:
    tower = torch.nn.Module()
    tower.config = hf.PretrainedConfig()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Module: its config doesn't say how wide"):
        width_of(tower, "mean")


@pytest.mark.parametrize(
    "config",
    [
        hf.Dinov2Config(**PICTURE),
        hf.DINOv3ViTConfig(**PICTURE, num_register_tokens=2),
        hf.Dinov2WithRegistersConfig(**PICTURE),
    ],
)
def test_tower_has_nothing_for_masked_patches(config: Any) -> None:
    whole = hf.AutoModel.from_config(config).eval()
    pixels = pairs()["pixel_values"]
    wanted = whole(pixel_values=pixels).pooler_output
    names = {name for name, _ in whole.named_parameters()}
    tower = tower_of(whole)
    assert names - {name for name, _ in tower.named_parameters()} == {"embeddings.mask_token"}
    assert torch.equal(tower(pixel_values=pixels).pooler_output, wanted)


@pytest.mark.parametrize("config", [hf.T5Config(**T5), hf.WhisperConfig(**WHISPER)])
def test_of_an_encoder_decoder_the_encoder_is_a_tower(config: Any) -> None:
    model = hf.AutoModel.from_config(config)
    assert tower_of(model) is model.get_encoder()


def test_tower_that_does_not_use_its_pooler_has_none() -> None:
    config = hf.BertConfig(**SIZES)
    assert make_tower(config, "mean").pooler is None
    assert make_tower(config, "pooler").pooler is not None
