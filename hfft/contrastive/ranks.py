"""Retrieval: how high what belongs to something ranks among all that there is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Keys = npt.NDArray[np.int64]

_ROWS = 1024  # of similarities at a time


def ranks(queries: Array, gallery: Array, belongs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rank, from 1, of the best that belongs to each query: (Q,).

    What is as similar as it, and doesn't belong, ranks before it: a model that embeds everything
    alike finds nothing, and nor does one whose embeddings are no numbers.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        belongs: (P, 2) pairs of a query's and a gallery item's number; one or more of each query.
    """
    belongs = belongs[np.argsort(belongs[:, 0], kind="stable")]
    found = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(queries)))
        similar = queries[rows] @ gallery.T
        low, high = np.searchsorted(belongs[:, 0], [start, start + len(rows)])
        query, item = belongs[low:high].T
        own = np.full(len(rows), -np.inf, dtype=similar.dtype)
        np.maximum.at(own, query - start, similar[query - start, item])
        similar[query - start, item] = -np.inf
        found[rows] = 1 + (~(similar < own[:, None])).sum(axis=1)  # NaN is not less
    return found


def retrieval_scores(
    one: Array, other: Array, keys: Keys, names: tuple[str, str]
) -> dict[str, float]:
    """Score retrieval both ways, over all of a split: recall at 1, 5 and 10, and the median rank.

    Equal keys are one thing: an image with five captions stands once among the images, and each of
    the five is right.

    Args:
        one: (N, D) embeddings.
        other: (N, D) embeddings of what belongs to each.
        keys: (N, 2) which of one, and which of the other, each is.
        names: of the two.

    Returns:
        `recall_at_1`, the mean of both ways, and each way's scores by name.
    """
    _, first, which = np.unique(keys[:, 0], return_index=True, return_inverse=True)
    _, second, whose = np.unique(keys[:, 1], return_index=True, return_inverse=True)
    pairs = np.unique(np.stack([which, whose], axis=1), axis=0).astype(np.int64)
    rows, columns = one[first], other[second]
    there = f"{names[0]}_to_{names[1]}", ranks(rows, columns, pairs)
    back = f"{names[1]}_to_{names[0]}", ranks(columns, rows, pairs[:, ::-1])
    found = {"recall_at_1": float(np.mean([(there[1] == 1).mean(), (back[1] == 1).mean()]))}
    for way, rank in (there, back):
        found |= {f"{way}_recall_at_{k}": float((rank <= k).mean()) for k in (1, 5, 10)}
        found[f"{way}_median_rank"] = float(np.median(rank))
    return found
