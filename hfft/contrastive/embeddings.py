"""What two towers make of pairs: embeddings of length 1, and how their similarities are scaled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfft.errors import InputError


@dataclass(frozen=True)
class Embeddings:
    """A batch of pairs as a model embeds them.

    Attributes:
        other: (B, D) of what is no text, of length 1.
        text: (B, D), of length 1.
        scale: what similarities are multiplied by; one number, of the model's own parameter.
        bias: what is added to them, by models of the sigmoid loss.
    """

    other: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, outputs: Any, model: nn.Module, other: str) -> Embeddings:
        """Return what a two-tower model's outputs embed.

        Args:
            outputs: with `text_embeds`, and `image_embeds` or `audio_embeds`.
            model: that they are of, unwrapped.
            other: what the tower beside the text tower reads: image, audio.
        """
        scale, bias = scale_and_bias(model)
        return cls(unit(outputs[f"{other}_embeds"]), unit(outputs["text_embeds"]), scale, bias)


def unit(found: Any) -> Tensor:
    """Return embeddings (B, D) at length 1, in float32: of a tensor, or what a tower pools to."""
    return functional.normalize(getattr(found, "pooler_output", found).float(), dim=-1)


def scale_and_bias(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a model's logit scale, no longer as a logarithm, and its logit bias if it has one."""
    scale = cast(Tensor, model.get_parameter("logit_scale")).exp()
    return scale, cast(Tensor | None, getattr(model, "logit_bias", None))


def check_towers(model: nn.Module, kind: str) -> None:
    """Check that a model learns by a contrastive loss, and by which.

    Args:
        model: of two towers; its weights don't matter.
        kind: softmax or sigmoid.

    Raises:
        InputError: it has no logit scale, or is for the other loss.
    """
    name = type(model).__name__
    if getattr(model, "logit_scale", None) is None:
        raise InputError(
            f"model: {name} has no logit_scale, the one number by which the contrast of pairs is "
            f"scaled (CLAP has two); take a model of two towers that has (CLIP, SigLIP), or put "
            f"one together: model.towers"
        )
    biased = getattr(model, "logit_bias", None) is not None
    if biased and kind == "softmax":
        raise InputError(
            f"task.loss: {name} has a logit_bias, which a softmax leaves without a gradient; set "
            f"task.loss: sigmoid, as it was pretrained"
        )
    if not biased and kind == "sigmoid":
        raise InputError(
            f"task.loss: sigmoid needs a logit_bias, which {name} has not; set task.loss: softmax, "
            f"or take a SigLIP"
        )


@torch.no_grad()
def embed_texts(
    model: Any, batches: Iterable[Mapping[str, Tensor]], device: torch.device
) -> Tensor:
    """Return the embeddings of texts, (N, D), of length 1, without dropout.

    Args:
        model: of two towers, unwrapped; left in the mode it is in.
        batches: token ids and what goes with them, each (B, T).
        device: the model's.
    """
    mode = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = []
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            found.append(unit(model.get_text_features(**inputs)))
        return torch.cat(found)
    finally:
        for module, training in mode.items():
            module.training = training
