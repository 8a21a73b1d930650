"""Batch spectral shrinkage, in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfft.errors import InputError
from hfft.hooks.penalty import PenaltyCallback
from hfft.layers import find_layer_groups
from hfft.penalties.penalty import Part, Setting
from hfft.penalties.shrinkage import BSS

from ..families import FAMILIES
from .training import (
    Gradients,
    assert_same,
    batch,
    gradients_of,
    make,
    recomputing,
    train,
    untouched,
)

WITHOUT_HEAD = ("t5", "bart", "gpt2-words")
HEADS = {"bert": "classifier", "resnet": "timm_model.fc"}


def features_of(
    model: Any, family: str, inputs: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and what the head is given."""
    seen: list[Tensor] = []
    head = model.get_submodule(HEADS[family])
    hook = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    loss = model(**(inputs or batch(family))).loss
    hook.remove()
    return loss, seen[0]


def squares(features: Tensor, k: int) -> Tensor:
    return torch.linalg.svdvals(features)[-k:].square().sum()


@pytest.mark.parametrize("family", ["bert", "resnet"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradient_in_training_is_that_of_the_loss_plus_strength_times_r(
    family: str, checkpointing: bool | None, tmp_path: Path
) -> None:
    model, other = make(family), make(family).train()
    loss, features = features_of(other, family)
    r = squares(features, 2)
    expected = gradients_of(loss + 0.3 * r, other)
    changes = {} if checkpointing is None else recomputing(checkpointing)
    seen = Gradients()
    log = train(model, family, tmp_path, PenaltyCallback(model, "bss", 0.3, k=2), seen, **changes)
    assert_same(seen.steps[0], expected)
    assert log[0]["bss"] == pytest.approx(r.item(), rel=1e-3)
    assert log[0]["bss_weighted"] == pytest.approx(0.3 * r.item(), rel=1e-3)
    assert checkpointing is not None or untouched(model)  # transformers leaves a hook then


@pytest.mark.parametrize("micro", [4, 2])
def test_with_accumulation_r_is_the_mean_over_micro_batches(micro: int, tmp_path: Path) -> None:
    model, seen = make("bert"), Gradients()
    inputs: list[dict[str, Tensor]] = []
    keys = ("input_ids", "labels")
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: inputs.append({key: kwargs[key] for key in keys}),
        with_kwargs=True,
    )
    log = train(
        model,
        "bert",
        tmp_path,
        PenaltyCallback(model, "bss", 0.3),
        seen,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
    )
    other = make("bert")
    assert len(inputs) == 8 // micro
    parts = [features_of(other, "bert", one) for one in inputs]
    mean_r = torch.stack([squares(features, 1) for _, features in parts]).mean()
    mean_loss = torch.stack([loss for loss, _ in parts]).mean()
    assert_same(seen.steps[0], gradients_of(mean_loss + 0.3 * mean_r, other))
    assert log[0]["bss"] == pytest.approx(mean_r.item(), rel=1e-3)
    # documented, and no error: the whole batch is another matrix
    whole = squares(features_of(other, "bert")[1], 1)
    assert mean_r.item() != pytest.approx(whole.item(), rel=1e-2)


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_smallest_singular_values_go_down_with_the_strength(family: str, tmp_path: Path) -> None:
    ends = []
    for strength in (0.0, 1.0, 10.0):
        model = make(family)
        log = train(
            model,
            family,
            tmp_path,
            PenaltyCallback(model, "bss", strength, k=4),
            max_steps=6,
            optim="sgd",
        )
        ends.append(log[-1]["bss"])
    assert ends[0] > ends[1] > ends[2] > 0


def test_strength_0_trains_as_without_a_penalty(tmp_path: Path) -> None:
    ends = []
    for penalised in (False, True):
        model = make("bert")
        callbacks = [PenaltyCallback(model, "bss", 0.0)] if penalised else []
        train(model, "bert", tmp_path, *callbacks, max_steps=3)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def attached(model: Any, k: int = 1) -> Any:
    penalty = BSS(BSS.Options(k=k))
    penalty.prepare(model, {}, (), ())
    return penalty.attach(Setting(model, torch.optim.SGD(model.parameters(), 0.1), [Part(1.0)]))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_HEAD])
def test_heads_of_many_families_are_found_and_penalised_once(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family].make()
    work = attached(model)
    ran: list[nn.Module] = []
    work.inject = lambda features, *args: ran.append(features) or features
    output = model(**FAMILIES[family].example())
    assert next(iter(output.values())).isfinite().all()
    assert len(ran) == len(find_layer_groups(model).towers)
    assert ran[0].shape[0] == 2


def test_features_of_sequences_are_means_over_places() -> None:
    model = FAMILIES["llama-words"].make()
    work = attached(model)
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    model(**FAMILIES["llama-words"].example()).logits.sum().backward()
    assert work.value()[0] == pytest.approx(float(squares(seen[0].mean(1), 1)), rel=1e-4)


def test_evaluation_is_left_alone() -> None:
    model = make("bert").eval()
    expected = model(**batch("bert")).logits
    work = attached(model)
    with torch.no_grad():
        assert torch.equal(model(**batch("bert")).logits, expected)
    assert work.value() == (0, 0)


@pytest.mark.parametrize("family", WITHOUT_HEAD)
def test_a_model_without_a_head_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="no module of its own for the head"):
        PenaltyCallback(FAMILIES[family].make(), "bss", 1.0)


def test_a_frozen_backbone_is_refused() -> None:
    model = make("bert")
    model.bert.requires_grad_(False)
    with pytest.raises(InputError, match="nothing that bss covers learns"):
        PenaltyCallback(model, "bss", 1.0)


def test_data_parallel_is_refused() -> None:
    model = make("bert")
    attached(model)
    model.classifier._is_replica = True
    with pytest.raises(InputError, match="torchrun"):
        model(**batch("bert"))


def test_patterns_and_the_decoupled_form_are_refused() -> None:
    with pytest.raises(InputError, match="one number"):
        PenaltyCallback(make("bert"), "bss", {"bert.*": 1.0})
    with pytest.raises(InputError, match="no decoupled form"):
        PenaltyCallback(make("bert"), "bss", 1.0, mode="decoupled")


def test_each_of_two_towers_has_a_head_of_its_own() -> None:
    model: Any = FAMILIES["clip"].make().train()
    inputs = FAMILIES["clip"].example()
    heads = [model.visual_projection, model.text_projection]
    seen: list[Tensor] = []
    keep = [head.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for head in heads]
    loss = model(**inputs, return_loss=True).loss
    r = sum((squares(features, 2) for features in seen), torch.zeros(()))
    expected = gradients_of(loss + 0.3 * r, model)
    model.zero_grad()
    for hook in keep:
        hook.remove()
    penalty = BSS(BSS.Options(k=2))
    penalty.check(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = penalty.attach(Setting(model, optimizer, [Part(0.3)]))
    model(**inputs, return_loss=True).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, expected)
    assert attached.value() == pytest.approx((r.item(), 0.3 * r.item()), rel=1e-3)
    attached.remove()
