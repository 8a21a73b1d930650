from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from hfft.layers import find_layer_groups
from hfft.models.dual_encoder import DualEncoderConfig, DualEncoderModel
from tests.dual_models import PICTURE, dual, hearing, pairs, texts
from tests.text_models import SIZES, STILL


def test_it_computes_what_transformers_own_dual_encoder_does() -> None:
    torch.manual_seed(0)
    vision, words = hf.ViTConfig(**PICTURE), hf.BertConfig(**SIZES, **STILL)
    theirs = hf.VisionTextDualEncoderModel(
        hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, words, projection_dim=8)
    ).eval()
    ours = dual("vit with its pooler", "bert with its pooler")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    found, wanted = (model(**pairs(), return_loss=True) for model in (ours, theirs))
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        assert torch.allclose(found[name], wanted[name], atol=1e-6)
    for part in ("image", "text"):
        inputs = {n: v for n, v in pairs().items() if (n == "pixel_values") is (part == "image")}
        features = [getattr(m, f"get_{part}_features")(**inputs) for m in (ours, theirs)]
        assert torch.allclose(features[0].pooler_output, features[1].pooler_output, atol=1e-6)


def test_losses_start_as_clip_and_siglip_do() -> None:
    softmax, sigmoid = dual(), dual(loss="sigmoid")
    assert softmax.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert softmax.logit_bias is None
    assert sigmoid.logit_scale.exp().item() == pytest.approx(10)
    assert sigmoid.logit_bias.item() == -10


def test_sigmoid_loss_of_the_same_embeddings_is_siglips(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    text = {**SIZES, "projection_size": 16, "attention_dropout": 0.0}
    siglip = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=PICTURE)).eval()
    inputs = {"input_ids": texts()["input_ids"], "pixel_values": pairs()["pixel_values"]}
    theirs = siglip(**inputs, return_loss=True)
    model = dual(loss="sigmoid")
    with torch.no_grad():
        model.logit_scale.copy_(siglip.logit_scale.squeeze())
        model.logit_bias.copy_(siglip.logit_bias.squeeze())
    for kind, embeds in (("image", theirs.image_embeds), ("text", theirs.text_embeds)):
        features = SimpleNamespace(pooler_output=3 * embeds)
        monkeypatch.setattr(model, f"get_{kind}_features", lambda *_, found=features: found)
    ours = model(**inputs, return_loss=True)
    for name in ("logits_per_image", "logits_per_text", "loss"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-5)


def test_texts_alone_and_images_alone_are_embedded() -> None:
    model, both = dual(), pairs()
    whole, pixels = model(**both), both.pop("pixel_values")
    words, images = model(**both), model(pixel_values=pixels)
    assert torch.equal(words.text_embeds, whole.text_embeds)
    assert torch.equal(images.image_embeds, whole.image_embeds)
    assert words.logits_per_text is None
    assert words.image_embeds is None
    assert images.text_embeds is None


@pytest.mark.parametrize("image", ["vit", "timm vit", "timm cnn"])
def test_checkpointing_reaches_both_towers_and_changes_no_gradient(image: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = dual(image)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            flags = [
                getattr(m, "gradient_checkpointing", False) for m in model.text_model.modules()
            ]
            assert any(flags)
            if image != "vit":
                assert model.vision_model.timm_model.grad_checkpointing
        model.train()(**pairs(), return_loss=True).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(*both, atol=1e-6) for both in zip(*found, strict=True))


def test_attention_implementation_reaches_both_towers() -> None:
    logits = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = hf.AutoModel.from_config(dual().config, attn_implementation=attention).eval()
        for tower in (model.vision_model, model.text_model):
            assert tower.config._attn_implementation == attention
        logits.append(model(**pairs()).logits_per_text)
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "depth"), [("vit", 3), ("timm cnn", 5), ("timm vit", 3), ("resnet", 3)]
)
def test_groups_are_both_towers_in_order_and_what_joins_them(image: str, depth: int) -> None:
    groups = find_layer_groups(dual(image, loss="sigmoid"))
    assert groups.ordered
    assert {name: len(found) for name, found in groups.towers.items()} == {
        "vision": depth,
        "text": 4,
    }
    assert set(groups.head.parameters) == {
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
        "logit_bias",
    }


def test_groups_of_an_audio_tower_are_in_order() -> None:
    groups = find_layer_groups(hearing("wav2vec2"))
    assert {name: len(found) for name, found in groups.towers.items()} == {"audio": 4, "text": 4}
    names = {"audio_projection.weight", "text_projection.weight", "logit_scale"}
    assert set(groups.head.parameters) == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "hinge"}, "'hinge' is neither softmax nor sigmoid"),
        ({"text_pooling": "median"}, "text_pooling: 'median' is none of pooler, cls"),
    ],
)
def test_unknown_loss_or_pooling_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualEncoderConfig(**fields)


@pytest.mark.parametrize(
    "towers",
    [
        {},
        {"vision_config": hf.ViTConfig()},
        {
            "vision_config": hf.ViTConfig(),
            "audio_config": hf.ASTConfig(),
            "text_config": hf.BertConfig(),
        },
    ],
)
def test_other_than_a_text_tower_and_one_beside_it_is_no_dual_encoder(towers: Any) -> None:
    with pytest.raises(ValueError, match="needs text_config, and vision_config or audio_config"):
        DualEncoderModel(DualEncoderConfig(**towers))
