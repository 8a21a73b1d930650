"""The hook on the optimizer's step: order, modes, learning rates, fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfft.errors import InputError
from hfft.penalties.penalty import Attachment, Part, Setting, get

from .test_weights import drawn

SHAPES = [(3, 4), (5,)]


def attach(
    optimizer: torch.optim.Optimizer, parts: list[Part], kind: str = "l2_sp", **fields: Any
) -> Attachment:
    penalty = get(kind)
    return penalty(penalty.Options()).attach(Setting(nn.Module(), optimizer, parts, **fields))


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in drawn(0, SHAPES)]


def part(weights: list[nn.Parameter], strength: float = 0.5) -> Part:
    return Part(strength, ("a", "b"), tuple(weights), tuple(drawn(1, SHAPES)))


def give_gradients(weights: list[nn.Parameter]) -> list[Tensor]:
    gradients = drawn(2, SHAPES)
    for parameter, gradient in zip(weights, gradients, strict=True):
        parameter.grad = gradient.clone()
    return gradients


def test_coupled_adds_the_gradient_once_a_step() -> None:
    mine = weights()
    optimizer = torch.optim.SGD(mine, lr=0.1)
    attach(optimizer, [part(mine)])
    before, gradients = [p.detach().clone() for p in mine], give_gradients(mine)
    optimizer.step()
    for p, b, g, s in zip(mine, before, gradients, drawn(1, SHAPES), strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * (g + 0.5 * (b - s)))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_decoupled_with_a_source_of_zeros_is_adamw_s_weight_decay(kind: Any) -> None:
    mine, other = weights(), weights()
    optimizer = torch.optim.AdamW(mine, lr=0.1, weight_decay=0)
    theirs = torch.optim.AdamW(other, lr=0.1, weight_decay=0.3)
    zeros = tuple(torch.zeros_like(p) for p in mine)
    attach(optimizer, [Part(0.3, ("a", "b"), tuple(mine), zeros)], mode="decoupled")
    for _ in range(5):
        give_gradients(mine)
        give_gradients(other)
        optimizer.step()
        theirs.step()
    for p, q in zip(mine, other, strict=True):
        torch.testing.assert_close(p, q)


def test_decoupled_follows_each_groups_own_learning_rate() -> None:
    mine = weights()
    optimizer = torch.optim.SGD([{"params": [mine[0]], "lr": 0.1}, {"params": [mine[1]], "lr": 0}])
    attach(optimizer, [part(mine)], mode="decoupled")
    before, source = [p.detach().clone() for p in mine], drawn(1, SHAPES)
    for p in mine:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(mine[0].detach(), before[0] - 0.05 * (before[0] - source[0]))
    assert torch.equal(mine[1].detach(), before[1])


def test_what_got_no_gradient_is_left_alone() -> None:
    for mode in ("coupled", "decoupled"):
        mine = weights()
        optimizer = torch.optim.SGD(mine, lr=0.1)
        attach(optimizer, [part(mine)], mode=mode)
        before = mine[1].detach().clone()
        mine[0].grad = torch.zeros_like(mine[0])
        optimizer.step()
        assert torch.equal(mine[1].detach(), before)


def test_several_strengths_and_penalties_add_up() -> None:
    mine, other = weights(), weights()
    optimizer, theirs = torch.optim.SGD(mine, lr=0.1), torch.optim.SGD(other, lr=0.1)
    source = drawn(1, SHAPES)
    attach(optimizer, [part(mine, 0.2)])
    attach(optimizer, [part(mine, 0.1)], "euclidean")
    give_gradients(mine)
    gradients = give_gradients(other)
    length = sum(((p - s) ** 2).sum() for p, s in zip(other, source, strict=True)).sqrt()  # type: ignore[union-attr]
    for p, s, g in zip(other, source, gradients, strict=True):
        d = (p - s).detach()
        p.grad = g + 0.2 * d + 0.1 * d / length.detach()
    optimizer.step()
    theirs.step()
    for p, q in zip(mine, other, strict=True):
        torch.testing.assert_close(p, q)


def test_value_is_r_and_strength_times_r_by_the_schedule() -> None:
    mine = weights()
    attached = attach(torch.optim.SGD(mine, lr=0.1), [part(mine, 0.5)], factor=lambda: 0.1)
    r = sum(float(((p - s) ** 2).sum()) / 2 for p, s in zip(mine, drawn(1, SHAPES), strict=True))
    assert attached.value() == pytest.approx((r, 0.05 * r))


def test_removing_it_leaves_the_optimizer_as_it_was() -> None:
    mine = weights()
    optimizer = torch.optim.SGD(mine, lr=0.1)
    attach(optimizer, [part(mine)]).remove()
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    mine = weights()
    with pytest.raises(InputError, match="the optimizer does not hold all that is penalised"):
        attach(torch.optim.SGD(weights(), lr=0.1), [part(mine)])


def scaled_run(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], *, clip: bool, mode: str
) -> list[Tensor]:
    """Five steps under a GradScaler, the third of which has an infinite gradient."""
    mine = [nn.Parameter(t.float()) for t in drawn(0, SHAPES)]
    optimizer = make(mine)
    source = tuple(s.float() for s in drawn(1, SHAPES))
    attach(optimizer, [Part(0.5, ("a", "b"), tuple(mine), source)], mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    for step in range(5):
        loss = sum((p * t.float()).sum() for p, t in zip(mine, drawn(step, SHAPES), strict=True))
        if step == 2:
            loss = loss * torch.inf
        scaler.scale(loss).backward()  # type: ignore[arg-type]
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(mine, 1e9)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [p.detach() for p in mine]


def unscaled_run(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], mode: str
) -> list[Tensor]:
    mine = [nn.Parameter(t.float()) for t in drawn(0, SHAPES)]
    optimizer = make(mine)
    source = tuple(s.float() for s in drawn(1, SHAPES))
    attach(optimizer, [Part(0.5, ("a", "b"), tuple(mine), source)], mode=mode)
    for step in (0, 1, 3, 4):  # without the step that scaling skips
        loss = sum((p * t.float()).sum() for p, t in zip(mine, drawn(step, SHAPES), strict=True))
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in mine]


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_fp16_scaling_changes_nothing_and_a_skipped_step_is_no_step(
    mode: str, clip: bool, fused: bool
) -> None:
    def make(mine: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(mine, lr=0.1, weight_decay=0, fused=fused)

    for p, q in zip(scaled_run(make, clip=clip, mode=mode), unscaled_run(make, mode), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
