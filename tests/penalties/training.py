"""Short training runs of tiny models, and what the gradients were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..families import batchnorm_resnet, bert


class Gradients(TrainerCallback):
    """Keeps the gradients of every step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


def make(family: str) -> Any:
    """A BERT without dropout, or a ResNet; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
        model = bert(**still) if family == "bert" else batchnorm_resnet()
    model.accepts_loss_kwargs = False  # BERT takes them and ignores them, as hfft.trial says
    return model


def elsewhere(model: nn.Module, distance: float = 0.1) -> dict[str, Tensor]:
    """A source at some distance from a model."""
    random = torch.Generator().manual_seed(1)
    return {
        name: p.detach() + distance * torch.randn(p.shape, generator=random)
        for name, p in model.named_parameters()
    }


def batch(family: str, size: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    labels = torch.arange(size) % 3
    if family == "bert":
        return {"input_ids": torch.randint(3, 30, (size, 6), generator=random), "labels": labels}
    return {"pixel_values": torch.rand(size, 3, 32, 32, generator=random), "labels": labels}


def train(
    model: Any, family: str, folder: Path, *callbacks: TrainerCallback, **changes: Any
) -> list[dict[str, Any]]:
    """Train on one batch, and return the log."""
    whole = batch(family)
    data: Any = [{name: value[n] for name, value in whole.items()} for n in range(8)]
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    settings = TrainingArguments(str(folder), dataloader_pin_memory=False, **arguments)
    run = Trainer(model=model, args=settings, train_dataset=data, callbacks=[*callbacks])
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4
) -> None:
    """Compare gradients, each against its length: single elements may cancel out."""
    assert found.keys() == expected.keys()
    whole = sum(float(value.square().sum()) for value in expected.values()) ** 0.5
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * (
            float(value.norm()) + 1e-3 * whole
        ), name


def recomputing(reentrant: bool) -> dict[str, Any]:
    """Settings of gradient checkpointing, under the names that do not warn."""
    return {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


def untouched(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
