"""Answers cut out of texts: found by a model's logits, scored as SQuAD's official script does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

Ints = npt.NDArray[np.integer[Any]]
Scores = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Spans:
    """The best span of each of M examples: arrays of shape (M,).

    Attributes:
        start: the character of the context that it starts at.
        end: the character after its last; 0 as its start where there is no span at all.
        chance: the probability of its start and its end in its window.
        margin: by how much "no answer" outscores it, in sums of logits.
        no_chance: the probability of "no answer" in the window that speaks least for it.
    """

    start: Ints
    end: Ints
    chance: Scores
    margin: Scores
    no_chance: Scores


def best_spans(
    start_logits: Scores, end_logits: Scores, windows: Mapping[str, Any], examples: int, most: int
) -> Spans:
    """Find the span of each example with the highest sum of its start's and its end's logit.

    All spans are looked at, not only those of the likeliest starts and ends. "No answer" scores
    what it does in the window where that is lowest.

    Args:
        start_logits: (N, T), padded on the right.
        end_logits: (N, T), padded likewise.
        windows: of N windows `index`, the example it is of; `starts` and `ends`, for each token
            the characters of the context, -1 outside it; `null`, the token of "no answer".
        examples: M, each with a window at least.
        most: tokens that a span may have.
    """
    sizes = np.array([len(places) for places in windows["starts"]])
    count, width = len(sizes), sizes.max()
    starts, ends = (_padded(windows[name], width) for name in ("starts", "ends"))
    start_logits = np.asarray(start_logits[:, :width], dtype=np.float32)
    end_logits = np.asarray(end_logits[:, :width], dtype=np.float32)
    window, null, owner = np.arange(count), np.array(windows["null"]), np.array(windows["index"])

    score, first, last = np.full(count, -np.inf), np.zeros_like(null), np.zeros_like(null)
    start_scores = np.where(starts >= 0, start_logits, -np.inf)
    end_scores = np.where(ends >= 0, end_logits, -np.inf)
    for more in range(min(most, width)):  # spans of one token, of two ...
        sums = start_scores[:, : width - more] + end_scores[:, more:]
        place = sums.argmax(axis=1)
        better = sums[window, place] > score
        score = np.where(better, sums[window, place], score)
        first, last = np.where(better, place, first), np.where(better, place + more, last)
    silence = start_logits[window, null] + end_logits[window, null]

    padding = np.arange(width) >= sizes[:, None]
    total = _log_sum(start_logits, padding) + _log_sum(end_logits, padding)
    best, least = _highest(score, owner, examples), _highest(-silence, owner, examples)
    found = score[best] > -np.inf
    no_chance = np.exp(silence - total)[least]
    return Spans(
        start=np.where(found, starts[best, first[best]], 0),
        end=np.where(found, ends[best, last[best]], 0),
        chance=np.where(found, np.exp(score - total)[best], no_chance),
        margin=np.where(found, silence[least] - score[best], 0),
        no_chance=no_chance,
    )


def _padded(rows: Sequence[Sequence[int]], width: int) -> Ints:
    """Return rows as an array of shape (N, width), padded by -1."""
    padded = np.full((len(rows), width), -1, dtype=np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _log_sum(logits: Scores, padding: npt.NDArray[np.bool_]) -> Scores:
    """Return the logarithm of what a softmax over (N, T) logits divides by, (N,)."""
    sums: Scores = np.logaddexp.reduce(np.where(padding, -np.inf, logits), axis=1)
    return sums


def _highest(score: Scores, owner: Ints, examples: int) -> Ints:
    """Return which window of each example scores highest, (M,)."""
    order = np.argsort(score, kind="stable")
    chosen = np.zeros(examples, dtype=np.int64)
    chosen[owner[order]] = order  # of one example's the last, the highest, stays
    return chosen


def squad_scores(
    answers: Sequence[str],
    golds: Sequence[Sequence[str]],
    margins: Scores,
    threshold: float | None,
) -> dict[str, float]:
    """Return exact match and token F1, each question by the gold answer that suits it best.

    Where some questions have no gold answer, questions may be left unanswered, and more is told:
    F1 of the answerable ones, accuracy of the others, and the F1 that the best threshold would
    have given, with that threshold. It is best for these very questions: to be set by one split
    and scored on another.

    Args:
        answers: the best answer to each of M questions.
        golds: the right ones; none to a question without an answer.
        margins: (M,) by how much "no answer" scored higher than the best answer.
        threshold: the margin above which a question is left unanswered; None: none is.
    """
    exact, f1 = _agreements(answers, golds)
    answerable = np.array([bool(texts) for texts in golds])
    if answerable.all():
        return {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    # to leave a question unanswered is either wholly right or wholly wrong
    silent, _ = _agreements([""] * len(golds), golds)
    best, best_threshold = _best_threshold(f1, silent, margins)
    if threshold is not None:
        exact, f1 = (np.where(margins > threshold, silent, score) for score in (exact, f1))
    scores = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    if answerable.any():
        scores["has_answer_f1"] = float(f1[answerable].mean())
    return scores | {
        "no_answer_accuracy": float(exact[~answerable].mean()),
        "best_f1": best,
        "best_f1_threshold": best_threshold,
    }


def normalise(text: str) -> str:
    """Return a text without case, punctuation, English articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _agreements(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> tuple[Scores, Scores]:
    """Return exact match and F1 of each answer, (M,) both."""
    pairs = [_agreement(answer, texts) for answer, texts in zip(answers, golds, strict=True)]
    exact, f1 = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return exact, f1


def _agreement(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer with the gold one that suits it best."""
    found = normalise(answer)
    # gold answers of which nothing remains are none
    texts = [text for text in map(normalise, golds) if text] or [""]
    return float(found in texts), max(_f1(found.split(), text.split()) for text in texts)


def _f1(found: Sequence[str], gold: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over words, repeated ones as often."""
    if not found or not gold:
        return float(found == gold)
    shared = (Counter(found) & Counter(gold)).total()
    return 2 * shared / (len(found) + len(gold))


def _best_threshold(answered: Scores, silent: Scores, margins: Scores) -> tuple[float, float]:
    """Return the highest mean score that a threshold on the margins gives, and the threshold.

    Args:
        answered: (M,) each question's score if it is answered.
        silent: (M,) its score if it is not.
        margins: (M,) of "no answer" over the answer.
    """
    order = np.argsort(margins, kind="stable")
    gains = np.concatenate([[0], np.cumsum((answered - silent)[order])])  # of answering the first k
    edges = margins[order].astype(np.float64)
    edges = np.concatenate([edges[:1] - 1, edges, edges[-1:] + 1])
    gains[edges[:-1] == edges[1:]] = -np.inf  # equal margins can't be told apart
    count = int(gains.argmax())
    best = (silent.sum() + gains[count]) / len(margins)
    return float(best), float((edges[count] + edges[count + 1]) / 2)
