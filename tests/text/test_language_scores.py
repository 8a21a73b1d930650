from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from hfft.text import language_scores
from hfft.text.inputs import IGNORED
from hfft.text.language_scores import LANGUAGE_METRICS, language_metrics, score_tokens


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (4, 7))
    labels[0, 3:] = IGNORED
    labels[2] = IGNORED
    return torch.randn(4, 7, 11) * 3, labels


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_scores_are_those_of_each_example_alone(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_scores, "_NUMBERS_AT_ONCE", at_once)
    logits, labels = batch()
    scores = score_tokens(logits, labels)
    for row in range(4):
        kept = labels[row] != IGNORED
        wanted = labels[row][kept]
        loss = functional.cross_entropy(logits[row][kept], wanted, reduction="sum")
        right = int((logits[row][kept].argmax(-1) == wanted).sum())
        assert scores[row].tolist() == pytest.approx([loss.item(), int(kept.sum()), right])


def test_metrics_weigh_every_token_alike() -> None:
    logits, labels = batch()
    found = language_metrics(score_tokens(logits, labels).numpy())
    mean = functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean().item()
    assert tuple(found) == LANGUAGE_METRICS
    assert found == pytest.approx(
        {"loss": mean, "perplexity": math.exp(mean), "token_accuracy": right}
    )


def test_scores_of_half_precision_are_summed_in_full() -> None:
    logits, labels = batch()
    halves = logits.bfloat16()
    torch.testing.assert_close(score_tokens(halves, labels), score_tokens(halves.float(), labels))


def test_hopeless_loss_has_infinite_perplexity() -> None:
    found = language_metrics(np.array([[5000.0, 2.0, 0.0]]))
    assert found == {"loss": 2500.0, "perplexity": math.inf, "token_accuracy": 0.0}
