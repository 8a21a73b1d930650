"""Which tokens of a row a language model lets each of them see, tried on random ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfft.text.inputs import IGNORED
from hfft.text.packing import RowCollator, join_examples


def reads_ahead(model: PreTrainedModel) -> bool:
    """Return whether what a model says of a text's beginning changes with the tokens after it."""
    _, text = _texts(model)
    with _still(model):
        whole, beginning = (_logits(model, {"input_ids": ids[None]}) for ids in (text, text[:-1]))
    return not _same(beginning, whole[:, :-1], model)


def keeps_apart(model: PreTrainedModel) -> bool:
    """Return whether a model says of texts that share a row what it says of each alone.

    They are batched as in training, with one row shorter than the other.
    """
    first, second = _texts(model)
    rows = [
        join_examples([{"input_ids": ids, "labels": ids} for ids in texts])
        for texts in ([first, second], [second])
    ]
    batch = RowCollator.of(0, model.config)(rows)
    places = (batch.pop("labels") != IGNORED).to(model.device)
    with _still(model):
        alone = [_logits(model, {"input_ids": ids[None]})[0] for ids in (first, second, second)]
        try:
            together = _logits(model, batch)[places]
        except (TypeError, ValueError):  # it doesn't take positions
            return False
    return _same(together, torch.cat(alone), model)


def _texts(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    known = model.config.get_text_config().vocab_size
    short, long = (torch.randint(known, (length,), generator=random) for length in (5, 8))
    return short, long


@contextmanager
def _still(model: PreTrainedModel) -> Iterator[None]:
    """Have a model in evaluation mode for a while, and each of its modules as it was after.

    Flash attention takes neither float32 nor the CPU, where models are tried: sdpa stands for it.
    """
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation
    model.eval()  # type: ignore[no-untyped-call]
    if "flash" in str(attention):
        model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            yield
    finally:
        if "flash" in str(attention):
            model.set_attn_implementation(attention)
        for module in training:
            module.training = True


def _logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    moved = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    return cast(Tensor, model(**moved).logits).float()


def _same(one: Tensor, other: Tensor, model: PreTrainedModel) -> bool:
    """Return whether logits are the same but for rounding."""
    rounding = torch.finfo(model.dtype).eps
    if one.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        rounding = max(rounding, 2**-10)
    return bool((one - other).abs().max() <= max(1e-4, 8 * rounding) * other.abs().max())
