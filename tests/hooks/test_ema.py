"""The moving average: what it is, how it survives, and what it leaves alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfft.averaging import weights_of
from hfft.errors import InputError
from hfft.hooks import EmaCallback, ReplicasCallback

from ..families import FAMILIES, batchnorm_resnet, bert

STEPS = 6


class Timms(TrainerCallback):
    """timm's average, beside ours."""

    def __init__(self, model: Any, warmup: bool) -> None:
        self.model, self.warmup = model, warmup
        self.average = ModelEmaV3(model, decay=0.9, use_warmup=warmup)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update(self.model, step=state.global_step if self.warmup else None)


def trainer(
    model: Any, family: str, folder: Path, *callbacks: TrainerCallback, **arguments: Any
) -> Trainer:
    random = torch.Generator().manual_seed(0)
    inputs = FAMILIES[family].example()
    data: Any = [
        {name: value[n % 2].clone() for name, value in inputs.items()} | {"labels": n % 2}
        for n in range(8)
    ]
    for one in data:
        for value in one.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value += torch.rand(value.shape, generator=random)
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
        **arguments,
    }
    own = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **given,
    )
    return Trainer(model=model, args=own, train_dataset=data, callbacks=[*callbacks])


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("warmup", [False, True])
def test_average_of_a_training_is_timms_bit_for_bit(warmup: bool, tmp_path: Path) -> None:
    model = made(batchnorm_resnet)
    peer, ema = Timms(model, warmup), EmaCallback(model, 0.9, warmup=warmup)
    trainer(model, "timm-resnet", tmp_path, peer, ema).train()
    found, expected = load_file(tmp_path / "ema.safetensors"), weights_of(peer.average.module)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(found["timm_model.fc.weight"], weights_of(model)["timm_model.fc.weight"])
    other = made(batchnorm_resnet)
    ema.copy_to(other)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_of(other).items())


def test_training_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    one, other = made(bert), made(bert)
    trainer(one, "bert", tmp_path / "a").train()
    trainer(other, "bert", tmp_path / "b", EmaCallback(other)).train()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("make", [batchnorm_resnet, bert])
@pytest.mark.parametrize("warmup", [False, True])
def test_resumed_training_ends_at_the_same_average_bit_for_bit(
    make: Callable[[], Any], warmup: bool, tmp_path: Path
) -> None:
    family = "bert" if make is bert else "timm-resnet"
    whole = made(make)
    trainer(whole, family, tmp_path, EmaCallback(whole, 0.9, warmup=warmup)).train()
    expected = load_file(tmp_path / "ema.safetensors")
    (tmp_path / "ema.safetensors").unlink()
    again = made(make)
    going_on = trainer(again, family, tmp_path, EmaCallback(again, 0.9, warmup=warmup))
    going_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = load_file(tmp_path / "ema.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_frozen_parameters_are_not_averaged(tmp_path: Path) -> None:
    model = made(bert)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    trainer(model, "bert", tmp_path, EmaCallback(model)).train()
    found = load_file(tmp_path / "ema.safetensors")
    assert {n for n in found if "position_ids" not in n} <= {"classifier.weight", "classifier.bias"}


def test_weights_in_low_precision_have_an_average_in_float32(tmp_path: Path) -> None:
    model = made(bert).to(torch.bfloat16)
    ema = EmaCallback(model, 0.999, warmup=False)
    start = model.classifier.weight.detach().clone().float()
    trainer(model, "bert", tmp_path, ema).train()
    found = load_file(tmp_path / "ema.safetensors")["classifier.weight"]
    assert found.dtype == torch.float32
    assert not torch.equal(found, start)
    ema.copy_to(model)
    assert torch.equal(model.classifier.weight, found.to(torch.bfloat16))


def test_channels_last_weights_are_kept_too(tmp_path: Path) -> None:
    model = made(batchnorm_resnet).to(memory_format=torch.channels_last)
    trainer(model, "timm-resnet", tmp_path, EmaCallback(model)).train()
    assert load_file(tmp_path / "ema.safetensors").keys() == weights_of(model).keys()


def test_checkpoint_without_an_average_can_not_be_gone_on_from(tmp_path: Path) -> None:
    model = made(bert)
    trainer(model, "bert", tmp_path).train()
    going_on = trainer(model, "bert", tmp_path, EmaCallback(model))
    with pytest.raises(InputError, match=r"checkpoint-2.ema\.safetensors: is missing"):
        going_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        EmaCallback(made(bert), decay)


def average_on_two(folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    model = made(batchnorm_resnet)
    ema = EmaCallback(model, 0.9)
    own = trainer(
        model,
        "timm-resnet",
        Path(folder),
        ReplicasCallback(),
        ema,
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
    )
    assert own.args.world_size == 2
    own.train()
    average = deepcopy(model)
    ema.copy_to(average)
    for name, tensor in weights_of(average).items():
        every = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(every, tensor.contiguous())
        assert torch.equal(every[0], every[1]), name
    if dist.get_rank() == 0:
        Path(folder, "proved").write_text(str(own.args.world_size))


@pytest.mark.slow
def test_two_processes_have_one_average_statistics_of_batchnorm_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    debug_launcher(average_on_two, (str(tmp_path),), num_processes=2)
    assert (tmp_path / "proved").read_text() == "2"
