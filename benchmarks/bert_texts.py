"""A BERT-base of random weights, texts of random words, and a task that reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from hfft.registry import register
from hfft.task import Column, InputError, ModelConfig, Row, Task, Transform

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{number}" for number in range(995)]
TOKENS = 128
CLASSES = 4


def save_bert(folder: Path) -> None:
    """Save a BERT-base, and a tokenizer of whole words."""
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=len(SPECIAL) + len(WORDS), num_labels=CLASSES)
    hf.BertForSequenceClassification(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def write_texts(folder: Path, count: dict[str, int]) -> None:
    """Write SPLIT.jsonl of texts of 128 words; a class prefers its own quarter of the words."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in count.items():
        chance = random.Random(split)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(examples):
                label = number % CLASSES
                own = WORDS[label::CLASSES]
                text = [
                    chance.choice(own if chance.random() < 0.5 else WORDS) for _ in range(TOKENS)
                ]
                print(json.dumps({"text": " ".join(text), "label": f"class{label}"}), file=file)


@register("benchmark-texts")
class Texts(Task):
    """Text to class, for the benchmark alone."""

    columns: ClassVar = {
        "text": Column("text", ("text",)),
        "label": Column("label", ("label",)),
    }
    metric_names = ("accuracy",)
    metric = "accuracy"
    auto_model = hf.AutoModelForSequenceClassification
    model_suffix = "ForSequenceClassification"

    @property
    def augments(self) -> bool:
        """Texts stay as they are."""
        return False

    def configure(self, config: hf.PretrainedConfig, labels: Sequence[str]) -> None:
        """Name the classes."""
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}

    def load_processor(self, source: ModelConfig, config: hf.PretrainedConfig) -> Any:
        """Return the tokenizer."""
        return hf.AutoTokenizer.from_pretrained(source.name)

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return text to token ids and class number."""

        def inputs(row: Row) -> dict[str, Any]:
            return {"input_ids": processor(row["text"])["input_ids"], "labels": row["label"]}

        return inputs

    def collate(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pad to the longest."""
        longest = max(len(one["input_ids"]) for one in inputs)
        ids = torch.zeros(len(inputs), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, one in enumerate(inputs):
            ids[number, : len(one["input_ids"])] = torch.tensor(one["input_ids"])
            mask[number, : len(one["input_ids"])] = 1
        labels = torch.tensor([one["labels"] for one in inputs])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def read_inputs(self, given: Sequence[str]) -> list[tuple[str, Any]]:
        """Refuse: nothing is predicted here."""
        raise InputError("this task is for a benchmark")

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": float((predictions.argmax(-1) == labels).mean())}
