from __future__ import annotations

import numpy as np
import pytest

from hfft.contrastive import ranks as module
from hfft.contrastive.ranks import ranks, retrieval_scores


def unit(count: int, width: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def one_by_one(queries: np.ndarray, gallery: np.ndarray, belongs: np.ndarray) -> list[int]:
    """Sort the gallery for each query, and look where the first that belongs is."""
    found = []
    for number, query in enumerate(queries):
        own = set(belongs[belongs[:, 0] == number, 1].tolist())
        order = np.argsort(-(gallery @ query), kind="stable").tolist()
        found.append(1 + next(place for place, item in enumerate(order) if item in own))
    return found


def test_ranks_are_those_of_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 7)  # several blocks, the last one smaller
    queries, gallery = unit(30, 4, 0), unit(50, 4, 1)
    chance = np.random.default_rng(2)
    belongs = np.array([(q, g) for q in range(30) for g in chance.choice(50, 1 + q % 3, False)])
    chance.shuffle(belongs)
    assert ranks(queries, gallery, belongs).tolist() == one_by_one(queries, gallery, belongs)


def test_what_is_as_similar_ranks_before_what_belongs() -> None:
    alike = np.ones((5, 3), dtype=np.float32)
    belongs = np.stack([np.arange(5), np.arange(5)], axis=1)
    assert ranks(alike, alike, belongs).tolist() == [5] * 5


def test_what_else_belongs_does_not_push_the_best_down() -> None:
    query = np.array([[1, 0]], dtype=np.float32)
    gallery = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert ranks(query, gallery, np.array([[0, 0], [0, 1]])).tolist() == [1]
    assert ranks(query, gallery, np.array([[0, 2]])).tolist() == [3]


def test_an_image_of_several_captions_stands_once_in_the_gallery() -> None:
    images, texts = unit(4, 8, 3), unit(12, 8, 4)
    keys = np.array([(n // 3, 100 + n) for n in range(12)])
    found = retrieval_scores(np.repeat(images, 3, axis=0), texts, keys, ("image", "text"))
    there = one_by_one(images, texts, keys - [0, 100])
    back = one_by_one(texts, images, (keys - [0, 100])[:, ::-1])
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall_at_{k}"] == np.mean(np.array(there) <= k)
        assert found[f"text_to_image_recall_at_{k}"] == np.mean(np.array(back) <= k)
    assert found["image_to_text_median_rank"] == np.median(there)
    assert found["text_to_image_median_rank"] == np.median(back)
    one, other = found["image_to_text_recall_at_1"], found["text_to_image_recall_at_1"]
    assert found["recall_at_1"] == pytest.approx((one + other) / 2)


def test_a_caption_of_several_images_finds_any_of_them() -> None:
    images = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    texts = np.array([[0, 1], [0, 1], [1, 0]], dtype=np.float32)
    keys = np.array([[0, 7], [1, 7], [2, 8]])  # the first image's caption is that of the second
    found = retrieval_scores(images, texts, keys, ("image", "text"))
    assert found["text_to_image_median_rank"] == 1.5  # the first finds the second image at once
    assert found["image_to_text_recall_at_1"] == pytest.approx(1 / 3)


def test_embeddings_that_are_no_numbers_find_nothing() -> None:
    good, lost = unit(6, 4, 5), np.full((6, 4), np.nan, dtype=np.float32)
    belongs = np.stack([np.arange(6), np.arange(6)], axis=1)
    assert min(ranks(lost, good, belongs)) >= 6
    assert min(ranks(good, lost, belongs)) >= 6
    one = good.copy()
    one[3] = np.nan  # stands before all others
    assert min(ranks(good, one, belongs)) >= 2
