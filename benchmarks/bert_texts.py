"""Language models of random weights, and texts of random words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

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
            initializer_range=256**-0.5,  # it is to learn something from scratch, in a few passes
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


def load_small(folder: Path, kind: str) -> Any:
    """Return a model that `save_small` saved, or one that was trained from it."""
    kinds = {"bert": hf.BertForSequenceClassification, "gpt2": hf.GPT2LMHeadModel}
    return kinds[kind].from_pretrained(folder)


def draw_length(chance: random.Random) -> int:
    """Return the words of a text whose tokens are log-normal; the tokenizer adds two at most."""
    tokens = 60 * chance.lognormvariate(-(0.9**2) / 2, 0.9)  # 60 is the mean
    return max(4, min(round(tokens), 512)) - 2


def write_texts(
    folder: Path,
    count: Mapping[str, int],
    *,
    length: Callable[[random.Random], int] = lambda _: TOKENS,
    skew: float = 1,
) -> None:
    """Write SPLIT.jsonl of texts of random words, half of them from the text's class's quarter.

    Args:
        folder: where to.
        count: of the texts of each split.
        length: a text's words.
        skew: 1: all words are as frequent; above, few words make up most of a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in count.items():
        chance = random.Random(split)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(examples):
                label = number % CLASSES
                text = []
                for _ in range(length(chance)):
                    words = WORDS[label::CLASSES] if chance.random() < 0.5 else WORDS
                    text.append(words[int(len(words) * chance.random() ** skew)])
                print(json.dumps({"text": " ".join(text), "label": f"class{label}"}), file=file)


def read_texts(file: Path, tokenizer: Any, kind: str) -> list[dict[str, Any]]:
    """Return the tokenizer's columns of each text, without padding, with its class for a `bert`."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    end = tokenizer.eos_token or ""
    examples = [dict(tokenizer(f"{record['text']} {end}")) for record in records]
    if kind == "bert":
        for one, record in zip(examples, records, strict=True):
            one["labels"] = int(record["label"].removeprefix("class"))
    return examples


def score(model: Any, examples: Iterable[Mapping[str, Any]]) -> float:
    """Return the accuracy, or of a language model the loss a token, one text at a time."""
    model.eval()
    total = count = 0.0
    for one in examples:
        ids = torch.tensor([one["input_ids"]])
        with torch.no_grad():
            if "labels" in one:
                total, count = total + int(model(ids).logits.argmax() == one["labels"]), count + 1
            else:
                learned = ids.shape[1] - 1
                total += float(model(ids, labels=ids).loss) * learned
                count += learned
    return total / count


def _words() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words
