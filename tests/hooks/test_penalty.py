"""PenaltyCallback on models whose weights LoRA adapts, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hfft.adapters import adapted_weights, inject
from hfft.errors import InputError
from hfft.hooks import PenaltyCallback

from ..families import FAMILIES, batchnorm_resnet, bert
from ..penalties.test_weights import (
    Plain,
    plain_cosine,
    plain_euclidean,
    plain_l2_sp,
    plain_orthogonal,
)

KINDS: dict[str, tuple[dict[str, Any], Plain]] = {
    "l2_sp": ({}, plain_l2_sp),
    "euclidean": ({}, plain_euclidean),
    "cosine": ({}, plain_cosine),
    "orthogonal": ({"interval": 1}, plain_orthogonal),
}


def still_bert() -> Any:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    model.accepts_loss_kwargs = False
    return model.double()


def examples(count: int = 12) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, 30, (6,), generator=random), "labels": n % 3}
        for n in range(count)
    ]


def train(model: Any, folder: Path, *callbacks: Any, **arguments: Any) -> Trainer:
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            **{
                "per_device_train_batch_size": 4,
                "max_steps": 3,
                "optim": "sgd",
                "learning_rate": 0.2,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "report_to": "none",
                "logging_steps": 1,
                "use_cpu": True,
                "save_strategy": "no",
                "disable_tqdm": True,
                **arguments,
            },
        ),
        train_dataset=examples(),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


class Summed(Trainer):
    """The same objective with R in the loss, by autograd."""

    def __init__(self, plain: Plain, strength: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plain, self.strength = plain, strength

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        found = adapted_weights(model)
        # in the orientation of (out, in), as LoRA's own product
        theta = [one.weight + one.product() for one in found]
        source = [one.weight for one in found]
        turned = [one.transposed for one in found]
        theta = [t.T if back else t for t, back in zip(theta, turned, strict=True)]
        source = [s.T if back else s for s, back in zip(source, turned, strict=True)]
        return loss + self.strength * self.plain(theta, source)


def lora(model: Any, head: str, **options: Any) -> Any:
    names = [name for name, _ in model.named_parameters() if name.startswith(head)]
    with torch.random.fork_rng():
        inject(model, {"r": 2, "lora_alpha": 4, **options}, names, seed=0)
    return model


@pytest.mark.parametrize(("options", "plain"), KINDS.values(), ids=KINDS)
def test_with_lora_it_is_the_penalty_on_the_dense_weight(
    options: dict[str, Any], plain: Plain, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.id
    torch.manual_seed(0)
    start = still_bert().state_dict()
    ends = []
    for by_callback in (True, False):
        model = still_bert()
        model.load_state_dict(start)
        lora(model, "classifier", target_modules=["query", "dense", "word_embeddings"])
        with torch.no_grad():  # away from B = 0, where R has no gradient
            for one in adapted_weights(model):
                for matrix in (one.a, one.b):
                    seeded = torch.Generator().manual_seed(matrix.numel())
                    matrix.copy_(0.3 * torch.randn(matrix.shape, generator=seeded))
        strength = 0.05 if kind != "orthogonal" else 0.001
        if by_callback:
            callback = PenaltyCallback(model, kind, strength, **options)
            trainer = train(model, tmp_path, callback)
            logged = [e for e in trainer.state.log_history if "loss" in e]
            assert all(e[f"{kind}_weighted"] == pytest.approx(strength * e[kind]) for e in logged)
            assert not callback._source  # the frozen weights are the source: nothing is copied
        else:
            arguments = trainer.args
            Summed(plain, strength, model, arguments, train_dataset=examples()).train()  # type: ignore[arg-type]
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert any("lora_A" in name for name in ends[0])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-6)


def test_convolutions_and_transposed_layers_are_covered_too(tmp_path: Path) -> None:
    resnet = batchnorm_resnet()
    lora(resnet, "timm_model.fc", target_modules=["layer1.0.conv1"])
    [name] = PenaltyCallback(resnet, "l2_sp", 0.1).coverage.to_source
    assert name == "timm_model.layer1.0.conv1.base_layer.weight"
    words = FAMILIES["gpt2-words"].make()
    lora(words, "score")
    callback = PenaltyCallback(words, "cosine", 0.1)
    assert all("c_attn.base_layer" in name for name in callback.coverage.to_source)


def test_a_peft_model_is_covered_as_well(tmp_path: Path) -> None:
    model = get_peft_model(
        still_bert(),
        LoraConfig(
            r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"
        ),
    )
    callback = PenaltyCallback(model, "l2_sp", {"*layer.0": 0.5, "*layer.1*": 0.2})
    assert sorted(callback.coverage.to_source.values()) == [0.2, 0.5]
    model.accepts_loss_kwargs = False
    logged = train(model, tmp_path, callback, max_steps=2).state.log_history
    assert logged[0]["l2_sp"] >= 0


def test_deepspeed_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = still_bert()
    callback = PenaltyCallback(model, "l2_sp", 0.1)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    Trainer(model, arguments)  # makes the state that is changed below
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(InputError, match="DeepSpeed keeps its own copies"):
        callback.on_init_end(arguments, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("l2sp", 0.1), "there is no penalty 'l2sp'; did you mean 'l2_sp'"),
        (("l2_sp", -0.1), "strength"),
        (("l2_sp", float("nan")), "strength"),
        (("l2_sp", {"nothing*": 0.1}), "the pattern 'nothing\\*' matches no parameter"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PenaltyCallback(still_bert(), *arguments)


def test_what_learns_nothing_or_has_another_source_is_refused() -> None:
    frozen = still_bert().requires_grad_(False)
    with pytest.raises(InputError, match="nothing that l2_sp covers learns"):
        PenaltyCallback(frozen, "l2_sp", 0.1)
    with pytest.raises(InputError, match="source: has no"):
        PenaltyCallback(still_bert(), "l2_sp", 0.1, source={"x": torch.zeros(1)})
    with pytest.raises(InputError, match="is no transformers model"):
        PenaltyCallback(nn.Linear(2, 2), "l2_sp", 0.1, source="somewhere")


def test_a_source_folder_is_shared_with_its_file_and_equals_what_was_saved(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    state = torch.random.get_rng_state()
    callback = PenaltyCallback(model, "l2_sp", 0.1, source=tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(callback._source[name], parameter - 0.1)


def test_a_second_training_starts_over_with_the_same_source(tmp_path: Path) -> None:
    model = still_bert()
    callback = PenaltyCallback(model, "l2_sp", 0.1)
    trainer = train(model, tmp_path, callback)
    trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_grad_norm": 1e-3},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"gradient_accumulation_steps": 16, "per_device_train_batch_size": 1},
        {"optim": "adamw_torch_fused", "mode": "decoupled"},
    ],
    ids=lambda arguments: ", ".join(arguments) or "plain",
)
def test_the_penalty_s_share_of_a_step_is_the_same_whatever_the_loss_goes_through(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    options = {"mode": mode} if (mode := arguments.pop("mode", None)) else {}
    torch.manual_seed(0)
    start = {name: p.detach().clone() for name, p in still_bert().float().named_parameters()}
    source = {name: 0.9 * p for name, p in start.items()}
    ends = []
    for strength in (0.0, 0.5):
        model = still_bert().float()
        model.load_state_dict(start, strict=False)
        callback = PenaltyCallback(model, "l2_sp", strength, source=source, **options)
        train(model, tmp_path, callback, max_steps=1, **arguments)
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    for name, before in start.items():
        share = ends[1][name] - ends[0][name]
        expected = -0.2 * 0.5 * (before - source[name])
        torch.testing.assert_close(share, expected, rtol=0, atol=1e-6)


def test_a_source_that_is_the_models_own_memory_is_copied(tmp_path: Path) -> None:
    model = still_bert()
    callback = PenaltyCallback(model, "l2_sp", 0.1, source=model.state_dict())
    logged = [e for e in train(model, tmp_path, callback).state.log_history if "loss" in e]
    assert all(e["l2_sp"] > 0 for e in logged)


def test_two_of_a_kind_are_logged_apart(tmp_path: Path) -> None:
    model = still_bert()
    callbacks = [PenaltyCallback(model, "l2_sp", {f"*layer.{n}": 0.1}) for n in (0, 1)]
    last = train(model, tmp_path, *callbacks, max_steps=1).state.log_history[0]
    assert last["l2_sp"] != last["l2_sp_2"]


class Broken(Exception):
    """Ends a training in its midst."""


class Breaks(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 1:
            raise Broken
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("kind", ["bss", "delta", "l2_sp"])
def test_a_training_that_broke_off_leaves_nothing_to_the_next(kind: str, tmp_path: Path) -> None:
    ends = []
    for breaks in (False, True):
        torch.manual_seed(0)
        model = still_bert()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        if breaks:
            callback = PenaltyCallback(model, kind, 0.5)
            arguments = train(still_bert(), tmp_path, max_steps=2).args
            with pytest.raises(Broken):
                Breaks(
                    model,
                    arguments,
                    train_dataset=examples(),  # type: ignore[arg-type]
                    callbacks=[callback],
                ).train()
            model.load_state_dict(start, strict=False)
        source = {name: 0.9 * p for name, p in start.items()}
        train(model, tmp_path, PenaltyCallback(model, kind, 0.1, source=source))
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_hooks_go_with_the_callback_of_a_training_that_broke_off(tmp_path: Path) -> None:
    import gc

    model = still_bert()
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    arguments = train(still_bert(), tmp_path, max_steps=2).args
    callback = PenaltyCallback(model, "delta", 0.5)
    with pytest.raises(Broken):
        Breaks(model, arguments, train_dataset=examples(), callbacks=[callback]).train()  # type: ignore[arg-type]
    del callback
    gc.collect()
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == before


def test_what_peft_saves_whole_keeps_its_source() -> None:
    model = still_bert()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # as transformers marks what it has loaded
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    )
    covered = PenaltyCallback(wrapped, "l2_sp", 0.1).coverage.to_source
    assert any(name.endswith("classifier.modules_to_save.default.weight") for name in covered)


@pytest.mark.parametrize("kind", ["l2_sp", "euclidean", "cosine", "orthogonal"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_lora_in_float32_beside_a_half_precision_base(kind: str, mode: str, tmp_path: Path) -> None:
    model = still_bert().to(torch.bfloat16)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    wrapped.accepts_loss_kwargs = False
    assert adapted_weights(wrapped)[0].a.dtype == torch.float32
    callback = PenaltyCallback(wrapped, kind, 0.1, mode=mode)
    logged = train(wrapped, tmp_path, callback, max_steps=2, bf16=True).state.log_history
    assert torch.isfinite(torch.tensor(logged[0][kind]))


def test_biases_that_learn_beside_lora_find_their_source(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    lora(model, "classifier", bias="lora_only")
    callback = PenaltyCallback(model, "l2_sp", 0.1, source=tmp_path)
    assert any(name.endswith("base_layer.bias") for name in callback._source)


def test_activations_need_no_copy_of_the_weights() -> None:
    assert not PenaltyCallback(still_bert(), "bss", 0.1)._source
    assert not PenaltyCallback(still_bert(), "delta", 0.1)._source


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(InputError, match="fsdp_cpu_ram_efficient_loading"):
        PenaltyCallback(still_bert().to("meta"), "l2_sp", 0.1)
