"""PenaltyCallback and FreezeCallback in Trainers that are not ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hfft.hooks import FreezeCallback, PenaltyCallback
from hfft.layers import find_layer_groups

from ..text_models import TEXTS, causal_folder, classifier_folder, sentence_encoder, tokenizer

RATE = 0.05
STRENGTH = 3.0
ROWS = 8


@dataclass(frozen=True)
class Kind:
    """A Trainer, and how its model is made.

    Attributes:
        model: makes it; the same at every call.
        trainer: makes it of the model, its arguments as a mapping, and callbacks.
        new: what the names of parameters without a source value begin with.
    """

    model: Callable[[Path], Any]
    trainer: Callable[[Any, dict[str, Any], list[Any]], Trainer]
    new: tuple[str, ...] = ()


def plain(model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Trainer:
    words = tokenizer()
    data: Any = [{**words(row["text"]), "labels": row["label"]} for row in TEXTS[:ROWS]]
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(words),
        callbacks=callbacks,
    )


def sentences(model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Trainer:
    rows = [
        {"one": row["text"], "other": "a good film", "score": float(row["label"])}
        for row in TEXTS[:ROWS]
    ]
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=Dataset.from_list(rows),
        loss=CosineSimilarityLoss(model),
        callbacks=callbacks,
    )


def sft(model: Any, arguments: dict[str, Any], callbacks: list[Any]) -> Trainer:
    own = {"bf16": False, "gradient_checkpointing": False}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, **own),
        train_dataset=Dataset.from_list([{"text": row["text"]} for row in TEXTS[:ROWS]]),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def classifier(folder: Path) -> Any:
    torch.manual_seed(0)
    saved = classifier_folder(folder / "classifier")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    # Else Trainer does not divide by the accumulated batches, which BERT's own loss does not either
    model.accepts_loss_kwargs = False
    return model


KINDS = {
    "plain": Kind(classifier, plain, ("classifier.", "bert.pooler.")),
    "sentences": Kind(lambda folder: sentence_encoder(folder / "encoder"), sentences),
    "sft": Kind(
        lambda folder: AutoModelForCausalLM.from_pretrained(causal_folder(folder / "causal")), sft
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **changes,
    }


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@dataclass
class Trained:
    """A model after `train()`, and what its Trainer was given and told."""

    model: Any
    batches: list[tuple[Any, Any]]
    logs: list[dict[str, float]]


def trained(
    kind: Kind,
    folder: Path,
    strength: float = STRENGTH,
    resume: bool = False,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Two groups frozen, the others penalised."""
    model = kind.model(folder)
    callbacks: list[Any] = [FreezeCallback(model, 2)]
    if strength:
        callbacks.append(PenaltyCallback(model, "l2_sp", strength, **options))
    run = kind.trainer(model, arguments(folder, **(changes or {})), callbacks)
    batches = []
    compute = run.compute_loss

    def recorded(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        batches.append((deepcopy(inputs), named.get("num_items_in_batch")))
        return compute(model, inputs, *more, **named)

    run.compute_loss = recorded  # type: ignore[method-assign]
    run.train(resume_from_checkpoint=resume)
    return Trained(model, batches, [e for e in run.state.log_history if "loss" in e])


def by_hand(
    kind: Kind, folder: Path, batches: list[tuple[Any, Any]], clip: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the weights after SGD on loss + strength * R by autograd, and R after each step.

    A Trainer gives the losses; neither its loop nor a callback has a part.
    """
    model = kind.model(folder)
    frozen = find_layer_groups(model).frozen(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    source = weights(model)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    old = [name for name in learning if not name.startswith(kind.new)]
    run = kind.trainer(model, arguments(folder), [])
    model.train()
    values = []
    for inputs, count in batches:
        run.compute_loss(model, inputs, num_items_in_batch=count).backward()
        used = {name: p.grad for name, p in learning.items() if p.grad is not None}
        norm = float(torch.stack([gradient.norm() for gradient in used.values()]).norm())
        assert norm > clip  # which is to act
        scale = clip / (norm + 1e-6) if clip else 1.0
        loss_gradients = {name: scale * gradient.clone() for name, gradient in used.items()}
        model.zero_grad()
        (STRENGTH * distance(learning, source, old)).backward()
        with torch.no_grad():
            for name, gradient in loss_gradients.items():
                pull = learning[name].grad
                learning[name] -= RATE * (gradient if pull is None else gradient + pull)
        model.zero_grad()
        values.append(distance(learning, source, old).item())
    return weights(model), values


def distance(
    now: dict[str, torch.Tensor], source: dict[str, torch.Tensor], names: list[str]
) -> torch.Tensor:
    return 0.5 * torch.stack([(now[name] - source[name]).square().sum() for name in names]).sum()


@every_kind
@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_steps_are_those_of_autograd_on_the_clipped_loss_and_the_penalty(
    kind: Kind, clip: float, tmp_path: Path
) -> None:
    run = trained(kind, tmp_path, changes={"max_grad_norm": clip})
    assert len(run.batches) == 4
    expected, values = by_hand(kind, tmp_path, run.batches, clip)
    assert largest_difference(weights(run.model), expected) < 1e-6
    without = trained(kind, tmp_path, 0, changes={"max_grad_norm": clip})
    assert largest_difference(weights(run.model), weights(without.model)) > 1e-4
    logged = [(entry["l2_sp"], entry["l2_sp_weighted"]) for entry in run.logs]
    assert [value for value, _ in logged] == pytest.approx(values, rel=1e-4)
    assert [weighted for _, weighted in logged] == pytest.approx(
        [STRENGTH * value for value, _ in logged]
    )


@every_kind
def test_frozen_layers_stay_bit_for_bit_and_the_others_move(kind: Kind, tmp_path: Path) -> None:
    model = kind.model(tmp_path)
    before, frozen = weights(model), find_layer_groups(model).frozen(2)
    after = weights(trained(kind, tmp_path).model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    unused = {name for name in before if kind is KINDS["sentences"] and ".pooler." in name}
    assert moved == before.keys() - frozen - unused


@every_kind
def test_accumulated_gradients_give_the_weights_of_a_large_batch(
    kind: Kind, tmp_path: Path
) -> None:
    one, four = (
        trained(
            kind,
            tmp_path,
            changes={
                "per_device_train_batch_size": ROWS // parts,
                "gradient_accumulation_steps": parts,
            },
        )
        for parts in (1, 4)
    )
    assert (len(one.batches), len(four.batches)) == (4, 16)
    assert largest_difference(weights(one.model), weights(four.model)) < 1e-6


@every_kind
def test_checkpoints_hold_nothing_of_the_source(kind: Kind, tmp_path: Path) -> None:
    sizes = []
    for strength in (0.0, STRENGTH):
        saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        saving["output_dir"] = str(tmp_path / str(strength))
        trained(kind, tmp_path, strength, changes=saving)
        checkpoint = tmp_path / str(strength) / "checkpoint-2"
        files = {str(p.relative_to(checkpoint)): p for p in checkpoint.rglob("*") if p.is_file()}
        told = {"trainer_state.json", "training_args.bin", "README.md"}  # values, paths
        sizes.append(
            {name: None if name in told else p.stat().st_size for name, p in files.items()}
        )
    assert sizes[0] == sizes[1]
    assert "model.safetensors" in sizes[0]


def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    options: dict[str, Any] = {"schedule": "linear", "end_factor": 0.1}
    kind = KINDS["plain"]
    whole = trained(kind, tmp_path, changes=saving, **options)
    for step in (3, 4):  # as if it had been killed after step 2
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    resumed = trained(kind, tmp_path, resume=True, changes=saving, **options)
    assert len(resumed.batches) == 2
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0
    assert [e["l2_sp"] for e in whole.logs] == [e["l2_sp"] for e in resumed.logs]


def test_adapters_in_sft_learn_above_what_is_frozen(tmp_path: Path) -> None:
    """With gradient checkpointing, which is SFTConfig's default."""
    base = KINDS["sft"].model(tmp_path)
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    before = weights(model)
    callback = FreezeCallback(model, 2)
    run = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_list([{"text": row["text"]} for row in TEXTS]),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    assert run.args.activation_checkpointing
    run.train()
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert {name.split(".layers.")[1][0] for name in moved} == {"1", "2"}
