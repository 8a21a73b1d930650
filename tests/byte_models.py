"""Tiny language models of bytes, in folders: a tokenizer like GPT-2's, which loses no character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MERGED = "ab"
"""The only two letters that are one token."""
VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), MERGED]
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY) + 3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that what a token sees of others moves its logits
    "bos_token_id": None,
    "eos_token_id": len(VOCABULARY),
}


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Return one with an end-of-text token and marks of turns; no padding token, no template."""
    numbers = {token: number for number, token in enumerate(VOCABULARY)}
    pieces = Tokenizer(models.BPE(vocab=numbers, merges=[("a", "b")]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token=END, extra_special_tokens=[START_TURN, END_TURN]
    )


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))


def gpt2_folder(folder: Path) -> Path:
    gpt2().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
