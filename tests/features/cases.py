"""Models to cut, batches to cut them with, and what a model makes of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hfft.features.cut import MASK, Cut, with_padding
from hfft.features.replay import FEATURE, capture, replayed
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups
from tests.families import FAMILIES, TOWERS

EVERY = {**FAMILIES, **TOWERS}
Batch = dict[str, Tensor]


def make(family: str) -> Any:
    """The family's tiny model, with weights large enough to tell all its outputs apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EVERY[family].make()
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = 0
    if family == "t5":
        model.config.decoder_start_token_id = 0
    return model


def freeze(model: Any, names: Iterable[str]) -> Any:
    names = frozenset(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


def frozen(family: str, depth: int) -> Any:
    model = make(family)
    return freeze(model, find_layer_groups(model).frozen(depth))


def masked(lengths: Iterable[int], side: str = "right") -> Tensor:
    """(B, T): 1 where a text of its own length has a token."""
    lengths = list(lengths)
    places = torch.arange(max(lengths)).expand(len(lengths), -1)
    if side == "left":
        places = places.flip(1)
    return (places < torch.tensor(lengths)[:, None]).long()


def batch_of(
    family: str, lengths: tuple[int, ...] = (6, 4), side: str = "right", seed: int = 0
) -> Batch:
    """As many examples as there are lengths; the pad id stands where a text has no token."""
    inputs, size = EVERY[family].inputs, len(lengths)
    made = torch.Generator().manual_seed(seed)
    found: Batch = {}
    if "images" in inputs:
        found["pixel_values"] = torch.rand(size, 3, 32, 32, generator=made)
    if "sounds" in inputs:
        found["input_features"] = torch.rand(size, 1, 64, 16, generator=made)
    if family == "siglip":  # whose texts are all of one length, and have no mask
        found["input_ids"] = torch.randint(3, 30, (size, 6), generator=made)
    elif "words" in inputs:
        mask = masked(lengths, side)
        found["input_ids"] = torch.randint(3, 30, mask.shape, generator=made) * mask
        found["attention_mask"] = mask
    labels = torch.arange(size) % 3 % 2
    if "answers" in inputs:
        found["labels"] = torch.randint(3, 30, (size, 4), generator=made)
    elif family in ("gpt2-words", "llama-words"):
        found["labels"] = found["input_ids"].masked_fill(mask == 0, -100)
    elif family == "segformer-pixels":
        found["labels"] = torch.randint(0, 3, (size, 32, 32), generator=made)
    elif family not in TOWERS:
        found["labels"] = labels
    return found


def answers(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Batch]:
    """The loss, and all tensors that the model answers beside states."""
    extra = {"return_loss": True} if len(find_layer_groups(model).towers) > 1 else {}
    output = model(**batch, **extra)
    named = {n: v for n, v in output.items() if isinstance(v, Tensor) and "hidden" not in n}
    return output.loss, named


def trained(model: Any, batch: Mapping[str, Any], seed: int = 5) -> tuple[float, Batch]:
    """One step in training mode: the loss, and the gradients of what learns."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss, _ = answers(model.train(), batch)
        loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def with_features(model: Any, cut: Cut, batch: Batch) -> Batch:
    """The batch as it comes from the store: what the cut needs no more is gone."""
    modes = {module: module.training for module in model.modules()}
    [features] = capture(model.eval(), [cut], batch)
    for module, mode in modes.items():
        module.training = mode
    kept = {name: value for name, value in batch.items() if name not in cut.inputs}
    for number, (slot, feature) in enumerate(zip(cut.slots, features, strict=True)):
        if slot.varies:  # padding is not stored
            mask = batch[MASK]
            feature = with_padding(feature[mask.bool()], mask)
        kept[FEATURE.format(number)] = feature
    return kept


@contextmanager
def cut_model(model: Any, cut: Cut) -> Iterator[None]:
    with kept_in_eval(model), replayed(model, cut):
        yield


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@torch.no_grad()
def perturb(model: Any) -> None:
    """Let everything that learns be another, so that what was stored of it would be stale."""
    made = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=made))


def assert_replays(model: Any, cut: Cut, batch: Batch) -> None:
    """On stored tensors, the model does what it does on the whole batch, though it learned since.

    Bit for bit: what it answers in eval mode, and in training mode, under the same seed, the loss
    and all gradients.
    """
    stored = with_features(model, cut, batch)
    perturb(model)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = []
    for inputs in (batch, stored, batch):
        with cut_model(model, cut) if len(found) else kept_in_eval(model):
            answered = answers(model.eval(), inputs)[1]
            found.append((answered, *trained(model, inputs)))
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    (whole, loss, gradients), *others = found
    assert gradients
    for answered, other_loss, other_gradients in others:
        assert answered.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(tokens(value, batch), tokens(answered[name], batch)), name
        assert other_loss == loss
        assert same(other_gradients, gradients)


def tokens(value: Tensor, batch: Batch) -> Tensor:
    """What a model answers, without the places of padding."""
    mask = batch.get(MASK)
    if mask is None or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool()]
