"""FreezeCallback in a stock Trainer: what it freezes does not move, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfft.errors import InputError
from hfft.hooks import FreezeCallback
from hfft.hooks import freeze as freeze_module
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups

from ..families import FAMILIES, batchnorm_resnet, bert
from ..features.training import contrastive

ROOT = Path(__file__).parents[2]
TWO_CPU = ROOT / "configs" / "accelerate" / "two_cpu.yaml"


def examples(family: str) -> list[dict[str, torch.Tensor]]:
    inputs = FAMILIES[family].example()
    found = [{name: value[number] for name, value in inputs.items()} for number in range(2)]
    if family != "clip":  # whose pairs are its labels
        for number, example in enumerate(found):
            example["labels"] = torch.tensor(number)
    return found


def trainer(model: Any, family: str, folder: Path, *callbacks: TrainerCallback) -> Trainer:
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
        remove_unused_columns=False,
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


def test_a_tower_may_be_frozen_otherwise_than_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = contrastive()
    callback = FreezeCallback(model, 1, {"vision": "backbone"})
    run = trainer(model, "clip", tmp_path, callback)
    before = copy(model)
    run.train()
    frozen = find_layer_groups(model).frozen(1, {"vision": "backbone"})
    assert moved(before, model) == set(before) - frozen


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


# What would go wrong in silence is refused before the first step


def refusal(run: Trainer) -> str:
    before = copy(run.model)
    with pytest.raises(InputError) as caught:
        run.train()
    assert moved(before, run.model) == set()
    return str(caught.value)


def test_change_of_requires_grad_after_the_callback_is_refused(tmp_path: Path) -> None:
    model = bert()
    run = trainer(model, "bert", tmp_path, FreezeCallback(model, 2))
    model.bert.embeddings.requires_grad_(True)
    model.classifier.bias.requires_grad_(False)
    said = refusal(run)
    assert "bert.embeddings.LayerNorm.bias and 4 more came to learn" in said
    assert "classifier.bias ceased to learn" in said


def test_two_callbacks_in_one_trainer_are_refused(tmp_path: Path) -> None:
    model = bert()
    callbacks = FreezeCallback(model, "backbone"), FreezeCallback(model, 1)
    assert "came to learn after the callback" in refusal(
        trainer(model, "bert", tmp_path, *callbacks)
    )


def test_optimizer_made_before_thawing_is_refused(tmp_path: Path) -> None:
    model = bert()
    first = FreezeCallback(model, "backbone")
    run = trainer(model, "bert", tmp_path, first)
    run.train()
    run.remove_callback(first)
    run.add_callback(FreezeCallback(model, 3))
    said = refusal(run)
    assert "the optimizer does not hold bert.encoder.layer.2." in said
    assert "a new Trainer" in said


def test_optimizer_of_ones_own_that_holds_what_is_frozen_too_is_fine(tmp_path: Path) -> None:
    model = bert()
    run = trainer(model, "bert", tmp_path, FreezeCallback(model, "backbone"))
    run.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    before = copy(model)
    run.train()
    assert moved(before, model) == {"classifier.weight", "classifier.bias"}


def test_frozen_whole_model_is_refused(tmp_path: Path) -> None:
    model = bert()
    said = refusal(trainer(model, "bert", tmp_path, FreezeCallback(model, ["*"])))
    assert said == "freeze: nothing learns: all is frozen, and the model has no head"


def test_another_model_than_the_trainers_is_refused(tmp_path: Path) -> None:
    run = trainer(bert(), "bert", tmp_path, FreezeCallback(bert(), "backbone"))
    assert "another model than the callback was given" in refusal(run)


@pytest.mark.parametrize("family", ["vit", "bert"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_all_that_learns_moves_under_gradient_checkpointing_or_it_is_refused(
    family: str, reentrant: bool, tmp_path: Path
) -> None:
    """transformers makes the input of text models require a gradient, not of image models."""
    torch.manual_seed(0)
    model = FAMILIES[family].make()
    run = trainer(model, family, tmp_path, FreezeCallback(model, 2))
    run.args.activation_checkpointing = True
    run.args.activation_checkpointing_kwargs = {"use_reentrant": reentrant}
    if family == "vit" and reentrant:
        said = refusal(run)
        assert "learn nothing; set gradient_checkpointing_kwargs: {use_reentrant: false}" in said
        return
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = copy(model)
    run.train()
    assert moved(before, model) == learning


def test_frozen_layers_have_no_graph_under_gradient_checkpointing(tmp_path: Path) -> None:
    """Not even the one that transformers starts at the embeddings for reentrant checkpointing."""
    model = bert()
    run = trainer(model, "bert", tmp_path, FreezeCallback(model, 3))
    run.args.activation_checkpointing = True
    graphs: list[bool] = []
    layer = model.bert.encoder.layer[1]
    layer.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad))
    run.train()
    assert graphs == [False] * 3


def test_mixed_flat_parameters_of_fsdp1_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    callback = FreezeCallback(model, "backbone")
    whole = FreezeCallback(bert(), "none")
    for version, original, refused in ((1, False, True), (1, True, False), (2, False, False)):
        plugin = SimpleNamespace(fsdp_version=version, use_orig_params=original)
        state = SimpleNamespace(fsdp_plugin=plugin, _shared_state={"one": 1})
        monkeypatch.setattr(freeze_module, "accelerator_state", lambda state=state: state)
        whole.on_init_end(*[None] * 3)  # type: ignore[arg-type]
        if refused:
            with pytest.raises(InputError, match="fsdp_use_orig_params: true"):
                callback.on_init_end(*[None] * 3)  # type: ignore[arg-type]
        else:
            callback.on_init_end(*[None] * 3)  # type: ignore[arg-type]


def test_training_goes_on_after_a_run_that_broke_off(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        broken = False

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not self.broken:
                self.broken = True
                raise KeyboardInterrupt

    model = bert(hidden_dropout_prob=0.5)
    run = trainer(model, "bert", tmp_path, FreezeCallback(model, "backbone"), Breaks())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    model.train()
    assert all(module.training for module in model.modules())


def test_adapters_that_are_frozen_below_leave_the_base_model_frozen(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    run = trainer(model, "bert", tmp_path, FreezeCallback(model, 3))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    last = "base_model.model.bert.encoder.layer.2.attention.self.query"
    head = "base_model.model.classifier.modules_to_save.default"
    assert learning == {
        f"{last}.lora_A.default.weight",
        f"{last}.lora_B.default.weight",
        f"{head}.weight",
        f"{head}.bias",
    }
    before = copy(model)
    run.train()
    assert moved(before, model) - {f"{last}.lora_A.default.weight"} == learning - {
        f"{last}.lora_A.default.weight"
    }


def test_adapters_that_are_added_after_the_callback_are_refused(tmp_path: Path) -> None:
    model = bert()
    callback = FreezeCallback(model, 2)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert "through another callback, PEFT" in refusal(trainer(adapted, "bert", tmp_path, callback))


@pytest.mark.slow
def test_replicas_are_bit_identical_and_what_would_drift_is_refused(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(TWO_CPU)]
    script = [str(ROOT / "tests" / "freeze_launch.py"), str(tmp_path)]
    own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launch, "--main_process_port", "0", *script],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank.pop("world") for rank in ranks] == [2, 2]
    assert ranks[0]["a trainer each"] == ranks[1]["a trainer each"]
    assert ranks[0]["towers"] == ranks[1]["towers"]
    assert ranks[0]["unguarded"] != ranks[1]["unguarded"]  # what the stock Trainer does
    for rank in ranks:
        assert "the optimizer does not hold" in rank["old optimizer"]
        assert "the replicas would drift apart" in rank["old wrapper"]
