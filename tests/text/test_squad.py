from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hfft.text.squad import best_spans, normalise, squad_scores

NO_MARGINS = np.zeros(1)


def scores(answer: str, *golds: str) -> tuple[float, float]:
    found = squad_scores([answer], [golds], NO_MARGINS, None)
    return found["exact_match"], found["f1"]


# Expected by the official script: compute_exact and compute_f1 of evaluate-v2.0.py.
@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos", "Broncos"], 1, 1),
        ("the  Denver-Broncos!", ["DenverBroncos"], 1, 1),  # a dash goes, and leaves no space
        ("a the an", ["An apple"], 0, 0),
        ("Denver", ["The Denver Broncos"], 0, 2 / 3),
        ("in the city of Santa Clara", ["Santa Clara, California"], 0, 2 * 2 / (5 + 3)),
        ("the theatre", ["theatre"], 1, 1),  # an article in a word is none
        ("no no no yes", ["no no"], 0, 2 * 2 / (4 + 2)),
        ("two", ["2", "two men", "a pair"], 0, 2 / 3),
        ("", ["something"], 0, 0),
        ("the", ["a", "..."], 1, 1),  # of which nothing remains: nothing is right
    ],
)
def test_scores_are_the_official_scripts(
    answer: str, golds: list[str], exact: float, f1: float
) -> None:
    assert scores(answer, *golds) == pytest.approx((exact, f1))


def test_normal_form_is_words_without_case_articles_and_punctuation() -> None:
    assert normalise(" The U.S.\tof  A, an 'Island' ") == "us of island"


def test_data_whose_every_question_has_an_answer_leave_none_unanswered() -> None:
    found = squad_scores(["x", "y"], [["x"], ["z"]], np.array([9.0, 9.0]), 0.0)
    assert found == {"exact_match": 0.5, "f1": 0.5}


def test_unanswerable_questions_are_scored_by_the_threshold() -> None:
    answers = ["right", "wrong", "right one", "none asked", "none asked"]
    golds = [["right"], ["other"], ["right"], [], []]
    margins = np.array([-3.0, 2.0, 0.0, 1.0, -1.0])
    found = squad_scores(answers, golds, margins, 0.0)
    assert found == pytest.approx(
        {
            "exact_match": 2 / 5,
            "f1": (1 + 0 + 2 / 3 + 1 + 0) / 5,
            "has_answer_f1": (1 + 0 + 2 / 3) / 3,
            "no_answer_accuracy": 1 / 2,
            # of answering the first alone, or the three whose margins are the lowest: the former
            "best_f1": (1 + 0 + 0 + 1 + 1) / 5,
            "best_f1_threshold": -2,
        }
    )
    never = squad_scores(answers, golds, margins, None)
    assert (never["f1"], never["no_answer_accuracy"]) == pytest.approx(((1 + 2 / 3) / 5, 0))
    best = squad_scores(answers, golds, margins, found["best_f1_threshold"])
    assert best["f1"] == pytest.approx(found["best_f1"])


def test_nothing_but_unanswerable_questions_has_no_score_of_answerable_ones() -> None:
    found = squad_scores(["x", "y"], [[], []], np.array([-1.0, 1.0]), 0.0)
    assert found["f1"] == found["no_answer_accuracy"] == 0.5
    assert "has_answer_f1" not in found
    assert found["best_f1"] == 1
    assert found["best_f1_threshold"] < -1


def test_best_threshold_is_the_best_of_all() -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        golds = [[word] if word else [] for word in random.choice(["", "a b", "b"], 12)]
        if all(golds):
            continue
        answers = list(random.choice(["b", "b c", "d"], 12))
        margins = random.integers(-3, 4, 12).astype(float)  # with equal ones among them

        def f1(threshold: float, *given: Any) -> float:
            return squad_scores(*given, threshold)["f1"]

        tried = [f1(one, answers, golds, margins) for one in np.arange(-4, 5) + 0.5]
        found = squad_scores(answers, golds, margins, 0.0)
        assert found["best_f1"] == pytest.approx(max(tried))
        assert f1(found["best_f1_threshold"], answers, golds, margins) == pytest.approx(max(tried))


def random_windows(random: np.random.Generator, count: int) -> dict[str, list[Any]]:
    """Windows of a question, of context tokens three characters apart, and of a closing token."""
    windows: dict[str, list[Any]] = {"index": [], "starts": [], "ends": [], "null": []}
    for number in range(count):
        before, context = random.integers(1, 4), random.integers(1, 9)
        starts = [10 * number + 3 * n for n in range(context)]
        windows["index"].append(number // 2)
        windows["starts"].append([-1] * before + starts + [-1])
        windows["ends"].append([-1] * before + [one + 2 for one in starts] + [-1])
        windows["null"].append(int(random.integers(before)))
    return windows


@pytest.mark.parametrize("most", [1, 3, 100])
def test_best_spans_are_those_of_a_search_through_all(most: int) -> None:
    random = np.random.default_rng(most)
    windows = random_windows(random, 20)
    width = max(map(len, windows["starts"])) + 2
    start, end = random.normal(size=(2, 20, width)).astype(np.float32) * 3
    found = best_spans(start, end, windows, 10, most)
    for example in range(10):
        spans, silences = [], []
        for w in (n for n in range(20) if windows["index"][n] == example):
            starts, ends, null = (windows[name][w] for name in ("starts", "ends", "null"))
            tokens = len(starts)
            chances = [np.exp(x[w, :tokens]) / np.exp(x[w, :tokens]).sum() for x in (start, end)]
            spans += [
                (start[w, i] + end[w, j], starts[i], ends[j], chances[0][i] * chances[1][j])
                for i in range(tokens)
                for j in range(i, tokens)
                if starts[i] >= 0 and starts[j] >= 0 and j - i < most
            ]
            silences.append((start[w, null] + end[w, null], chances[0][null] * chances[1][null]))
        best, silence = max(spans), min(silences)
        assert (found.start[example], found.end[example]) == best[1:3]
        assert found.chance[example] == pytest.approx(best[3], rel=1e-4)
        assert found.no_chance[example] == pytest.approx(silence[1], rel=1e-4)
        assert found.margin[example] == pytest.approx(silence[0] - best[0], abs=1e-4)


def test_padding_of_any_value_changes_no_span() -> None:
    random = np.random.default_rng(0)
    windows = random_windows(random, 6)
    width = max(map(len, windows["starts"])) + 1
    start, end = random.normal(size=(2, 6, width)) - 200  # lower than what batches are padded with
    found = best_spans(start, end, windows, 3, 30)
    for number, places in enumerate(windows["starts"]):
        start[number, len(places) :] = end[number, len(places) :] = -100
    padded = best_spans(start, end, windows, 3, 30)
    for name in ("start", "end", "chance", "margin", "no_chance"):
        assert np.array_equal(getattr(found, name), getattr(padded, name))


def test_context_without_a_token_has_no_span() -> None:
    windows = {"index": [0], "starts": [[-1, -1]], "ends": [[-1, -1]], "null": [0]}
    found = best_spans(np.ones((1, 2)), np.ones((1, 2)), windows, 1, 30)
    assert (found.start[0], found.end[0], found.margin[0]) == (0, 0, 0)
    assert found.chance[0] == pytest.approx(0.25)
