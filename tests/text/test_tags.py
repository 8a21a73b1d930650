from __future__ import annotations

import warnings
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score

from hfft.text.tags import TAG_SCHEMES, TagScheme

BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
BIOES = ["O", *(f"{mark}-{kind}" for kind in ("PER", "LOC") for mark in "BIES")]
BILOU = ["O", *(f"{mark}-{kind}" for kind in ("PER", "LOC") for mark in "BILU")]


def scheme_of(labels: list[str]) -> str:
    return next(name for name, scheme in TAG_SCHEMES.items() if scheme.fits(labels))


def scored(
    truth: list[str], guesses: list[str], labels: list[str] = BIO
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    scheme: TagScheme = TAG_SCHEMES[scheme_of(labels)]
    tags = [one.split(" ") for one in truth], [one.split(" ") for one in guesses]
    return scheme.scores(*tags), scheme.scores_by_label(*tags)


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (BIO, "bio"),
        (["B", "I", "O"], "bio"),
        (["B-a-b", "O"], "bio"),
        (BIOES, "bioes"),
        (["S-PER", "O"], "bioes"),
        (BILOU, "bilou"),
        (["NOUN", "VERB", "O"], "none"),
        (["I-PER", "O"], "none"),
        (["B_PER", "I_PER", "O"], "none"),
        (["B-PER", "I-PER", "X"], "none"),
    ],
)
def test_scheme_is_told_by_the_names(labels: list[str], scheme: str) -> None:
    assert scheme_of(labels) == scheme


@pytest.mark.parametrize("labels", [BIO, BIOES, BILOU, ["N", "V"]])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_pieces_give_their_words_tag_back(labels: list[str], pieces: int) -> None:
    scheme = TAG_SCHEMES[scheme_of(labels)]
    for tag in labels:
        spread = scheme.spread(tag, pieces)
        assert len(spread) == pieces
        assert scheme.gather(spread[0], spread[-1]) == tag


@pytest.mark.parametrize(
    ("labels", "tags", "entities"),
    [
        (BIO, "B-PER I-PER B-PER O I-LOC", [("PER", 0, 2), ("PER", 2, 3)]),
        (BIOES, "S-PER B-LOC E-LOC B-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        (["N", "O"], "N O N", [("N", 0, 1), ("N", 2, 3)]),
    ],
)
def test_entities_are_found(
    labels: list[str], tags: str, entities: list[tuple[str, int, int]]
) -> None:
    assert TAG_SCHEMES[scheme_of(labels)].entities(tags.split(" ")) == entities


def test_entity_scores_agree_with_counting() -> None:
    truth = ["B-PER I-PER O B-LOC", "B-LOC B-LOC O O", "O O B-PER O"]
    guesses = ["B-PER I-PER O B-PER", "B-LOC I-LOC O O", "O B-PER B-PER O"]
    scores, rows = scored(truth, guesses)
    # found: PER (0-1) of the first, PER (2) of the last; 5 are there, 5 are predicted
    assert scores["precision"] == pytest.approx(2 / 5)
    assert scores["recall"] == pytest.approx(2 / 5)
    assert scores["f1"] == pytest.approx(2 / 5)
    assert scores["accuracy"] == pytest.approx(9 / 12)
    assert rows == [
        {"label": "LOC", "precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 3},
        {
            "label": "PER",
            "precision": pytest.approx(2 / 4),
            "recall": 1.0,
            "f1": pytest.approx(2 / 3),
            "examples": 2,
        },
    ]


@pytest.mark.parametrize(
    ("labels", "truth", "guess", "found"),
    [
        (BIO, "O B-PER I-PER", "O I-PER I-PER", 0),  # nothing begins
        (BIO, "B-PER O O", "B-PER I-LOC O", 1),  # another type ends an entity
        (BIOES, "B-PER E-PER O", "B-PER I-PER O", 0),  # nothing ends
        (BIOES, "S-PER S-PER O", "S-PER S-PER O", 2),
        (BIOES, "S-PER S-PER O", "B-PER E-PER O", 0),
        (BILOU, "U-LOC B-PER L-PER", "U-LOC B-PER L-PER", 2),
    ],
)
def test_only_well_formed_entities_count(
    labels: list[str], truth: str, guess: str, found: int
) -> None:
    scores, _ = scored([truth], [guess], labels)
    there = sum(tag[0] in "BSU" for tag in truth.split(" "))
    assert scores["recall"] == pytest.approx(found / there)


def test_data_without_entities_score_nothing_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        scores, rows = scored(["O O"], ["O O"])
    assert scores == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
    assert rows == []


def test_plain_tags_are_scored_one_by_one() -> None:
    truth, guesses = ["N V N D", "D N"], ["N V V D", "N N"]
    scores, rows = scored(truth, guesses, ["D", "N", "V"])
    flat = [" ".join(tags).split(" ") for tags in (truth, guesses)]
    assert scores["accuracy"] == accuracy_score(*flat)
    assert scores["f1"] == pytest.approx(f1_score(*flat, average="macro"))
    assert {row["label"]: row["examples"] for row in rows} == {"D": 2, "N": 3, "V": 1}


def test_gap_that_is_no_tag_lowers_no_average() -> None:
    scores, rows = scored(["N V"], ["N O"], ["N", "V"])
    assert scores["f1"] == 1 / 2
    assert [row["label"] for row in rows] == ["N", "V"]
