"""stochnorm: which statistics a channel is normalised with, and what does not change."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfft.errors import InputError
from hfft.hooks.freeze import FreezeCallback, kept_in_eval
from hfft.hooks.stochnorm import StochNormCallback, chosen_by_channel, stochastically_normalised

from ..families import FAMILIES, batchnorm_resnet, timm_model, vit

CHANNELS = 16
LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, (6, CHANNELS)),
    "1d-series": (nn.BatchNorm1d, (6, CHANNELS, 4)),
    "2d": (nn.BatchNorm2d, (3, CHANNELS, 4, 5)),
    "3d": (nn.BatchNorm3d, (3, CHANNELS, 2, 4, 3)),
    "no-affine": (partial(nn.BatchNorm2d, affine=False), (3, CHANNELS, 4, 5)),
    "cumulative": (partial(nn.BatchNorm2d, momentum=None), (3, CHANNELS, 4, 5)),
}


def layer(kind: str) -> tuple[Any, Tensor]:
    """A layer whose weights and statistics are no special case, in float64, and an input to it."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    norm = make(CHANNELS).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm, torch.randn(shape, dtype=torch.float64) * 2 + 1


def by_hand(norm: Any, inputs: Tensor, running: Tensor) -> Tensor:
    """What the layer computes where the channels in `running`, (C,), use running statistics."""
    others = [axis for axis in range(inputs.dim()) if axis != 1]
    mean = torch.where(running, norm.running_mean, inputs.mean(others))
    variance = torch.where(running, norm.running_var, inputs.var(others, correction=0))
    shape = (1, -1, *[1] * (inputs.dim() - 2))
    output: Tensor = (inputs - mean.view(shape)) / (variance + norm.eps).sqrt().view(shape)
    return output * norm.weight.view(shape) + norm.bias.view(shape)


def drawn(p: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(CHANNELS) < p


def trainer(model: Any, family: str, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    inputs = FAMILIES[family].example()
    data: Any = [
        {name: value[number] for name, value in inputs.items()} | {"labels": torch.tensor(number)}
        for number in range(2)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[*callbacks])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def untouched(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


def test_a_channel_takes_running_statistics_with_probability_p() -> None:
    torch.manual_seed(0)
    draws = [
        chosen_by_channel(torch.zeros(2, 500, 3), torch.ones(2, 500, 3), 0.2) for _ in range(20)
    ]
    chosen = torch.stack(draws)
    assert 0.18 < chosen.mean() < 0.22
    assert torch.equal(chosen, chosen[:, :1, :, :1].expand_as(chosen))  # all of a channel, or none
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("kind", ["1d", "1d-series", "2d", "3d"])
def test_output_and_gradients_are_the_formulas(kind: str) -> None:
    norm, inputs = layer(kind)
    inputs.requires_grad_()
    running = drawn(0.5, seed=1)
    assert 0 < running.sum() < CHANNELS
    outer = torch.randn_like(inputs)
    twin = deepcopy(norm)
    expected = by_hand(twin, inputs, running)
    of_formula = torch.autograd.grad(expected, (inputs, twin.weight, twin.bias), outer)
    with stochastically_normalised(norm, 0.5):
        torch.manual_seed(1)
        output = norm(inputs)
        gradients = torch.autograd.grad(output, (inputs, norm.weight, norm.bias), outer)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, of_formula)


@pytest.mark.parametrize("kind", ["1d", "3d", "no-affine", "cumulative"])
def test_running_statistics_move_as_with_batchnorm(kind: str) -> None:
    norm, inputs = layer(kind)
    plain = deepcopy(norm)
    with stochastically_normalised(norm, 0.5):
        for step in range(3):
            norm(inputs + step)
            plain(inputs + step)
    assert same(copy(norm), copy(plain))
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("kind", LAYERS)
def test_p_0_is_batchnorm_bit_for_bit(kind: str) -> None:
    norm, inputs = layer(kind)
    plain = deepcopy(norm)
    before = torch.get_rng_state()
    with stochastically_normalised(norm, 0):
        assert torch.equal(norm(inputs), plain(inputs))
    assert same(copy(norm), copy(plain))
    assert torch.equal(torch.get_rng_state(), before)


def test_p_1_trains_as_it_evaluates_and_still_moves_the_statistics() -> None:
    norm, inputs = layer("2d")
    expected = deepcopy(norm).eval()(inputs)
    mean = norm.running_mean.clone()
    with stochastically_normalised(norm, 1):
        torch.testing.assert_close(norm(inputs), expected)
    assert not torch.equal(norm.running_mean, mean)


def test_evaluation_is_that_of_batchnorm_and_draws_nothing() -> None:
    norm, inputs = layer("2d")
    norm.eval()
    expected, before = norm(inputs), torch.get_rng_state()
    with stochastically_normalised(norm, 0.5):
        assert torch.equal(norm(inputs), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("held", [True, False])
def test_frozen_layers_are_batchnorm_bit_for_bit(held: bool) -> None:
    (frozen, inputs), (learns, _) = layer("2d"), layer("2d")
    frozen.requires_grad_(False)
    model = nn.Sequential(frozen, learns)
    if held:
        with kept_in_eval(model), stochastically_normalised(model, 0.5):
            model.train()
            assert torch.equal(frozen(inputs), deepcopy(frozen).eval()(inputs))
    else:  # no gradients, but in training mode: the user's own way
        with stochastically_normalised(model, 0.5):
            assert torch.equal(frozen(inputs), deepcopy(frozen)(inputs))


def test_timms_layer_drops_and_activates_after_norming() -> None:
    plain, inputs = layer("2d")
    norm = BatchNormAct2d(CHANNELS, act_layer=nn.SiLU, drop_layer=nn.Dropout).double()
    norm.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    with stochastically_normalised(plain, 0.5):
        expected = nn.functional.silu(nn.functional.dropout(plain(inputs), 0.5))
    torch.manual_seed(1)
    with stochastically_normalised(norm, 0.5):
        assert torch.equal(norm(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_under_autocast_is_batchnorms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
    inputs = torch.randn(4, 3, 5, 5)
    evaluates, plain = deepcopy(model).eval(), deepcopy(model)
    running = drawn(0.5, seed=1)
    with torch.autocast("cpu", dtype):
        expected = torch.where(running.view(-1, 1, 1), evaluates(inputs), plain(inputs))
        with stochastically_normalised(model, 0.5):
            torch.manual_seed(1)
            output = model(inputs)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    assert same(copy(model), copy(plain))  # statistics in float32


def test_channels_last_stays_so() -> None:
    norm, inputs = layer("2d")
    with stochastically_normalised(norm, 0.5):
        output = norm(inputs.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_that_batchnorm_refuses_is_refused() -> None:
    norm = nn.BatchNorm2d(3)
    with stochastically_normalised(norm, 0.5):
        with pytest.raises(ValueError, match="expected 4D input"):
            norm(torch.randn(2, 3))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(torch.randn(1, 3, 1, 1))


def test_nothing_is_left_behind_after_an_exception() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.raises(RuntimeError, match="channels"), stochastically_normalised(model, 0.5):
        model(torch.randn(2, 4, 1, 1))
    assert untouched(model)


def test_a_forward_that_somebody_else_put_there_is_put_back() -> None:
    norm = nn.BatchNorm2d(3)
    with stochastically_normalised(norm, 1):
        outer = norm.forward
        with stochastically_normalised(norm, 0.5):
            assert norm.forward is not outer
        assert norm.forward is outer
    assert untouched(norm)


def test_a_copy_made_meanwhile_normalises_with_its_own_weights() -> None:
    norm, inputs = layer("2d")
    with stochastically_normalised(norm, 1):
        twin = deepcopy(norm)
        with torch.no_grad():
            twin.weight.zero_()
            assert torch.equal(twin(inputs), twin.bias.view(-1, 1, 1).expand_as(inputs))


def test_resnet_trains_with_it_and_keeps_its_state_dict(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = batchnorm_resnet()
    assert {type(m) for m in start.modules() if "Norm" in type(m).__name__} == {nn.BatchNorm2d}
    ends = []
    for p in (None, 0.0, 0.5):
        model = deepcopy(start)
        callbacks = [] if p is None else [StochNormCallback(model, p)]
        trainer(model, "timm-resnet", tmp_path, *callbacks).train()
        assert untouched(model)
        ends.append(copy(model))
    plain, none, stochastic = ends
    assert same(plain, none)
    assert plain.keys() == stochastic.keys()
    assert not same(plain, stochastic)


def test_mobilenet_with_timms_layers_trains_with_it(tmp_path: Path) -> None:
    model = timm_model("mobilenetv3_small_050")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(m) for m in norms} == {BatchNormAct2d}
    seen: list[bool] = []
    handle = model.register_forward_pre_hook(
        lambda *_: seen.append(all("forward" in vars(m) for m in norms))
    )
    trainer(model, "timm-efficientnet", tmp_path, StochNormCallback(model, 0.5)).train()
    handle.remove()
    assert seen == [True] * 3
    assert untouched(model)


def test_beside_the_freeze_callback_it_changes_what_learns(tmp_path: Path) -> None:
    model = batchnorm_resnet()
    freeze = FreezeCallback(model, 3)
    before, changed = copy(model), set[str]()
    model.register_forward_pre_hook(
        lambda *_: changed.update(n for n, m in model.named_modules() if "forward" in vars(m))
    )
    trainer(model, "timm-resnet", tmp_path, freeze, StochNormCallback(model, 0.5)).train()
    assert changed
    assert all(".layer3." in name or ".layer4." in name for name in changed)
    moved = {name for name, now in copy(model).items() if not torch.equal(now, before[name])}
    assert {name for name in moved if "running_mean" in name} == {
        f"{name}.running_mean" for name in changed
    }


def test_a_training_after_one_that_broke_off_leaves_nothing_behind(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("broke off")

    model = batchnorm_resnet()
    callback = StochNormCallback(model, 0.5)
    with pytest.raises(RuntimeError, match="broke off"):
        trainer(model, "timm-resnet", tmp_path, callback, Breaks()).train()
    trainer(model, "timm-resnet", tmp_path, callback).train()
    assert untouched(model)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_out_of_range_is_found_before_training(p: float) -> None:
    with pytest.raises(InputError, match=r"stochnorm: p is .*; give a number from 0 "):
        StochNormCallback(batchnorm_resnet(), p)


def test_a_model_without_batchnorm_is_told_the_norms_it_has() -> None:
    with pytest.raises(InputError, match=r"ViT.* has no BatchNorm layers, only LayerNorm"):
        StochNormCallback(vit(), 0.5)


def test_a_model_of_which_all_batchnorm_is_frozen_is_told_so() -> None:
    model = batchnorm_resnet()
    FreezeCallback(model, "backbone")
    with pytest.raises(InputError, match=r"all \d+ BatchNorm layers of Timm.* are frozen; thaw"):
        StochNormCallback(model, 0.5)


def test_batchnorm_without_running_statistics_is_told_so() -> None:
    with pytest.raises(InputError, match="tracks running statistics"):
        StochNormCallback(nn.BatchNorm2d(3, track_running_stats=False), 0.5)


def test_synchronised_batchnorm_that_learns_is_refused() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3))
    with pytest.raises(InputError, match="SyncBatchNorm layers, whose statistics"):
        StochNormCallback(model, 0.5)
    model[0].requires_grad_(False)
    StochNormCallback(model, 0.5)
