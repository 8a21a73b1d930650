"""Selective projection decay against the paper's formula, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfft.penalties.penalty import Part, Setting, get
from hfft.penalties.selective import projected

from .test_weights import drawn


def test_a_run_is_the_paper_s_formula_after_each_step() -> None:
    shapes = [(3, 4), (5,), (2, 2)]
    source = drawn(1, shapes)
    mine = [nn.Parameter(t.clone()) for t in drawn(0, shapes)]
    other = [t.detach().clone() for t in mine]
    optimizer = torch.optim.SGD(mine, lr=0.3)
    part = Part(0.8, ("a", "b", "c"), tuple(mine), tuple(source))
    penalty = get("spd")
    attached = penalty(penalty.Options()).attach(Setting(nn.Module(), optimizer, [part]))
    drew_back = []
    for step in range(20):
        gradients = drawn(10 + step, shapes)
        for parameter, gradient in zip(mine, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for n, gradient in enumerate(gradients):
            before = other[n]
            stepped = before - 0.3 * gradient
            other[n] = projected(stepped, before, source[n], gradient, 0.8)
            drew_back.append(not torch.equal(other[n], stepped))
    for own, plain in zip(mine, other, strict=True):
        torch.testing.assert_close(own.detach(), plain)
    assert any(drew_back)
    assert not all(drew_back)
    attached.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_strength_one_puts_a_tensor_back_at_the_distance_it_had() -> None:
    source, before = torch.zeros(2), torch.tensor([1.0, 0.0])
    gradient = torch.tensor([0.1, 2.0])  # along the difference, and mostly across it
    theta = before - gradient
    back = projected(theta, before, source, gradient, 1.0)
    assert float(theta.norm()) > 1
    assert float(back.norm()) == pytest.approx(1)


def test_a_step_against_the_difference_is_left_alone() -> None:
    source, before, gradient = torch.zeros(1), torch.ones(1), -torch.ones(1)
    theta = before - gradient
    assert torch.equal(projected(theta, before, source, gradient, 1.0), theta)
