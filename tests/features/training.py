"""Trainings on stored and on whole examples, to be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate import PartialState
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hfft.examples import ExampleDataset, Parts
from hfft.features.prepare import Setting, StageFeatures, Wanted, plain, prepare
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups
from tests.families import FAMILIES, clip

from .cases import freeze


class Contrastive(hf.CLIPModel):
    """CLIP that always answers its loss."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "return_loss": True})


def contrastive() -> Any:
    model = clip()
    other = Contrastive(model.config)
    other.load_state_dict(model.state_dict())
    return other


def new_model(family: str, boundary: int | tuple[int, int], *, still: bool = False) -> Any:
    """A model frozen up to a boundary; of CLIP, one for each tower.

    Args:
        family: by its name.
        boundary: how many groups are frozen.
        still: without dropout.
    """
    torch.manual_seed(0)
    model = contrastive() if family == "clip" else FAMILIES[family].make()
    if family == "gpt2-classes":
        model.config.pad_token_id = 0
    for module in model.modules():
        if still and isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    groups = find_layer_groups(model)
    if isinstance(boundary, tuple):
        text, vision = boundary
        below = [*groups.towers["text"][:text], *groups.towers["vision"][:vision]]
        names = frozenset(name for group in below for name in group.parameters)
    else:
        names = groups.frozen(boundary)
    return freeze(model, names)


def example(inputs: Sequence[str], row: Mapping[str, Any]) -> dict[str, Any]:
    """Texts are of 2 to 9 tokens."""
    number = row["number"]
    made = torch.Generator().manual_seed(number)
    found: dict[str, Any] = {}
    if "images" in inputs:
        found["pixel_values"] = torch.rand(3, 32, 32, generator=made)
    if "words" in inputs:
        length = 2 + number * 5 % 8
        found["input_ids"] = torch.randint(3, 30, (length,), generator=made).tolist()
    if len(inputs) == 1:
        found["labels"] = number % 2
    return found


def examples_of(family: str, count: int = 11) -> ExampleDataset:
    inputs, rows = FAMILIES[family].inputs, [{"number": n} for n in range(count)]
    halves = {kind: partial(example, (kind, "")) for kind in inputs}
    whole: Any = Parts(halves) if len(inputs) > 1 else partial(example, inputs)
    return ExampleDataset(rows, whole)


def collate(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in inputs[0]:
        values = [torch.as_tensor(one[name]) for one in inputs]
        if name == "input_ids":
            found[name] = pad_sequence(values, batch_first=True)
            found["attention_mask"] = pad_sequence(list(map(torch.ones_like, values)), True)
        else:
            found[name] = torch.stack(values)
    return found


def setting(**changes: Any) -> Setting:
    given = Setting(
        identity={"task": "made up"},
        fingerprints={"train": "one", "validation": "two"},
        description={"model": "tiny"},
        collate=collate,
        batch_size=4,
        autocast=("float32", nullcontext),
        dtype=None,
        limit=None,
        workers=0,
        processes=PartialState(cpu=True),
    )
    return replace(given, **changes)


def wanted(model: Any, *splits: str) -> Wanted:
    names = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    return Wanted(names, splits or ("train",))


def train(
    model: Any,
    features: StageFeatures,
    folder: Path,
    *,
    batch_size: int = 4,
) -> list[float]:
    """Train for two epochs; return the losses."""
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=batch_size,
        learning_rate=0.1,
        optim="sgd",  # Adam would make steps of the rounding of zero gradients
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        average_tokens_across_devices=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=3,
    )
    with kept_in_eval(model), features.replayed(model):
        made = hf.Trainer(
            model=model,
            args=arguments,
            train_dataset=features.datasets["train"],
            data_collator=features.collate,
        )
        made.train()
        made.accelerator.unwrap_model(made.model_wrapped, keep_fp32_wrapper=False)
        made.accelerator.free_memory()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def run(
    family: str,
    boundary: int | tuple[int, int],
    folder: Path,
    *,
    stored: bool,
    still: bool = False,
    count: int = 11,
    **options: Any,
) -> tuple[list[float], dict[str, Tensor], str]:
    """Train one model; return its losses, its state, and a digest of its parameters."""
    model = new_model(family, boundary, still=still)
    examples = {"train": examples_of(family, count)}
    features = plain(examples, collate)
    if stored:
        with kept_in_eval(model):
            features = prepare(model, wanted(model), [], examples, setting())
        assert features.cut is not None
    losses = train(model, features, folder, **options)
    features.close()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return losses, state, digest(model)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any tensor.

    Gradients of an attention's key biases are zero but for rounding: what they moved is measured
    by 0.01, which is the scale of the others.
    """
    assert one.keys() == other.keys()
    found = []
    for name, value in one.items():
        scale = value.double().pow(2).mean().sqrt().clamp(min=0.01)
        found.append(((value - other[name]).double().pow(2).mean().sqrt() / scale).item())
    return max(found)


def digest(model: torch.nn.Module) -> str:
    """Of all parameters; statistics differ among processes until the next step."""
    whole = hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().numpy().tobytes())
    return whole.hexdigest()
