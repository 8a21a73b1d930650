from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hfft.class_scores import draw_confusion, scores_by_class

NAMES = ["a", "b", "c"]
LABELS, GUESSES = np.array([0, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 2, 2, 1])


def test_scores_agree_with_counting() -> None:
    rows = scores_by_class(LABELS, GUESSES, NAMES)
    assert [row["label"] for row in rows] == NAMES
    assert [row["examples"] for row in rows] == [1, 2, 3]
    assert [row["precision"] for row in rows] == pytest.approx([1 / 2, 1 / 2, 1])
    assert [row["recall"] for row in rows] == pytest.approx([1, 1 / 2, 2 / 3])
    assert [row["f1"] for row in rows] == pytest.approx([2 / 3, 1 / 2, 4 / 5])


def test_several_classes_at_once_are_scored_one_by_one() -> None:
    labels = np.array([[1, 0, 1], [1, 1, 0], [0, 0, 0]])
    guesses = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    rows = scores_by_class(labels, guesses, NAMES)
    assert [row["examples"] for row in rows] == [2, 1, 1]
    assert [row["precision"] for row in rows] == [1, 1, 0]
    assert [row["recall"] for row in rows] == [0.5, 1, 0]


def test_class_that_never_occurs_is_scored_as_none() -> None:
    row = scores_by_class(np.array([0, 0]), np.array([0, 0]), NAMES)[1]
    assert row == {"label": "b", "precision": 0, "recall": 0, "f1": 0, "examples": 0}


@pytest.mark.parametrize("count", [3, 41])
def test_confusion_is_a_picture_with_names_only_for_few_classes(tmp_path: Path, count: int) -> None:
    names = [f"class {number}" for number in range(count)]
    picture = draw_confusion(tmp_path, LABELS, GUESSES, names)
    assert picture == tmp_path / "confusion_matrix.png"
    with Image.open(picture) as image:
        assert image.width > 100
