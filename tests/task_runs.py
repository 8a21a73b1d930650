"""A small run of every text task: a tiny model, data in a form that users have, and inputs."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers as hf
import yaml

from .text_runs import BAD, GOOD, OTHERS, SIZES, STILL, WORDS, bert_folder, gpt_folder, save
from .text_runs import sentences as labelled

Rows = list[dict[str, Any]]
Folder = Callable[[Path], Path]

EPOCHS = 3
COUNTS = {"train": 40, "validation": 12, "test": 10}
THINGS = ["film", "plot", "actor"]
TAGS = ["O", "B-GOOD", "I-GOOD", "B-BAD", "I-BAD"]
CHAT = (
    "{% for m in messages %}[CLS] {{ m.content }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS]{% endif %}"
)


def long_bert_folder(folder: Path) -> Path:
    """A BERT that takes the windows of questions with their contexts."""
    torch.manual_seed(0)
    config = hf.BertConfig(**{**SIZES, **STILL, "max_position_embeddings": 384})
    return save(hf.BertForMaskedLM(config), folder)


def t5_folder(folder: Path) -> Path:
    """An encoder-decoder without dropout."""
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=len(WORDS),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    return save(hf.T5ForConditionalGeneration(config), folder)


# Examples: what there is to learn is in the words


def pairs(count: int, seed: int) -> Rows:
    """Two texts that say the same of something, or not."""
    one, other = labelled(count, seed), labelled(count, seed + 1000)
    random.Random(seed).shuffle(other)
    return [
        {
            "sentence1": a["text"],
            "sentence2": b["text"],
            "label": "same" if a["label"] == b["label"] else "other",
        }
        for a, b in zip(one, other, strict=True)
    ]


def topics(count: int, seed: int) -> Rows:
    """Texts with the things that they are about: some, or none."""
    return [
        {"text": row["text"], "topics": [one for one in THINGS if one in row["text"].split()]}
        for row in labelled(count, seed)
    ]


def ratings(count: int, seed: int) -> Rows:
    return [
        {"text": row["text"], "score": (row["label"] == "good") + len(row["text"]) / 1000}
        for row in labelled(count, seed)
    ]


def tagged(count: int, seed: int) -> Rows:
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(chance.randint(1, 4)):
            kind, name = chance.choice([(GOOD, "GOOD"), (BAD, "BAD")])
            said = ["quite", chance.choice(kind)] if chance.random() < 0.5 else [kind[0]]
            rest = chance.choices(["a", "the", "film", "was", "and"], k=chance.randint(0, 3))
            words += [*said, *rest]
            tags += [f"B-{name}", f"I-{name}"][: len(said)] + ["O"] * len(rest)
        rows.append({"tokens": words, "ner_tags": [TAGS.index(tag) for tag in tags]})
    return rows


def asked(count: int, seed: int) -> Rows:
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        said = {thing: chance.choice([*GOOD, *BAD]) for thing in chance.sample(THINGS, k=2)}
        context = " and ".join(f"the {thing} was {word}" for thing, word in said.items())
        thing = chance.choice(list(said))
        word = said[thing]
        start = context.index(word, context.index(thing))
        answers: dict[str, list[Any]] = {"text": [word], "answer_start": [start]}
        if number % 5 == 4:
            [thing] = set(THINGS) - set(said)
            answers = {"text": [], "answer_start": []}
        rows.append({"question": f"the {thing} was", "context": context, "answers": answers})
    return rows


def completed(count: int, seed: int) -> Rows:
    return [
        {"prompt": row["text"].rsplit(" ", 1)[0], "completion": " " + row["text"].split()[-1]}
        for row in labelled(count, seed)
    ]


def chats(count: int, seed: int) -> Rows:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in completed(count, seed)
    ]


def summarised(count: int, seed: int) -> Rows:
    return [
        {
            "document": row["text"],
            "highlights": next(word for word in row["text"].split() if word not in OTHERS),
        }
        for row in labelled(count, seed)
    ]


# Forms of data; each returns the section `data`


def _split_files(
    folder: Path, rows: Mapping[str, Rows], suffix: str, write: Callable[[Path, Rows], None]
) -> dict[str, Any]:
    folder.mkdir(parents=True)
    for split, own in rows.items():
        write(folder / f"{split}{suffix}", own)
    return {"path": str(folder), "validation": "validation", "test": "test"}


def as_csv(folder: Path, rows: Mapping[str, Rows]) -> dict[str, Any]:
    def write(path: Path, own: Rows) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, own[0].keys())
            writer.writeheader()
            writer.writerows(own)

    return _split_files(folder, rows, ".csv", write)


def as_json_lines(folder: Path, rows: Mapping[str, Rows]) -> dict[str, Any]:
    def write(path: Path, own: Rows) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")

    return _split_files(folder, rows, ".jsonl", write)


def as_parquet(folder: Path, rows: Mapping[str, Rows]) -> dict[str, Any]:
    def write(path: Path, own: Rows) -> None:
        datasets.Dataset.from_list(own).to_parquet(path)

    return _split_files(folder, rows, ".parquet", write)


def as_text(folder: Path, rows: Mapping[str, Rows]) -> dict[str, Any]:
    def write(path: Path, own: Rows) -> None:
        path.write_text("".join(f"{row['text']}\n" for row in own), encoding="utf-8")

    return _split_files(folder, rows, ".txt", write)


def as_saved(folder: Path, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """A dataset as `save_to_disk` leaves it; tags have names there."""
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(r) for name, r in rows.items()})
    if "ner_tags" in splits["train"].column_names:
        names = datasets.List(datasets.ClassLabel(names=TAGS))
        splits = splits.cast_column("ner_tags", names)
    splits.save_to_disk(folder)
    return {"path": str(folder), "validation": "validation", "test": "test"}


# The runs


@dataclass(frozen=True)
class Case:
    """A run, and what can be asked of it.

    Attributes:
        task: its name and options.
        model: makes the source.
        rows: makes examples.
        form: writes them.
        metrics: names of the scores, but for the loss.
        labels: the classes, in order.
        record: an input as a line of JSON Lines.
        text: the same as arguments of `hfft predict`; none: it can't be had as texts.
    """

    task: dict[str, Any]
    model: Folder
    rows: Callable[[int, int], Rows]
    form: Callable[[Path, Mapping[str, Rows]], dict[str, Any]]
    metrics: set[str]
    labels: list[str]
    record: dict[str, Any]
    text: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.task["name"])


FILM = "the film was great and a plot"
LANGUAGE = {"perplexity", "token_accuracy"}
SINGLE = {"accuracy", "macro_f1", "matthews"}
CASES = {
    "single label": Case(
        task={"name": "text-classification"},
        model=bert_folder,
        rows=labelled,
        form=as_csv,
        metrics=SINGLE,
        labels=["bad", "good"],
        record={"text": FILM},
        text=(FILM,),
    ),
    "single label, decoder": Case(
        task={"name": "text-classification"},
        model=gpt_folder,
        rows=labelled,
        form=as_saved,
        metrics=SINGLE,
        labels=["bad", "good"],
        record={"text": FILM},
        text=(FILM,),
    ),
    "pairs": Case(
        task={"name": "text-classification", "max_length": 32},
        model=bert_folder,
        rows=pairs,
        form=as_parquet,
        metrics=SINGLE,
        labels=["other", "same"],
        record={"text": FILM, "text_pair": "a dull film"},
    ),
    "several labels": Case(
        task={"name": "text-classification", "problem_type": "multi_label_classification"},
        model=bert_folder,
        rows=topics,
        form=as_json_lines,
        metrics={"accuracy", "macro_f1", "micro_f1"},
        labels=["actor", "film", "plot"],
        record={"text": FILM},
        text=(FILM,),
    ),
    "numbers": Case(
        task={"name": "text-classification", "problem_type": "regression"},
        model=gpt_folder,
        rows=ratings,
        form=as_csv,
        metrics={"pearson", "spearman", "mse"},
        labels=[],
        record={"text": FILM},
        text=(FILM,),
    ),
    "tags": Case(
        task={"name": "token-classification"},
        model=bert_folder,
        rows=tagged,
        form=as_saved,
        metrics={"f1", "precision", "recall", "accuracy"},
        labels=TAGS,
        record={"text": FILM},
        text=(FILM,),
    ),
    "questions": Case(
        task={"name": "question-answering"},
        model=long_bert_folder,
        rows=asked,
        form=as_json_lines,
        metrics={"exact_match", "f1", "has_answer_f1", "no_answer_accuracy"},
        labels=[],
        record={"question": "the film was", "context": FILM},
        text=("the film was", FILM),
    ),
    "texts to go on": Case(
        task={"name": "text-generation"},
        model=gpt_folder,
        rows=labelled,
        form=as_text,
        metrics=LANGUAGE,
        labels=[],
        record={"prompt": FILM},
        text=(FILM,),
    ),
    "prompts": Case(
        task={"name": "text-generation", "packing": False, "max_new_tokens": 4},
        model=gpt_folder,
        rows=completed,
        form=as_csv,
        metrics=LANGUAGE,
        labels=[],
        record={"prompt": FILM},
        text=(FILM,),
    ),
    "chats": Case(
        task={"name": "text-generation", "chat_template": CHAT, "max_new_tokens": 4},
        model=gpt_folder,
        rows=chats,
        form=as_json_lines,
        metrics=LANGUAGE,
        labels=[],
        record={"messages": [{"role": "user", "content": FILM}]},
    ),
    "gaps": Case(
        task={"name": "fill-mask"},
        model=bert_folder,
        rows=labelled,
        form=as_text,
        metrics=LANGUAGE,
        labels=[],
        record={"text": "the film [MASK] great"},
        text=("the film [MASK] great",),
    ),
    "summaries": Case(
        task={"name": "summarization", "max_new_tokens": 6},
        model=t5_folder,
        rows=summarised,
        form=as_parquet,
        metrics={"rouge1", "rouge2", "rougeL", "rougeLsum", "gen_length"},
        labels=[],
        record={"text": FILM},
        text=(FILM,),
    ),
}


def write_case(case: Case, folder: Path, **sections: Any) -> Path:
    """Write a case's model, data and config into a folder; sections replace the defaults."""
    rows = {split: case.rows(count, seed) for seed, (split, count) in enumerate(COUNTS.items())}
    values: dict[str, Any] = {
        "task": case.task,
        "model": str(case.model(folder / "source")),
        "data": case.form(folder / "data", rows),
        "strategy": {"name": "full", "epochs": EPOCHS},
        "output_dir": str(folder / "run"),
        "training": {"learning_rate": 5e-3, "logging_steps": 1, **case.training},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
