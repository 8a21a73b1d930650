"""DELTA's channel attention: the estimate against switching channels off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hfft.errors import InputError
from hfft.penalties.attention import batch_size, first_tensor, loss_increase, part, with_first


class Net(nn.Module):
    """A small CNN that overwrites what its layers give out."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 12, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, classes)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        maps = self.act(self.two(self.act(self.one(inputs))))
        logits = self.head(maps.mean((2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def images(count: int = 96) -> dict[str, Tensor]:
    """A stripe that lies, stands or leans."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    inputs = 0.3 * torch.randn(count, 1, 8, 8, generator=random)
    for n, label in enumerate(labels):
        at = int(torch.randint(1, 7, (), generator=random))
        if label == 0:
            inputs[n, 0, at] += 1
        elif label == 1:
            inputs[n, 0, :, at] += 1
        else:
            inputs[n, 0] += torch.eye(8)
    return {"inputs": inputs, "labels": labels}


def trained(seed: int = 0) -> Net:
    """As DELTA has it: the body learned one task, and then the head alone another."""
    torch.manual_seed(seed)
    model, whole = Net(), images()
    _learn(model, whole, list(model.parameters()), 30)
    model.head = nn.Linear(12, 3)
    _learn(model, target(), list(model.head.parameters()), 200)
    return model.eval().requires_grad_(False)


def target() -> dict[str, Tensor]:
    whole = images()
    return {**whole, "labels": whole["labels"].clamp(max=1)}


def _learn(model: Net, whole: dict[str, Tensor], parameters: list[Any], steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**whole).loss.backward()
        optimizer.step()


@torch.no_grad()
def exact(model: Net, layer: str, batch: dict[str, Tensor]) -> Tensor:
    """The increase of the loss with one channel after the other switched off."""
    module = model.get_submodule(layer)
    before = model(**batch).loss
    found = []
    for channel in range(module.out_channels):  # type: ignore[arg-type]

        def switch_off(_m: Any, _a: Any, output: Tensor, channel: int = channel) -> Tensor:
            output[:, channel] = 0
            return output

        hook = module.register_forward_hook(switch_off)
        found.append(model(**batch).loss - before)
        hook.remove()
    return torch.stack(found)


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def first_order(model: Net, layer: str, batch: dict[str, Tensor]) -> Tensor:
    """Minus the inner product with the gradient of the loss."""
    maps: list[Tensor] = []

    def watch(_m: Any, _a: Any, output: Tensor) -> Tensor:
        maps.append(output.detach().requires_grad_())
        return maps[0].clone()

    hook = model.get_submodule(layer).register_forward_hook(watch)
    (gradient,) = torch.autograd.grad(model(**batch).loss, maps)
    hook.remove()
    return -(maps[0].detach() * gradient).sum((0, 2, 3))


def test_estimate_ranks_channels_as_switching_them_off_does_and_the_first_order_does_not() -> None:
    whole = target()
    ours, plain = [], []
    for seed in range(3):
        model = trained(seed)
        found = loss_increase(model, ["one", "two"], [whole], examples=1000)
        for layer, value in found.items():
            truth = ranks(exact(model, layer, whole))
            for kept, estimate in ((ours, value), (plain, first_order(model, layer, whole))):
                kept.append(float(torch.corrcoef(torch.stack([ranks(estimate), truth]))[0, 1]))
    assert min(ours) > 0.85
    assert sum(plain) / 6 < 0.8 < 0.93 < sum(ours) / 6


def test_estimate_is_half_the_mean_square_of_examples_inner_products() -> None:
    model, whole = trained(), target()
    found = loss_increase(model, ["one", "two"], [whole], examples=5)
    for layer, value in found.items():
        products = [
            first_order(model, layer, {name: v[n : n + 1] for name, v in whole.items()})
            for n in range(5)
        ]
        torch.testing.assert_close(value, 0.5 * torch.stack(products).square().mean(0))


def test_the_mean_is_over_examples_however_they_are_batched() -> None:
    model, whole = trained(), images(7)
    halves = [{name: value[at] for name, value in whole.items()} for at in (slice(4), slice(4, 7))]
    one = loss_increase(model, ["one", "two"], [whole], examples=6)
    two = loss_increase(model, ["one", "two"], halves, examples=6)
    for layer in one:
        torch.testing.assert_close(one[layer], two[layer])
    assert not model._forward_hooks
    assert not model.one._forward_hooks


def test_a_layer_without_maps_is_named() -> None:
    model = trained()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(InputError, match="unused gave no maps"):
        loss_increase(model, ["one", "unused"], [images(3)], examples=3)


def test_examples_are_cut_from_what_is_as_long_as_the_batch() -> None:
    batch = {"table": torch.ones(5, 2), "labels": torch.arange(3), "flag": True, "x": torch.ones(3)}
    cpu = torch.device("cpu")
    assert batch_size(batch) == 3
    found = part(batch, 1, 2, cpu)
    assert found["labels"].tolist() == [1]
    assert (found["table"].shape, found["x"].shape, found["flag"]) == ((5, 2), (1,), True)
    assert batch_size({"only": torch.ones(4, 2)}) == 4


def test_first_tensor_of_any_output_can_be_replaced() -> None:
    maps, new = torch.ones(2, 2), torch.zeros(2, 2)
    for output in (maps, (maps, "more"), [maps], {"a": maps, "b": None}):
        assert first_tensor(output) is maps
        replaced = with_first(output, new)
        assert type(replaced) is type(output)
        assert first_tensor(replaced) is new
    with pytest.raises(InputError, match="no feature maps"):
        first_tensor("text")
