"""How well a language model predicts tokens, as three numbers an example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hfft.text.inputs import IGNORED

LANGUAGE_METRICS = ("loss", "perplexity", "token_accuracy")
"""What `language_metrics` returns."""

_NUMBERS_AT_ONCE = 2**24
"""Logits made float32 at a time: 64 MB."""


def score_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Reduce logits to three numbers an example.

    Args:
        logits: of shape (B, T, vocabulary), of any precision; no float32 copy of all is made.
        labels: (B, T) tokens, aligned with the logits; IGNORED ones don't count.

    Returns:
        (B, 3): the sum of the tokens' negative log-likelihoods in nats, the number of tokens, and
        the number of those that the model thinks likeliest.
    """
    scores = torch.zeros(len(labels), 3, dtype=torch.float32, device=logits.device)
    rows, places = (labels != IGNORED).nonzero(as_tuple=True)
    size = max(1, _NUMBERS_AT_ONCE // logits.shape[-1])
    for row, place in zip(torch.split(rows, size), torch.split(places, size), strict=True):
        seen, wanted = logits[row, place].float(), labels[row, place]
        losses = functional.cross_entropy(seen, wanted, reduction="none")
        right = (seen.argmax(dim=-1) == wanted).float()
        scores.index_add_(0, row, torch.stack([losses, torch.ones_like(losses), right], dim=1))
    return scores


def language_metrics(scores: Any) -> dict[str, float]:
    """Return loss, perplexity and accuracy over all tokens of all examples, each token alike.

    Args:
        scores: (N, 3), of `score_tokens`.
    """
    loss, tokens, right = np.asarray(scores, dtype=np.float64).sum(axis=0).tolist()
    mean = loss / tokens
    try:
        perplexity = math.exp(mean)
    except OverflowError:
        perplexity = math.inf
    return {"loss": mean, "perplexity": perplexity, "token_accuracy": right / tokens}
