"""A model without memory is cut where the real one is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hfft.features.analysis import find_cut
from hfft.features.cut import Cut, NoCutError
from hfft.features.hollow import hollow_model
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups
from tests.families import FAMILIES

from .cases import batch_of, freeze, make

AUTO = {
    "t5": hf.AutoModelForSeq2SeqLM,
    "bart": hf.AutoModelForSeq2SeqLM,
    "clip": hf.AutoModel,
    "segformer-pixels": hf.AutoModelForSemanticSegmentation,
    "gpt2-words": hf.AutoModelForCausalLM,
    "llama-words": hf.AutoModelForCausalLM,
}


def hollow(family: str, config: Any) -> Any:
    images = "images" in FAMILIES[family].inputs
    other = hf.AutoModelForImageClassification if images else hf.AutoModelForSequenceClassification
    return hollow_model(AUTO.get(family, other), config)


def cut_or_reason(model: Any, family: str) -> Cut | str:
    with kept_in_eval(model):
        try:
            return find_cut(model, batch_of(family))
        except NoCutError as error:
            return str(error)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "depths", [(2,), pytest.param((1, 3, 4, 5), marks=pytest.mark.slow)], ids=["2", "others"]
)
def test_a_hollow_model_is_cut_where_the_real_one_is(depths: tuple[int, ...], family: str) -> None:
    real = make(family)
    model = hollow(family, real.config)
    assert type(model) is type(real)
    groups = find_layer_groups(real)
    assert find_layer_groups(model) == groups
    for depth in (n for n in depths if n <= groups.depth):
        found = [cut_or_reason(freeze(one, groups.frozen(depth)), family) for one in (model, real)]
        assert found[0] == found[1]


@pytest.mark.parametrize("family", ["bert", "timm-resnet", "llama-words", "clip"])
def test_its_parameters_take_no_memory_and_its_answers_are_finite(family: str) -> None:
    real = make(family)
    model = hollow(family, real.config)
    for (name, own), (other, parameter) in zip(
        model.named_parameters(), real.named_parameters(), strict=True
    ):
        assert (name, own.shape, own.dtype) == (other, parameter.shape, parameter.dtype)
        assert own.untyped_storage().nbytes() == own.element_size()
        assert not own.is_meta
    with torch.no_grad():
        output = model.eval()(**batch_of(family))
    values = [value for value in output.values() if isinstance(value, torch.Tensor)]
    assert values
    assert all(torch.isfinite(value).all() for value in values)


def test_tied_weights_stay_one() -> None:
    model = hollow("gpt2-words", make("gpt2-words").config)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_large_model_is_made_without_its_memory() -> None:
    config = hf.BertConfig(hidden_size=4096, num_hidden_layers=24, intermediate_size=16_384)
    config.num_attention_heads = 32
    model = hollow_model(hf.AutoModelForSequenceClassification, config)
    assert sum(p.numel() for p in model.parameters()) > 4e9
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 10_000
