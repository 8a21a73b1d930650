"""FreezeCallback in a stock Trainer: what it freezes does not move, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hfft.errors import InputError
from hfft.hooks import FreezeCallback
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups

from ..families import FAMILIES, batchnorm_resnet, bert


def examples(family: str) -> list[dict[str, torch.Tensor]]:
    inputs = FAMILIES[family].example()
    return [
        {name: value[number] for name, value in inputs.items()} | {"labels": torch.tensor(number)}
        for number in range(2)
    ]


def trainer(model: Any, family: str, folder: Path, *callbacks: FreezeCallback) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        weight_decay=0.1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data: Any = examples(family)
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[*callbacks])


def copy(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    return {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}


@pytest.mark.parametrize("freeze", ["backbone", 2, ["bert.encoder.layer.1", "*.bias"]])
def test_frozen_tensors_stay_as_they_are_and_all_others_move(freeze: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert(hidden_dropout_prob=0.1)
    frozen = find_layer_groups(model).frozen(freeze)
    run = trainer(model, "bert", tmp_path, FreezeCallback(model, freeze))
    before = copy(model)
    run.train()
    unused = {  # rows that no example looks up get no gradient, and decay only with weight_decay
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
    }
    learning = {name for name, _ in model.named_parameters()} - frozen
    assert moved(before, model) - unused == learning - unused


def test_statistics_of_frozen_batchnorm_stay_and_those_that_learn_move(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = batchnorm_resnet()
    run = trainer(model, "timm-resnet", tmp_path, FreezeCallback(model, 3))
    before = copy(model)
    run.train()
    changed = {name for name in moved(before, model) if "running" in name}
    every = {name for name in before if "running" in name}
    assert changed == {name for name in every if ".layer3." in name or ".layer4." in name}


def test_without_the_callback_statistics_of_what_requires_no_gradient_move(tmp_path: Path) -> None:
    model = batchnorm_resnet()
    model.timm_model.bn1.requires_grad_(False)
    before = copy(model)
    trainer(model, "timm-resnet", tmp_path).train()
    assert "timm_model.bn1.running_mean" in moved(before, model)


def test_dropout_of_the_frozen_part_is_off_during_training_only(tmp_path: Path) -> None:
    model = bert(hidden_dropout_prob=0.5)
    seen: list[tuple[bool, bool]] = []
    body, head = model.bert.embeddings.dropout, model.dropout
    model.register_forward_pre_hook(lambda *_: seen.append((body.training, head.training)))
    callback = FreezeCallback(model, "backbone")
    trainer(model, "bert", tmp_path, callback).train()
    assert seen == [(False, True)] * 3
    model.train()  # with the callback still there: its deletion would also let the modules go
    assert body.training


def test_optimizer_holds_no_frozen_parameter(tmp_path: Path) -> None:
    model = bert()
    run = trainer(model, "bert", tmp_path, FreezeCallback(model, "backbone"))
    run.train()
    assert run.optimizer is not None
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(model.classifier.weight), id(model.classifier.bias)}


def test_another_callback_sets_the_freeze_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    trainer(model, "bert", tmp_path, FreezeCallback(model, "backbone")).train()
    before = copy(model)
    trainer(model, "bert", tmp_path, FreezeCallback(model, 1)).train()
    assert "bert.encoder.layer.0.output.dense.weight" in moved(before, model)
    assert "bert.embeddings.word_embeddings.weight" not in moved(before, model)


def test_wrong_freeze_is_found_before_training() -> None:
    with pytest.raises(InputError, match=r"'bert\.encodr' matches no parameter"):
        FreezeCallback(bert(), ["bert.encodr"])


def test_module_of_two_parents_is_held_once() -> None:
    shared = nn.Linear(2, 2).requires_grad_(False)
    parents = [nn.Sequential(shared, nn.Linear(2, 2)) for _ in range(2)]
    model = nn.Sequential(*parents)
    with kept_in_eval(model):
        model.train()
        assert not shared.training
    model.train()
    assert shared.training
