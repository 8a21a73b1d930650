"""Tiny models and texts for runs of text tasks, and configs that train on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD = ["fine", "great", "lovely", "warm"]
BAD = ["dull", "poor", "grim", "cold"]
OTHERS = ["a", "the", "film", "plot", "actor", "was", "seemed", "and", "very", "quite"]
WORDS = [*SPECIAL, *GOOD, *BAD, *OTHERS]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    named = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": SPECIAL[number] for name, number in named.items()},
    )


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bert_folder(folder: Path) -> Path:
    """A masked language model without dropout."""
    torch.manual_seed(0)
    return save(hf.BertForMaskedLM(hf.BertConfig(**SIZES, **STILL)), folder)


def gpt_folder(folder: Path) -> Path:
    """A causal language model without dropout."""
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = hf.GPT2Config(
        vocab_size=len(WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
        **still,
    )
    model = hf.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    own = tokenizer()
    own.eos_token = "[SEP]"
    own.save_pretrained(folder)
    return folder


def t5_folder(folder: Path) -> Path:
    """A text-to-text model without dropout."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = hf.T5Config(
        vocab_size=len(WORDS), dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=3, **sizes
    )
    return save(hf.T5ForConditionalGeneration(config), folder)


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of 3 to 20 words, of which one or two tell the class."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        label = ("bad", "good")[number % 2]
        words = chance.choices(OTHERS, k=chance.randint(2, 19))
        words.insert(chance.randrange(len(words)), chance.choice(GOOD if number % 2 else BAD))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_texts(folder: Path, **counts: int) -> Path:
    """Write SPLIT.jsonl of labelled sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(counts.items()):
        rows = sentences(count, seed)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def write_corpus(path: Path, count: int) -> Path:
    """Write unlabelled sentences, one a line."""
    path.write_text("".join(row["text"] + "\n" for row in sentences(count, seed=99)))
    return path


def write_config(path: Path, model: Path, texts: Path, **sections: Any) -> Path:
    """Write a config of text classification; sections replace the defaults."""
    values: dict[str, Any] = {
        "task": "text-classification",
        "model": str(model),
        "data": {"path": str(texts), "validation": "validation"},
        "output_dir": str(path.with_suffix("")),
        **sections,
    }
    if not {"strategy", "stages"} & sections.keys():
        values["strategy"] = {"name": "full", "epochs": 1}
    values["training"] = {
        "per_device_eval_batch_size": 9,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **({} if "batch_tokens" in sections else {"per_device_train_batch_size": 8}),
        **sections.get("training", {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
