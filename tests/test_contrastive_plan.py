from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from hfft.config import ContrastiveConfig, Stage
from hfft.contrastive_plan import SIZE, check_contrast, with_batch
from hfft.registry import get


def stage(**contrastive: int) -> Stage:
    return Stage(name="one", epochs=1, contrastive=ContrastiveConfig(**contrastive))


def problems(
    own: Stage, processes: int = 1, frozen: tuple[str, ...] = (), **training: Any
) -> list[str]:
    kind = get("zero-shot-image-classification")
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    subject: Any = SimpleNamespace(task=kind(kind.Options()), skeleton=model)
    return check_contrast(training, None, own, subject, frozen, processes)


@pytest.mark.parametrize(("processes", "each"), [(1, 4096), (8, 512)])
def test_each_process_has_its_share_of_the_global_batch(processes: int, each: int) -> None:
    found = with_batch({"learning_rate": 1.0}, stage(global_batch=4096, chunk=64), processes)
    assert found == {"learning_rate": 1.0, SIZE: each}


def test_a_chunk_alone_leaves_the_batch_to_the_training_section() -> None:
    assert with_batch({SIZE: 32}, stage(chunk=8), 2) == {SIZE: 32}
    assert with_batch({SIZE: 32}, Stage(name="one", epochs=1), 2) == {SIZE: 32}


def test_batchnorm_that_learns_cannot_see_a_chunk_for_a_batch() -> None:
    [problem] = problems(stage(global_batch=8, chunk=4))
    assert problem.startswith("contrastive.chunk: 1 normalises by the statistics of a batch")
    assert problems(stage(global_batch=8, chunk=4), frozen=("1.weight", "1.bias")) == []
    assert problems(stage(global_batch=8)) == []
    assert problems(stage(global_batch=8, chunk=8)) == []  # it is the batch
    assert problems(stage(global_batch=8, chunk=4), processes=2) == []


def test_the_chunk_divides_what_each_process_has() -> None:
    [problem] = problems(stage(global_batch=12, chunk=4), processes=2)
    assert "6 pairs of each process (12 in all) are no multiple of 4" in problem
