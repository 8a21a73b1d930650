"""Scores of each class, and the confusion matrix: what tasks with classes report alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def scores_by_class(
    labels: np.ndarray, guesses: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return precision, recall, F1 and the number of examples of each class.

    Args:
        labels: classes of shape (N,); or 1 for each that an example is of, of shape (N, classes).
        guesses: of the same shape.
        names: every class.
    """
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        labels, guesses, labels=range(len(names)), zero_division=0
    )
    return [
        {
            "label": name,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "examples": int(examples),
        }
        for name, precision, recall, f1, examples in zip(names, *columns, strict=True)
    ]


def draw_confusion(
    folder: Path, labels: np.ndarray, guesses: np.ndarray, names: Sequence[str]
) -> Path:
    """Draw the confusion matrix into a folder; beyond 40 classes without names and numbers.

    Args:
        folder: where the picture goes.
        labels: classes of shape (N,).
        guesses: of shape (N,).
        names: every class.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    matrix = confusion_matrix(labels, guesses, labels=range(len(names)))
    side = min(4 + 0.35 * len(names), 20)
    figure = Figure(figsize=(side, side), layout="constrained")
    few = len(names) <= 40
    display = ConfusionMatrixDisplay(matrix, display_labels=names if few else None)
    axes = figure.subplots()
    display.plot(ax=axes, include_values=few, cmap="Blues", colorbar=False)
    axes.tick_params(axis="x", rotation=90 if max(map(len, names)) > 2 else 0)
    if not few:
        axes.set(xticks=[], yticks=[])
    path = folder / "confusion_matrix.png"
    figure.savefig(path, dpi=120)
    return path
