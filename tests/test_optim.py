"""Learning rates by depth, weight decay where it belongs, optimizer state carried by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from hfft.errors import InputError
from hfft.layers import LayerGroup, LayerGroups, find_layer_groups
from hfft.optim import carry_state, learning_rates, parameter_groups, state_by_name

from .families import batchnorm_resnet, bert, vit

GROUPS = LayerGroups(
    towers={
        "deep": tuple(LayerGroup(f"deep.{n}", (f"deep.{n}.w",)) for n in range(3)),
        "short": (LayerGroup("short.0", ("short.0.w",)),),
    },
    head=LayerGroup("head", ("head.w", "head.b")),
)


def test_rate_falls_by_the_decay_with_each_group_below_the_head() -> None:
    assert learning_rates(GROUPS, 0.8, layer_decay=0.5) == {
        "head.w": 0.8,
        "head.b": 0.8,
        "deep.2.w": pytest.approx(0.4),
        "deep.1.w": pytest.approx(0.2),
        "deep.0.w": pytest.approx(0.1),
        "short.0.w": pytest.approx(0.4),
    }


def test_head_multiplier_raises_the_head_alone() -> None:
    rates = learning_rates(GROUPS, 0.8, head_multiplier=10)
    assert rates.pop("head.w") == rates.pop("head.b") == pytest.approx(8)
    assert set(rates.values()) == {0.8}


def test_decay_and_multiplier_go_together() -> None:
    rates = learning_rates(GROUPS, 1.0, layer_decay=0.5, head_multiplier=3)
    assert (rates["head.w"], rates["deep.2.w"], rates["deep.0.w"]) == (3, 0.5, 0.125)


def test_decay_needs_an_order_of_layers() -> None:
    groups = LayerGroups(
        {"backbone": (LayerGroup("backbone", ("w",)),)}, GROUPS.head, ordered=False
    )
    assert learning_rates(groups, 0.1) == {"w": 0.1, "head.w": 0.1, "head.b": 0.1}
    with pytest.raises(InputError, match=r"layer_decay: 0\.9 needs an order of layers"):
        learning_rates(groups, 0.1, layer_decay=0.9)


def test_a_tower_may_have_a_rate_and_a_decay_of_its_own() -> None:
    assert learning_rates(
        GROUPS, 0.8, layer_decay=0.5, tower_rates={"deep": 0.2}, tower_decays={"deep": 0.1}
    ) == {
        "head.w": 0.8,
        "head.b": 0.8,
        "deep.2.w": pytest.approx(0.02),
        "deep.1.w": pytest.approx(0.002),
        "deep.0.w": pytest.approx(0.0002),
        "short.0.w": pytest.approx(0.4),
    }
    rates = learning_rates(GROUPS, 0.8, head_multiplier=2, tower_rates={"short": 0.0})
    assert (rates["short.0.w"], rates["deep.0.w"], rates["head.w"]) == (0, 0.8, 1.6)


@pytest.mark.parametrize("field", ["tower_rates", "tower_decays"])
def test_rate_of_a_tower_that_is_not_there_is_an_error(field: str) -> None:
    with pytest.raises(InputError, match=r"towers\.dep: .* no such tower; did you mean 'deep'"):
        learning_rates(GROUPS, 0.1, **{field: {"dep": 0.5}})  # type: ignore[arg-type]


def test_a_towers_decay_needs_an_order_of_layers() -> None:
    groups = LayerGroups({"text": (LayerGroup("text", ("w",)),)}, GROUPS.head, ordered=False)
    with pytest.raises(InputError, match=r"^towers\.text\.layer_decay: 0\.9 needs an order"):
        learning_rates(groups, 0.1, tower_decays={"text": 0.9})


# Parameter groups


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def grouped(model: Any, **rates: Any) -> list[dict[str, Any]]:
    decayed = Trainer.get_decay_parameter_names(None, model)
    return parameter_groups(
        model, learning_rates(find_layer_groups(model), 0.1, **rates), decayed, 0.01
    )


@pytest.mark.parametrize("make", [bert, vit, batchnorm_resnet])
def test_biases_and_norms_have_no_weight_decay_and_matrices_have(make: Any) -> None:
    model = make()
    norms = (nn.LayerNorm, nn.modules.batchnorm._NormBase)
    spared = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name == "bias"
    }
    weights = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    decay = {name: g["weight_decay"] for g in grouped(model) for name in names(g)}
    assert {decay[name] for name in spared} == {0}
    assert {decay[name] for name in weights} == {0.01}


def test_every_learning_parameter_stands_in_one_group_with_its_rate() -> None:
    model = bert()
    groups = grouped(model, layer_decay=0.5, head_multiplier=4)
    every = [name for group in groups for name in names(group)]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 10  # five rates, each with and without weight decay
    rates = {name: group["lr"] for group in groups for name in names(group)}
    assert rates["classifier.weight"] == pytest.approx(0.4)
    assert rates["bert.encoder.layer.2.output.dense.bias"] == pytest.approx(0.05)
    assert rates["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.1 / 16)


def test_frozen_parameters_are_in_no_group() -> None:
    model = bert()
    model.bert.requires_grad_(False)
    assert [names(group) for group in grouped(model)] == [
        ["classifier.weight"],
        ["classifier.bias"],
    ]


# Carried state


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())


def two() -> Two:
    torch.manual_seed(0)
    return Two()


def adam(model: nn.Module, rate: float = 0.01) -> torch.optim.Optimizer:
    rates = {name: rate for name, _ in model.named_parameters()}
    decayed = {name for name in rates if name.endswith("weight")}
    return torch.optim.AdamW(parameter_groups(model, rates, decayed, 0.1))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def steps(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    return {name: int(state["step"]) for name, state in state_by_name(optimizer).items()}


def test_carried_state_goes_on_as_if_nothing_had_happened() -> None:
    straight, parted = two(), two()
    run(straight, adam_ := adam(straight), range(6))
    first = adam(parted)
    run(parted, first, range(3))
    second = adam(parted)
    carry_state(second, state_by_name(first))
    run(parted, second, range(3, 6))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, parted.state_dict()[name]), name
    assert steps(second) == steps(adam_)


def test_without_carrying_the_result_differs() -> None:
    straight, parted = two(), two()
    run(straight, adam(straight), range(6))
    run(parted, adam(parted), range(3))
    run(parted, adam(parted), range(3, 6))
    assert not torch.equal(straight.body.weight, parted.body.weight)


def test_steps_count_on_and_what_thaws_starts_afresh() -> None:
    model = two()
    model.body.requires_grad_(False)
    first = adam(model)
    run(model, first, range(3))
    assert steps(first) == {"head.weight": 3, "head.bias": 3}
    model.body.requires_grad_(True)
    second = adam(model)
    carry_state(second, state_by_name(first))
    run(model, second, range(3, 5))
    assert steps(second) == {
        "head.weight": 5,
        "head.bias": 5,
        "body.weight": 2,
        "body.bias": 2,
    }


def test_state_of_what_no_longer_learns_is_left_out() -> None:
    model = two()
    first = adam(model)
    run(model, first, range(2))
    model.head.requires_grad_(False)
    second = adam(model)
    carry_state(second, state_by_name(first))
    assert set(state_by_name(second)) == {"body.weight", "body.bias"}
    run(model, second, range(2, 3))
    assert steps(second) == {"body.weight": 3, "body.bias": 3}


def test_rates_of_the_new_stage_survive_the_carried_state() -> None:
    model = two()
    first = adam(model, rate=0.01)
    run(model, first, range(1))
    second = adam(model, rate=0.5)
    carry_state(second, state_by_name(first))
    assert {group["lr"] for group in second.param_groups} == {0.5}


def test_momenta_go_to_the_parameters_of_the_same_name_whatever_the_groups() -> None:
    model = two()
    first = adam(model)
    run(model, first, range(2))
    rates = {name: 0.1 * (i + 1) for i, (name, _) in enumerate(model.named_parameters())}
    second = torch.optim.AdamW(parameter_groups(model, rates, rates, 0.1)[::-1])
    carry_state(second, state_by_name(first))
    for name, state in state_by_name(first).items():
        assert torch.equal(state_by_name(second)[name]["exp_avg"], state["exp_avg"])
