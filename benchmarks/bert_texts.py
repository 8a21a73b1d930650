"""Language models of random weights, and texts of random words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{number}" for number in range(995)]
TOKENS = 128
CLASSES = 4


def save_bert(folder: Path) -> None:
    """Save a BERT-base, and a tokenizer of whole words."""
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=len(SPECIAL) + len(WORDS), num_labels=CLASSES)
    hf.BertForSequenceClassification(config).save_pretrained(folder)
    hf.PreTrainedTokenizerFast(
        tokenizer_object=_words(), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)


def save_small(folder: Path, kind: str) -> None:
    """Save a `bert` or `gpt2` of 4 layers of 256, 512 positions, and a tokenizer of whole words.

    GPT-2's texts are left open; its tokenizer knows how they end.
    """
    torch.manual_seed(0)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    words, known = _words(), len(SPECIAL) + len(WORDS)
    if kind == "bert":
        bert = hf.BertConfig(
            vocab_size=known,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=CLASSES,
        )
        hf.BertForSequenceClassification(bert).save_pretrained(folder)
        ends = [(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
        words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        end = SPECIAL.index("[SEP]")
        gpt2 = hf.GPT2Config(
            vocab_size=known,
            n_embd=256,
            n_layer=4,
            n_head=4,
            n_positions=512,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=SPECIAL.index("[PAD]"),
        )
        hf.GPT2LMHeadModel(gpt2).save_pretrained(folder)
        names |= {"eos_token": "[SEP]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def write_texts(
    folder: Path,
    count: dict[str, int],
    *,
    own_share: float = 0.5,
    length: Callable[[random.Random], int] = lambda _: TOKENS,
) -> None:
    """Write SPLIT.jsonl of texts of random words, of which a class prefers its own quarter.

    Args:
        folder: where to.
        count: of the texts of each split.
        own_share: of a text's words that come from its class's quarter.
        length: a text's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in count.items():
        chance = random.Random(split)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(examples):
                label = number % CLASSES
                own = WORDS[label::CLASSES]
                text = [
                    chance.choice(own if chance.random() < own_share else WORDS)
                    for _ in range(length(chance))
                ]
                print(json.dumps({"text": " ".join(text), "label": f"class{label}"}), file=file)


def _words() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words
