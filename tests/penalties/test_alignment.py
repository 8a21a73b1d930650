"""DELTA, in a Trainer and outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hfft.errors import InputError
from hfft.hooks.penalty import PenaltyCallback
from hfft.penalties.alignment import DELTA, chosen_layers, frozen_copy
from hfft.penalties.penalty import Part, Setting

from ..families import FAMILIES
from .training import (
    Gradients,
    assert_same,
    batch,
    elsewhere,
    gradients_of,
    make,
    recomputing,
    train,
    untouched,
)

LAYERS = {
    "bert": ["bert.embeddings", *(f"bert.encoder.layer.{n}" for n in range(3))],
    "resnet": [f"timm_model.layer{n}.0" for n in range(1, 5)],
}


def maps_of(model: Any, family: str) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the maps of the layers."""
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for path in LAYERS[family]
    ]
    loss = model(**batch(family)).loss
    for hook in hooks:
        hook.remove()
    return loss, seen


def with_weights(model: Any, source: dict[str, Tensor]) -> Any:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(source[name])
    return model.eval()


def distance(family: str, maps: list[Tensor], source: dict[str, Tensor]) -> Tensor:
    """R with even weights."""
    with torch.no_grad():
        _, targets = maps_of(with_weights(make(family), source), family)
    total = torch.zeros(())
    for one, target in zip(maps, targets, strict=True):
        axis = 1 if one.ndim == 4 else -1
        places = one.numel() // (len(one) * one.shape[axis])
        total = total + 0.5 * (one - target).square().sum() / (places * len(one))
    return total


@pytest.mark.parametrize("family", ["bert", "resnet"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradient_in_training_is_that_of_the_loss_plus_strength_times_r(
    family: str, checkpointing: bool | None, tmp_path: Path
) -> None:
    model, other = make(family), make(family).train()
    source = elsewhere(model)
    loss, maps = maps_of(other, family)
    r = distance(family, maps, source)
    expected = gradients_of(loss + 0.3 * r, other)
    seen = Gradients()
    log = train(
        model,
        family,
        tmp_path,
        PenaltyCallback(model, "delta", 0.3, source=source),
        seen,
        **({} if checkpointing is None else recomputing(checkpointing)),
    )
    assert_same(seen.steps[0], expected)
    assert log[0]["delta"] == pytest.approx(r.item(), rel=1e-4)
    assert log[0]["delta_weighted"] == pytest.approx(0.3 * r.item(), rel=1e-4)
    assert log[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert checkpointing is not None or untouched(model)


def test_accumulation_changes_neither_gradient_nor_value(tmp_path: Path) -> None:
    found, values = [], []
    for micro in (8, 2):
        model, seen = make("bert"), Gradients()
        callback = PenaltyCallback(model, "delta", 0.3, source=elsewhere(model))
        changes = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": 8 // micro,
        }
        log = train(model, "bert", tmp_path, callback, seen, **changes)
        found += seen.steps
        values.append(log[0]["delta"])
    assert len(found) == 2
    assert_same(found[1], found[0], tolerance=1e-5)
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_maps_stay_nearer_the_source_with_the_strength(family: str, tmp_path: Path) -> None:
    ends = []
    for strength in (0.0, 0.003, 0.1):
        model = make(family)
        callback = PenaltyCallback(model, "delta", strength)
        ends.append(train(model, family, tmp_path, callback, max_steps=12)[-1]["delta"])
    assert ends[0] > ends[1] > ends[2] > 0


def test_training_is_plain_with_strength_0_and_draws_the_same_random_numbers(
    tmp_path: Path,
) -> None:
    ends = []
    for penalised in (False, True):
        torch.manual_seed(0)
        model = FAMILIES["vit"].make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        callbacks = [PenaltyCallback(model, "delta", 0.0)] if penalised else []
        train(model, "images", tmp_path, *callbacks, max_steps=3)
        ends.append(model.state_dict())
    assert list(ends[0]) == list(ends[1])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def attached(model: Any, source: Any = None, strength: float = 1.0, **options: Any) -> Any:
    penalty = DELTA(DELTA.Options(**options))
    penalty.prepare(model, source or {}, (), options.pop("batches", ()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return penalty.attach(Setting(model, optimizer, [Part(strength)]))


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ("deberta", "segformer-pixels")]
)
def test_default_layers_of_every_family_run_and_cost_nothing_at_the_source(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family].make().eval()
    work = attached(model)
    outputs = model(**FAMILIES[family].example())
    next(iter(outputs.values())).sum().backward()
    assert work.value() == pytest.approx((0, 0), abs=1e-9)
    work.remove()
    assert untouched(model)
    assert chosen_layers(model, None)


def test_source_is_no_part_of_the_model() -> None:
    model = make("bert")
    before, modules = list(model.state_dict()), len(list(model.modules()))
    attached(model)
    assert list(model.state_dict()) == before
    assert len(list(model.modules())) == modules


def test_evaluation_does_not_run_the_source() -> None:
    model = make("bert").eval()
    work = attached(model, elsewhere(model))
    work._source.forward = None
    with torch.no_grad():
        model(**batch("bert"))
    assert work.value() == (0, 0)


def test_nothing_is_done_where_all_below_is_frozen() -> None:
    model = make("bert")
    work = attached(model, elsewhere(model))
    work._source.forward = None
    model.bert.requires_grad_(False)
    model(**batch("bert")).loss.backward()
    assert work.value() == (0, 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_inside_a_checkpoint_find_the_sources_maps(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(3, 4), nn.Linear(4, 2)
            self.recompute = False

        def forward(self, inputs: Tensor) -> Tensor:
            if self.recompute:
                hidden = checkpoint(self._hidden, inputs, use_reentrant=reentrant)
            else:
                hidden = self._hidden(inputs)
            return self.above(hidden.tanh())

        def _hidden(self, inputs: Tensor) -> Tensor:
            return self.below(inputs).sin()

    torch.manual_seed(0)
    model = Net().double()
    source = frozen_copy(model, elsewhere(model))
    inputs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    penalty = DELTA(DELTA.Options())
    penalty._layers, penalty._source = ("below",), source
    work = penalty.attach(Setting(model, torch.optim.SGD(model.parameters(), 0.1), [Part(0.7)]))
    found, values = [], []
    for model.recompute in (False, True):
        model.zero_grad()
        model(inputs).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        values.append(work.value())
    work.remove()
    model.recompute = False
    r = 0.5 * (model.below(inputs) - source.below(inputs)).square().sum() / 5
    expected = torch.autograd.grad(model(inputs).sum() + 0.7 * r, list(model.parameters()))
    for gradients in found:
        torch.testing.assert_close(gradients, list(expected))
    assert values[0] == values[1] == pytest.approx((r.item(), 0.7 * r.item()))


def test_two_forwards_before_the_backward_each_have_their_own_maps() -> None:
    model = make("bert").eval()
    source = elsewhere(model)
    inputs = batch("bert")
    halves = [
        {name: value[start : start + 4] for name, value in inputs.items()} for start in (0, 4)
    ]
    work = attached(model, source)
    sum(model(**half).loss for half in halves).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for half in halves:
        model(**half).loss.backward()
    apart = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(together, apart, tolerance=1e-6)
    assert work.value()[0] > 0


def test_source_computes_under_the_models_autocast() -> None:
    model = make("bert").eval()
    work = attached(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch("bert")).loss
    loss.backward()
    assert work.value()[0] == 0


def test_channels_of_maps_with_channels_last_are_the_last_axis() -> None:
    model = FAMILIES["timm-swin"].make().eval()
    source = elsewhere(model)
    work = attached(model, source, layers=["layers.1"])
    inputs = FAMILIES["timm-swin"].example()
    seen: list[Tensor] = []
    path = chosen_layers(model, ["layers.1"])[0]
    for one in (model, work._source):
        one.get_submodule(path).register_forward_hook(lambda _m, _a, o: seen.append(o.detach()))
    model(**inputs).logits.sum().backward()
    ours, theirs = seen
    places = ours.shape[1] * ours.shape[2]
    expected = 0.5 * (ours - theirs).square().sum() / (places * 2)
    assert work.value()[0] == pytest.approx(expected.item(), rel=1e-5)


def test_layers_are_named_by_group_or_by_module() -> None:
    model = make("resnet")
    assert chosen_layers(model, ["layer[34]"]) == ("timm_model.layer3.0", "timm_model.layer4.0")
    assert chosen_layers(model, ["*layer4.0.bn?"]) == (
        "timm_model.layer4.0.bn1",
        "timm_model.layer4.0.bn2",
    )
    model.timm_model.layer1.requires_grad_(False)
    assert list(chosen_layers(model, None)) == LAYERS["resnet"][1:]


def test_unknown_layers_are_named_together() -> None:
    with pytest.raises(InputError) as caught:
        PenaltyCallback(make("resnet"), "delta", 1.0, layers=["layer9", "nothing"])
    assert len(caught.value.messages) == 2
    assert "did you mean" in str(caught.value)


def test_modules_that_do_not_run_are_named_at_the_first_step(tmp_path: Path) -> None:
    model = make("bert")
    model.unused = nn.Linear(2, 2)
    callback = PenaltyCallback(model, "delta", 1.0, layers=["bert.encoder.layer.0", "unused"])
    with pytest.raises(InputError, match="never or more than once: unused"):
        train(model, "bert", tmp_path, callback)


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_attention_is_measured_at_the_source_and_weighs_the_channels(
    family: str, tmp_path: Path
) -> None:
    model = make(family)
    whole = batch(family)
    callback = PenaltyCallback(model, "delta", 1.0, attention="loss", batches=[whole], examples=6)
    weights = callback.penalty._weights  # type: ignore[attr-defined]
    assert list(weights) == LAYERS[family]
    for value in weights.values():
        assert value.sum().item() == pytest.approx(1)
        assert value.std() > 0
    assert untouched(model)
    assert not any(p.grad is not None for p in model.parameters())
    assert train(model, family, tmp_path, callback, max_steps=3)[-1]["delta"] > 0


def test_attention_without_examples_is_refused() -> None:
    with pytest.raises(InputError, match="give batches"):
        PenaltyCallback(make("bert"), "delta", 1.0, attention="loss")
    inputs = {"input_ids": batch("bert")["input_ids"]}
    with pytest.raises(InputError, match="give the batches labels"):
        PenaltyCallback(make("bert"), "delta", 1.0, attention="loss", batches=[inputs])
