"""Trains in several ways with FreezeCallback and writes what came of each, a file a process.

Args: the folder to write to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from hfft.errors import InputError
from hfft.hooks import FreezeCallback
from hfft.layers import find_layer_groups
from hfft.processes import leave_processes
from tests.families import bert
from tests.features.training import contrastive

folder = Path(sys.argv[1])


def digest(model: Any) -> str:
    whole = hashlib.sha256()
    for value in model.state_dict().values():
        whole.update(value.numpy().tobytes())
    return whole.hexdigest()


def new_model() -> Any:
    torch.manual_seed(0)
    return bert()


def new_trainer(model: Any, *callbacks: Any) -> Trainer:
    random = torch.Generator().manual_seed(1)
    data: Any = [
        {"input_ids": torch.randint(3, 30, (6,), generator=random), "labels": torch.tensor(n % 2)}
        for n in range(8)
    ]
    if model.config.model_type == "clip":
        for one in data:
            del one["labels"]
            one["pixel_values"] = torch.rand(3, 32, 32, generator=random)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        report_to="none",
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[*callbacks])


def stages_in_a_trainer_each() -> Any:
    model = new_model()
    kept = []  # the earlier Trainer, and its wrapper, stay alive
    for freeze in ("backbone", 2, "none"):
        kept.append(new_trainer(model, FreezeCallback(model, freeze)))
        kept[-1].train()
    return model


def thawed_between_two_calls(new_optimizer: bool, guarded: bool = True) -> Any:
    model = new_model()
    first = FreezeCallback(model, "backbone")
    trainer = new_trainer(model, first)
    trainer.train()
    trainer.remove_callback(first)
    second = FreezeCallback(model, 2)
    if guarded:
        trainer.add_callback(second)
    if new_optimizer:
        trainer.optimizer = None
    trainer.train()
    return model


def towers_in_a_trainer_each() -> Any:
    """Locked-image tuning, then stages in which the towers learn to unequal depth."""
    torch.manual_seed(0)
    model = contrastive()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for towers in ({"vision": "backbone"}, {"vision": "backbone", "text": 3}, {"text": 2}):
        frozen = find_layer_groups(model).frozen("none", towers)
        new_trainer(model, FreezeCallback(model, "none", towers)).train()
        for name, value in model.state_dict().items():
            assert name not in frozen or torch.equal(value, start[name]), name
        start = {name: value.clone() for name, value in model.state_dict().items()}
    return model


ways = {
    "towers": towers_in_a_trainer_each,
    "a trainer each": stages_in_a_trainer_each,
    "unguarded": lambda: thawed_between_two_calls(new_optimizer=True, guarded=False),
    "old optimizer": lambda: thawed_between_two_calls(new_optimizer=False),
    "old wrapper": lambda: thawed_between_two_calls(new_optimizer=True),
}
results: dict[str, Any] = {}
for name, way in ways.items():
    try:
        results[name] = digest(way())
    except InputError as error:
        results[name] = str(error)
results["world"] = dist.get_world_size()
(folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
leave_processes()
