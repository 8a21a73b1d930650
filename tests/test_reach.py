from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hfft.reach import unreached

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
MODELS = {
    "clip": (hf.CLIPConfig(vision_config=SIZES), {"vision_model.post_layernorm.weight"}),
    "siglip": (hf.SiglipConfig(vision_config=SIZES), {"vision_model.head.probe"}),
    "dinov2": (hf.Dinov2Config(**SIZES), {"dinov2.embeddings.mask_token"}),
    "vit": (hf.ViTConfig(**SIZES), set()),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_gets_no_gradient_is_found_without_weights(name: str) -> None:
    config, among = MODELS[name]
    with torch.device("meta"):
        skeleton = hf.AutoModelForImageClassification.from_config(config)
    pixels = torch.randn(2, 3, 32, 32)
    found = unreached(skeleton.train(), {"pixel_values": pixels}, lambda outputs: outputs.logits)
    assert skeleton.training
    assert among <= found
    assert bool(found) == bool(among)
    model = hf.AutoModelForImageClassification.from_config(config)
    model(pixels).logits.pow(2).sum().backward()
    assert found == {n for n, p in model.named_parameters() if p.grad is None}


def test_a_model_that_needs_values_is_taken_as_it_is() -> None:
    class Odd(torch.nn.Linear):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            return self if pixel_values.sum() > 0 else None

    inputs = {"pixel_values": torch.zeros(1, 3, 2, 2)}
    assert unreached(Odd(2, 2), inputs, lambda outputs: outputs) == frozenset()
