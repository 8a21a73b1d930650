"""Injection: the identity forward, one more gradient backward."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hfft.penalties.injection import Injection, inject
from hfft.penalties.penalty import Part, Setting


def squares(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.square().sum(), 2 * features


def setting(model: nn.Module, strength: float = 0.5, **changes: Any) -> Setting:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Setting(model, optimizer, [Part(strength)], **changes)


class OnOutput(Injection):
    """Penalises what a module gives out."""

    def __init__(self, setting: Setting, module: nn.Module) -> None:
        super().__init__(setting)
        self.hooks.append(module.register_forward_hook(lambda _m, _a, o: self.inject(o, squares)))


def test_forward_is_the_identity_and_backward_adds_the_scaled_gradient() -> None:
    features, outer = torch.randn(2, 3, 4), torch.randn(3, 4)
    leaf = features[0].clone().requires_grad_()
    for copy in (True, False):
        result = inject(leaf, squares, lambda value: 0.25, copy=copy)
        assert torch.equal(result, leaf)
        (gradient,) = torch.autograd.grad(result, leaf, outer)
        torch.testing.assert_close(gradient, outer + 0.5 * leaf)


def test_nothing_happens_without_a_gradient_to_come() -> None:
    constant, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
    assert inject(constant, squares, lambda value: 1.0) is constant
    with torch.no_grad():
        assert inject(leaf, squares, lambda value: 1.0) is leaf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    leaf = torch.randn(5).to(dtype).requires_grad_()
    seen: list[torch.dtype] = []

    def rule(features: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(features.dtype)
        assert not torch.is_autocast_enabled("cpu")
        return squares(features)

    with torch.autocast("cpu", torch.bfloat16):
        result = inject(leaf, rule, lambda value: 0.1)
        (gradient,) = torch.autograd.grad(result.float().sum(), leaf)
    assert seen == [torch.float32]
    assert torch.equal(gradient, (1 + 0.1 * 2 * leaf.detach().float()).to(dtype))


def test_autocast_trains_on_the_penalty() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    inputs = torch.randn(6, 3)
    found = []
    for half in (False, True):
        model.zero_grad()
        work = OnOutput(setting(model), model[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model(inputs)
        output.float().sum().backward()
        work.remove()
        found.append(model[0].weight.grad.clone())  # type: ignore[union-attr,operator]
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpointing_counts_the_penalty_once(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).double()
    inputs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    plain = deepcopy(model)
    hidden = plain[:3](inputs)
    r = hidden.square().sum()
    expected = torch.autograd.grad(
        plain[3](hidden).sum() + 0.5 * 0.25 * r, list(plain.parameters())
    )
    work = OnOutput(setting(model, loss_scale=lambda: 0.25), model[2])
    if reentrant is None:
        output = model(inputs)
    else:
        output = checkpoint(model, inputs, use_reentrant=reentrant)
    output.sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert work.value() == pytest.approx((r.item(), 0.5 * r.item()))


def test_a_module_that_works_in_place_overwrites_nothing_that_is_needed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    inputs = torch.randn(5, 3)
    hidden = model[0](inputs)
    expected = torch.autograd.grad(
        model[2](hidden.relu()).sum() + 0.5 * hidden.square().sum(), list(model.parameters())
    )
    OnOutput(setting(model), model[0])
    model(inputs).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_value_is_the_mean_over_micro_batches_since_it_was_asked_last() -> None:
    model = nn.Linear(2, 2, bias=False)
    factor = [1.0]
    work = OnOutput(setting(model, factor=lambda: factor[0]), model)
    assert work.value() == (0, 0)
    values = []
    for factor[0] in (1.0, 0.5):
        output = model(torch.randn(3, 2))
        values.append(output.square().sum().item())
        output.sum().backward()
    expected = sum(values) / 2, 0.5 * (values[0] + 0.5 * values[1]) / 2
    assert work.value() == pytest.approx(expected)
    assert work.value() == (0, 0)


def test_values_that_are_not_finite_are_left_out_of_the_mean() -> None:
    model = nn.Linear(1, 1, bias=False)
    work = OnOutput(setting(model), model)
    for number in (2.0, float("inf")):
        model(torch.full((1, 1), number)).sum().backward()
    assert work.value()[0] == pytest.approx((2 * model.weight).square().sum().item())


def test_state_dict_and_hooks_are_the_plain_models_afterwards() -> None:
    model = nn.Linear(2, 2)
    before = list(model.state_dict())
    work = OnOutput(setting(model), model)
    assert list(model.state_dict()) == before
    work.remove()
    assert not model._forward_hooks
