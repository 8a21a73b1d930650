"""What holds, shares and picks weights, on text tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hfft

from .runs import largest_difference, log, losses, metrics, weights
from .task_runs import CASES, write_case


def first_of(*cases: Any, fast: int = 1) -> list[Any]:
    """The first cases for every day, the others for thorough runs."""
    marks = [() if number < fast else pytest.mark.slow for number in range(len(cases))]
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=own)
        for case, own in zip(cases, marks, strict=True)
    ]


def train(name: str, folder: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    hfft.train(write_case(CASES[name], folder, **sections))
    return folder / "run"


def full(**fields: Any) -> dict[str, Any]:
    return {"name": "full", "epochs": 1, **fields}


def moved(run: Path) -> set[str]:
    """The source's tensors that a run has changed."""
    before, after = load_file(run.parent / "source" / "model.safetensors"), weights(run)
    return {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}


def away(run: Path) -> float:
    """How far a run went from its source, squared."""
    before, after = load_file(run.parent / "source" / "model.safetensors"), weights(run)
    return sum(((before[n] - after[n]) ** 2).sum().item() for n in before.keys() & after.keys())


@pytest.mark.parametrize(
    ("name", "adapted"),
    first_of(
        ("single label", "attention"),
        ("prompts", "c_attn"),
        ("single label, decoder", "c_attn"),
        ("tags", "attention"),
        ("questions", "attention"),
        ("gaps", "attention"),
        ("summaries", "Attention"),
        fast=2,
    ),
)
def test_lora_moves_what_it_adapts_and_the_head(name: str, adapted: str, tmp_path: Path) -> None:
    run = train(name, tmp_path, strategy={"name": "lora", "r": 2, "epochs": 2})
    body = {n for n in moved(run) if not n.startswith(("cls.", "lm_head", "shared"))}
    assert body
    assert all(adapted in n for n in body)
    trained = [entry[3] for entry in losses(run)]
    assert sum(trained[-5:]) < sum(trained[:5])
    if name != "summaries":
        assert (run / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "name", first_of("single label", "prompts", "gaps", "questions", "summaries")
)
def test_l2_sp_holds_weights_near_the_source(name: str, tmp_path: Path) -> None:
    free = train(name, tmp_path / "free", strategy=full())
    penalty = {"kind": "l2_sp", "strength": 100.0, "mode": "decoupled"}
    held = train(name, tmp_path / "held", strategy=full(penalty=penalty))
    assert 0 < away(held) < 0.8 * away(free)
    assert all(entry["l2_sp"] >= 0 for entry in log(held) if "loss" in entry)


@pytest.mark.parametrize("name", first_of("single label", "tags", "packed"))
def test_mixout_trains_and_leaves_a_plain_model(name: str, tmp_path: Path) -> None:
    name = "texts to go on" if name == "packed" else name
    run = train(name, tmp_path, strategy=full(mixout=0.5))
    plain = train(name, tmp_path / "plain", strategy=full())
    assert weights(run).keys() == weights(plain).keys()
    assert largest_difference(run, plain) > 1e-4


@pytest.mark.parametrize("name", first_of("single label", "single label, decoder", "tags"))
@pytest.mark.parametrize("kind", ["bss", "delta"])
def test_penalties_on_activations_take_texts(kind: str, name: str, tmp_path: Path) -> None:
    own = {"attention": "none"} if kind == "delta" else {}
    penalty = {"kind": kind, "strength": 0.1, **own}
    held = train(name, tmp_path / "held", strategy=full(penalty=penalty))
    free = train(name, tmp_path / "free", strategy=full())
    values = [entry[kind] for entry in log(held) if "loss" in entry]
    assert all(value >= 0 for value in values)
    assert max(values) > 0
    assert largest_difference(held, free) > 1e-5


@pytest.mark.parametrize(
    "name", first_of("single label", "several labels", "tags", "gaps", "summaries")
)
def test_smoothing_enters_the_loss(name: str, tmp_path: Path) -> None:
    training = {"learning_rate": 0.0, "logging_steps": 1}
    found = [
        losses(
            train(
                name,
                tmp_path / str(smoothing),
                strategy=full(),
                training={**training, "label_smoothing_factor": smoothing},
            )
        )
        for smoothing in (0.0, 0.3)
    ]
    plain, smoothed = ([entry[3] for entry in one] for one in found)
    assert all(abs(a - b) > 1e-4 for a, b in zip(plain, smoothed, strict=True))


def test_numbers_are_not_smoothed(tmp_path: Path) -> None:
    with pytest.raises(hfft.InputError, match="label_smoothing_factor: is for classes"):
        train("numbers", tmp_path, training={"label_smoothing_factor": 0.1})
    assert not list(tmp_path.rglob("environment.json"))


@pytest.mark.parametrize("name", first_of("single label", "texts to go on", "gaps", "summaries"))
def test_gradient_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    plain = train(name, tmp_path / "plain", strategy=full())
    training = {"learning_rate": 5e-3, "logging_steps": 1, "gradient_checkpointing": True}
    saving = train(name, tmp_path / "saving", strategy=full(), training=training)
    assert [e[3] for e in losses(plain)] == pytest.approx([e[3] for e in losses(saving)], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "metric", "best"),
    first_of(
        ("prompts", "perplexity", min),
        ("tags", "f1", max),
        ("gaps", "perplexity", min),
        ("numbers", "mse", min),
        ("questions", "loss", min),
        fast=2,
    ),
)
def test_the_best_epoch_is_kept(name: str, metric: str, best: Any, tmp_path: Path) -> None:
    training = {
        "learning_rate": 0.05,  # so high that the last epoch is seldom the best
        "lr_scheduler_type": "constant",
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
    }
    run = train(name, tmp_path, strategy=full(epochs=5), training=training)
    by_epoch = [e[f"eval_{metric}"] for e in log(run) if f"eval_{metric}" in e][:5]
    assert len(set(by_epoch)) > 1
    assert metrics(run)["eval"][metric] == pytest.approx(best(by_epoch), rel=1e-4)
