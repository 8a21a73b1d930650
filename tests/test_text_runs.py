"""Runs of text tasks against transformers' own loop, larger batches, and plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf

import hfft

from .runs import largest_difference, log, losses, metrics, weights
from .text_runs import bert_folder, gpt_folder, write_config, write_corpus, write_texts

SGD = {"optim": "sgd", "learning_rate": 0.05}

Folder = Callable[[Path], Path]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_corpus(folder / "corpus.txt", 64)
    return write_texts(folder / "labelled", train=64, validation=20, test=20)


def corpus(texts: Path) -> dict[str, Any]:
    return {"path": str(texts.parent / "corpus.txt"), "validation": "train[:10]"}


def run(path: Path, model: Path, texts: Path, **sections: Any) -> Path:
    hfft.train(write_config(path.with_suffix(".yaml"), model, texts, **sections))
    return path


def plain(folder: Path, model: Path, texts: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """transformers' example of text classification: weights and losses."""
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = datasets.load_dataset("json", data_files=str(texts / "train.jsonl"), split="train")
    names = ["bad", "good"]
    rows = rows.map(
        lambda row: {**tokenizer(row["text"]), "labels": names.index(row["label"])},
        remove_columns=["text", "label"],
    )
    hf.set_seed(0)
    network = hf.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=2, pad_token_id=tokenizer.pad_token_id
    )
    args = hf.TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = hf.DataCollatorWithPadding(tokenizer)
    trainer = hf.Trainer(network, args, train_dataset=rows, data_collator=collator)
    trainer.train()
    return network.state_dict(), [e["loss"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("make", [bert_folder, gpt_folder])
def test_nothing_is_lost_against_transformers_own_loop(
    make: Folder, texts: Path, tmp_path: Path
) -> None:
    model = make(tmp_path / "model")
    theirs, their_losses = plain(tmp_path / "plain", model, texts)
    own = run(tmp_path / "run", model, texts, strategy={"name": "full", "epochs": 2})
    assert [loss for *_, loss in losses(own)] == pytest.approx(their_losses, abs=2e-6)
    saved = weights(own)
    for name, tensor in theirs.items():
        if name in saved:
            torch.testing.assert_close(saved[name], tensor, atol=2e-6, rtol=0)
    assert len(saved) > 20


TASKS: dict[str, tuple[Folder, dict[str, Any]]] = {
    "text-classification": (bert_folder, {}),
    "fill-mask": (bert_folder, {}),
    "text-generation": (gpt_folder, {"packing": False}),
}


@pytest.mark.parametrize("task", TASKS)
def test_accumulated_batches_equal_the_larger_batch_whatever_their_lengths(
    task: str, texts: Path, tmp_path: Path
) -> None:
    make, options = TASKS[task]
    model = make(tmp_path / "model")
    sections: dict[str, Any] = {"task": {"name": task, **options}}
    if task != "text-classification":
        sections["data"] = corpus(texts)
    found = []
    for batch, accumulated in ((8, 4), (32, 1)):
        training = {
            **SGD,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulated,
        }
        path = tmp_path / f"by_{batch}"
        found.append(run(path, model, texts, **sections, training=training))
    one, other = found
    assert [loss for *_, loss in losses(one)] == pytest.approx(
        [loss for *_, loss in losses(other)], rel=1e-5
    )
    assert largest_difference(one, other) < 1e-6
    assert metrics(one)["eval"]["loss"] == pytest.approx(metrics(other)["eval"]["loss"], rel=1e-5)


def test_a_token_budget_trains_on_every_example_and_says_how_fast(
    texts: Path, tmp_path: Path
) -> None:
    model = bert_folder(tmp_path / "model")
    own = run(tmp_path / "run", model, texts, batch_tokens=100)
    [stage] = metrics(own)["stages"]
    assert stage["epochs"] == 1
    assert stage["steps"] == len([e for e in log(own) if "loss" in e])
    assert stage["examples_per_second"] * stage["seconds"] == pytest.approx(64, rel=0.3)


def test_grouping_by_length_is_a_matter_of_order_alone(texts: Path, tmp_path: Path) -> None:
    model = bert_folder(tmp_path / "model")
    training = {"train_sampling_strategy": "group_by_length"}
    own = run(tmp_path / "run", model, texts, training=training)
    assert metrics(own)["stages"][0]["steps"] == 8
    scores = metrics(run(tmp_path / "plain", model, texts))["eval"]
    assert scores.keys() == metrics(own)["eval"].keys()


def test_packed_rows_train_on_all_their_tokens(texts: Path, tmp_path: Path) -> None:
    model = gpt_folder(tmp_path / "model")
    task = {"name": "text-generation", "packing": True}
    training = {"per_device_train_batch_size": 4}
    own = run(tmp_path / "run", model, texts, task=task, data=corpus(texts), training=training)
    scores = metrics(own)
    assert scores["stages"][0]["steps"] < 16  # of 64 texts by fours
    assert scores["eval"]["perplexity"] == pytest.approx(
        float(torch.tensor(scores["eval"]["loss"]).exp()), rel=1e-4
    )


def test_torch_compile_passes_through(texts: Path, tmp_path: Path) -> None:
    model = bert_folder(tmp_path / "model")
    training = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = run(tmp_path / "compiled", model, texts, training=training)
    eager = run(tmp_path / "eager", model, texts)
    assert largest_difference(compiled, eager) < 1e-5


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"batch_tokens": 6}, r"batch_tokens: 6 tokens hold no example of \d+"),
        (
            {"batch_tokens": 99, "training": {"train_sampling_strategy": "group_by_length"}},
            "train_sampling_strategy: group_by_length and batch_tokens both choose",
        ),
        (
            {"batch_tokens": 99, "training": {"per_device_train_batch_size": 8}},
            "batch_tokens and training.per_device_train_batch_size both set the batch",
        ),
        ({"task": {"name": "text-classification", "max_length": 99}}, r"max_length: 99 .* \(32\)"),
        (
            {"task": {"name": "text-classification", "max_length": 4, "overlong": "error"}},
            r"data.train: \d+ examples of 64 longer than the limit",
        ),
    ],
)
def test_what_cannot_be_is_said_before_training(
    sections: dict[str, Any], said: str, texts: Path, tmp_path: Path
) -> None:
    model = bert_folder(tmp_path / "model")
    path = write_config(tmp_path / "run.yaml", model, texts, **sections)
    with pytest.raises(hfft.InputError, match=said):
        hfft.train(path)
    assert not (tmp_path / "run").exists()
