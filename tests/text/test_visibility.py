from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hfft.text.visibility import keeps_apart, reads_ahead
from tests.byte_models import SIZES, gpt2


def llama_like(kind: str) -> Any:
    configs = {
        "llama": hf.LlamaConfig,
        "mistral": hf.MistralConfig,
        "qwen3": hf.Qwen3Config,
        "gemma3": hf.Gemma3TextConfig,
    }
    window = {} if kind == "llama" else {"sliding_window": 4}
    sizes = {**SIZES, **window, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(configs[kind](**sizes))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3"])
def test_models_that_mask_by_positions_keep_texts_apart(kind: str) -> None:
    model = llama_like(kind)
    assert keeps_apart(model)
    assert not reads_ahead(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_keeps_texts_apart(attention: str, dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    model.set_attn_implementation(attention)
    assert keeps_apart(model)
    assert not reads_ahead(model)


def test_model_that_remembers_across_texts_does_not() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "state_size": 4, "expand": 2}
    model = hf.MambaForCausalLM(hf.MambaConfig(**sizes))
    assert not reads_ahead(model)
    assert not keeps_apart(model)


def test_model_that_takes_no_positions_does_not() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "n_layer": 1, "n_head": 2}
    model = hf.BloomForCausalLM(hf.BloomConfig(**sizes))
    assert not keeps_apart(model)


def test_encoder_with_a_language_head_reads_ahead() -> None:
    torch.manual_seed(0)
    model = hf.BertLMHeadModel(hf.BertConfig(**{**SIZES, "pad_token_id": 0}))
    assert reads_ahead(model)


def test_model_is_left_as_it_was() -> None:
    model = gpt2()
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    keeps_apart(model)
    reads_ahead(model)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
