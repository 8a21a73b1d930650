from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hfft.averaging import (
    decay_at,
    interpolate,
    load_weights_into,
    uniform,
    update_ema,
    weights_of,
    with_one_more,
)

from .families import FAMILIES, batchnorm_resnet


def trained(model: nn.Module, seed: int) -> Any:
    """A copy whose parameters and statistics have moved on."""
    random, other = torch.Generator().manual_seed(seed), deepcopy(model)
    with torch.no_grad():
        for tensor in weights_of(other).values():
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=random)
            else:
                tensor += seed
    return other


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def resnet() -> Any:
    torch.manual_seed(0)
    return batchnorm_resnet()


def test_interpolation_is_the_formula_in_float64() -> None:
    torch.manual_seed(0)
    source, tuned = ({"a": torch.randn(7, 3, dtype=torch.float64)} for _ in range(2))
    for alpha in (0.1, 0.5, 0.8):
        expected = (1 - alpha) * source["a"] + alpha * tuned["a"]
        torch.testing.assert_close(
            interpolate(source, tuned, alpha)["a"], expected, rtol=0, atol=1e-15
        )


def test_both_ends_of_an_interpolation_are_bit_for_bit(resnet: Any) -> None:
    source, tuned = weights_of(resnet), weights_of(trained(resnet, 1))
    counted = {name for name, tensor in tuned.items() if not tensor.is_floating_point()}
    assert same(interpolate(source, tuned, 1), tuned)
    start = interpolate(source, tuned, 0)
    assert all(torch.equal(start[name], source[name]) for name in source if name not in counted)


def test_what_is_equal_at_both_ends_stays_so_between_them() -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(1000)}
    assert all(same(interpolate(weights, weights, tenth / 10), weights) for tenth in range(11))


def test_what_the_source_lacks_is_as_tuned_at_every_alpha() -> None:
    source = {"body": torch.zeros(2)}
    tuned = {"body": torch.ones(2), "head": torch.full((3,), 5.0)}
    for alpha in (0, 0.25, 1):
        found = interpolate(source, tuned, alpha)
        assert found["head"].tolist() == [5, 5, 5]
        assert found["body"].tolist() == [alpha, alpha]


def test_running_statistics_are_averaged_and_counts_copied(resnet: Any) -> None:
    one, other = weights_of(resnet), weights_of(trained(resnet, 3))
    [mean] = [name for name in one if name.endswith("layer1.0.bn1.running_mean")]
    [count] = [name for name in one if name.endswith("layer1.0.bn1.num_batches_tracked")]
    for found in (interpolate(one, other, 0.5), with_one_more(one, other, 1)):
        torch.testing.assert_close(found[mean], (one[mean] + other[mean]) / 2)
        assert found[count] == 3
        assert found[count].dtype == torch.int64


def test_uniform_soup_is_torchs_averaged_model(resnet: Any) -> None:
    members = [trained(resnet, seed) for seed in range(4)]
    peer = AveragedModel(resnet, use_buffers=True)
    for member in members:
        peer.update_parameters(member)
    found = uniform(map(weights_of, members))
    expected = weights_of(peer.module)
    assert found.keys() == expected.keys()
    for name in found:
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


def test_uniform_soup_of_one_is_that_one_and_members_stay_as_they_are(resnet: Any) -> None:
    members = [weights_of(trained(resnet, seed)) for seed in range(3)]
    before = deepcopy(members)
    assert same(uniform(members[:1]), members[0])
    uniform(members)
    assert all(map(same, members, before))


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_moving_average_is_timms_bit_for_bit(resnet: Any, warmup: bool, decay: float) -> None:
    peer = ModelEmaV3(resnet, decay=decay, use_warmup=warmup)
    average = deepcopy(weights_of(resnet))
    for step in range(1, 8):
        model = trained(resnet, step)
        peer.update(model, step=step if warmup else None)
        update_ema(average, weights_of(model), decay_at(step, decay, warmup=warmup))
    assert same(average, weights_of(peer.module))


def test_warmup_starts_at_the_first_step_and_ends_at_the_decay() -> None:
    decays = [decay_at(step, 0.99, warmup=True) for step in (1, 2, 10, 999, 1001, 10**6)]
    assert decays[0] == 0
    assert decays == sorted(decays)
    assert decays[3] < 0.99
    assert decays[4:] == [0.99, 0.99]
    assert decay_at(1, 0.99, warmup=False) == 0.99


def test_shared_weights_stand_once_and_buffers_that_are_not_saved_not_at_all() -> None:
    model = FAMILIES["gpt2-words"].make()
    found = weights_of(model)
    assert "transformer.wte.weight" in found
    assert "lm_head.weight" not in found
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert weights_of(model).keys() == found.keys()


@pytest.mark.parametrize("family", ["timm-resnet", "bert", "gpt2-words", "t5", "clip"])
def test_loading_an_average_puts_all_of_it_into_the_model(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family].make()
    one, other = weights_of(trained(model, 1)), weights_of(trained(model, 2))
    soup = uniform([one, other])
    load_weights_into(model, soup)
    assert same(weights_of(model), soup)
    if family == "gpt2-words":
        assert model.lm_head.weight is model.transformer.wte.weight


def test_loading_leaves_alone_what_is_not_named() -> None:
    model = nn.Linear(2, 2)
    bias = model.bias.detach().clone()
    load_weights_into(model, {"weight": torch.ones(2, 2)})
    assert model.weight.tolist() == [[1, 1], [1, 1]]
    assert torch.equal(model.bias, bias)
