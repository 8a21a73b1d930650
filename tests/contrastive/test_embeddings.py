from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hfft.contrastive.embeddings import Embeddings, check_towers, embed_texts, scale_and_bias
from hfft.errors import InputError
from tests.pair_models import clip, dual, siglip

TEXTS = {
    "input_ids": torch.tensor([[2, 4, 10, 3], [2, 11, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def test_embeddings_of_clips_outputs_give_its_logits() -> None:
    model = clip().eval()
    output = model(**TEXTS, pixel_values=torch.randn(2, 3, 16, 16))
    found = Embeddings.of(output, model, "image")
    logits = found.scale * found.other @ found.text.T
    torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-5, atol=1e-5)
    assert found.bias is None
    assert found.scale.requires_grad


def test_siglip_has_a_bias() -> None:
    model = siglip()
    scale, bias = scale_and_bias(model)
    assert scale == model.logit_scale.exp()
    assert bias is model.logit_bias


def test_texts_are_embedded_without_dropout_and_the_mode_is_kept() -> None:
    model = dual()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    model.train()
    model.vision_model.eval()
    once, again = (embed_texts(model, [TEXTS], torch.device("cpu")) for _ in range(2))
    assert torch.equal(once, again)
    torch.testing.assert_close(once.norm(dim=1), torch.ones(2))
    assert model.text_model.training
    assert not model.vision_model.training


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (clip, "sigmoid", "task.loss: sigmoid needs a logit_bias, which CLIPModel has not"),
        (siglip, "softmax", "set task.loss: sigmoid, as it was pretrained"),
        (lambda: nn.Linear(1, 1), "softmax", "model: Linear has no logit_scale"),
    ],
)
def test_a_model_for_another_loss_is_refused(make: object, kind: str, message: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=re.escape(message)):
        check_towers(make(), kind)


def test_models_are_taken_by_the_loss_they_were_pretrained_with() -> None:
    check_towers(clip(), "softmax")
    check_towers(dual(), "softmax")
    check_towers(siglip(), "sigmoid")
