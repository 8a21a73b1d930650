"""LoRA's penalties equal those of the dense weight W0 + s B A."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfft.penalties import L2SP, Cosine, Euclidean, Orthogonal
from hfft.penalties.kinds import WeightPenalty
from hfft.penalties.low_rank import LowRank, Product

from .test_weights import (
    Plain,
    drawn,
    plain_cosine,
    plain_euclidean,
    plain_l2_sp,
    plain_orthogonal,
)

SIZES = [(7, 5, 2), (5, 9, 3), (4, 4, 6)]  # out, in, r; also a rank above both
KINDS: dict[str, tuple[type[WeightPenalty], Plain]] = {
    "l2_sp": (L2SP, plain_l2_sp),
    "euclidean": (Euclidean, plain_euclidean),
    "cosine": (Cosine, plain_cosine),
    "orthogonal": (Orthogonal, plain_orthogonal),
}


def products(scale: float = 0.7) -> list[Product]:
    found = []
    for n, (out, width, rank) in enumerate(SIZES):
        base, a, b = drawn(n, [(out, width), (rank, width), (out, rank)])
        found.append(Product(base, (a.requires_grad_(), b.requires_grad_()), scale))
    return found


def dense(made: list[Product]) -> list[Tensor]:
    return [p.base + p.scale * p.learning[1] @ p.learning[0] for p in made]


@pytest.mark.parametrize(("kind", "plain"), KINDS.values(), ids=KINDS)
def test_value_and_gradients_are_those_of_the_dense_weight(
    kind: type[WeightPenalty], plain: Plain
) -> None:
    made = products()
    options = kind.Options.model_validate({"interval": 1} if kind is Orthogonal else {})
    bound = kind(options).bind(LowRank(made))
    value = plain(dense(made), [p.base for p in made])
    expected = torch.autograd.grad(value, bound.variables)
    targets = [torch.zeros_like(v) for v in bound.variables]
    bound.add(targets, [1.0] * len(targets), 0)
    assert bound.value() == pytest.approx(float(value.detach()), rel=1e-9)
    for own, other in zip(targets, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


def test_at_the_start_b_is_zero_and_nothing_is_nan() -> None:
    made = products()
    for p in made:
        with torch.no_grad():
            p.learning[1].zero_()
    for kind, _ in KINDS.values():
        bound = kind(kind.Options()).bind(LowRank(made))
        targets = [torch.zeros_like(v) for v in bound.variables]
        bound.add(targets, [1.0] * len(targets), 0)
        assert all(torch.isfinite(t).all() for t in targets)
    assert float(LowRank(made).moments().dd.sum()) == 0


def test_a_kind_that_somebody_wrote_for_dense_weights_works_by_the_chain_rule() -> None:
    class Cubic(WeightPenalty):
        def value_and_gradient(self, theta, source):  # type: ignore[no-untyped-def]
            pairs = list(zip(theta, source, strict=True))
            value = sum(((t - s) ** 3).sum() for t, s in pairs)
            return value, [3 * (t - s) ** 2 for t, s in pairs]

    made = products()
    value = sum(((t - p.base) ** 3).sum() for t, p in zip(dense(made), made, strict=True))
    bound = Cubic(Cubic.Options()).bind(LowRank(made))
    expected = torch.autograd.grad(value, bound.variables)  # type: ignore[arg-type]
    targets = [torch.zeros_like(v) for v in bound.variables]
    bound.add(targets, [1.0] * len(targets), 0)
    torch.testing.assert_close(targets, list(expected))
    assert bound.value() == pytest.approx(float(value))
