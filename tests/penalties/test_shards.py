"""FSDP2's shards, in two processes over gloo: values and gradients are the unsharded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hfft.errors import InputError
from hfft.penalties import WeightPenalty
from hfft.penalties.penalty import Part, Setting, get

pytestmark = pytest.mark.slow

KINDS = ["l2_sp", "euclidean", "cosine", "fisher", "orthogonal", "spd"]


def model() -> nn.Sequential:
    """Layers that do not divide by two, the lowest frozen; one process has nothing of some."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(5, 7), nn.Conv1d(7, 3, 1), nn.Linear(1, 1), nn.Linear(6, 9), nn.Linear(9, 1)
    ).double()
    made[0].requires_grad_(False)
    return made


def step(net: nn.Module, kind: str, mode: str) -> tuple[tuple[float, float], dict[str, Tensor]]:
    """Attach a penalty, take two optimizer steps on given gradients, return value and weights."""
    random = torch.Generator().manual_seed(1)
    learning = {n: p for n, p in net.named_parameters() if p.requires_grad}
    whole = {
        n: torch.randn(tuple(p.shape), dtype=torch.float64, generator=random)
        for n, p in learning.items()
    }
    gradients = [
        {n: torch.randn(t.shape, dtype=torch.float64, generator=random) for n, t in whole.items()}
        for _ in range(2)
    ]
    penalty: Any = get(kind)(
        get(kind).Options.model_validate({"interval": 2} if kind == "orthogonal" else {})
    )
    penalty.information = {n: t.abs() for n, t in whole.items()}
    covered = {n: p for n, p in learning.items() if penalty.covers(n, p.shape)}
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    part = Part(0.3, tuple(covered), tuple(covered.values()), tuple(whole[n] for n in covered))
    done = iter(range(2))
    now = [0]
    attached = penalty.attach(
        Setting(net, optimizer, [part], mode=mode, step=lambda: now[0])  # type: ignore[arg-type]
    )
    for number in done:
        now[0] = number
        for name, parameter in learning.items():
            parameter.grad = like(gradients[number][name], parameter)
        optimizer.step()
    value = attached.value()
    return value, {
        n: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
        for n, p in net.named_parameters()
    }


def like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Cut a whole gradient as its parameter is."""
    if not isinstance(parameter, DTensor):
        return gradient.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(gradient, parameter.device_mesh, parameter.placements)


def compare(kind: str, mode: str) -> None:
    assert dist.get_world_size() == 2
    value, weights = step(model(), kind, mode)
    sharded = model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    own_value, own = step(sharded, kind, mode)
    assert own_value == pytest.approx(value, rel=1e-9)
    for name, tensor in weights.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-9, atol=1e-12)


def launch(function: Callable[..., None], *args: Any) -> None:
    debug_launcher(function, args, num_processes=2)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "coupled") for kind in KINDS] + [("l2_sp", "decoupled"), ("cosine", "decoupled")],
)
def test_on_shards_it_is_what_it_is_on_whole_tensors(kind: str, mode: str) -> None:
    launch(compare, kind, mode)


def refuse() -> None:
    class Cubic(WeightPenalty):
        kind = "cubic"

        def value_and_gradient(self, theta, source):  # type: ignore[no-untyped-def]
            return theta[0].sum(), theta

    net = nn.Linear(4, 4)
    source = net.weight.detach().clone()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    part = Part(1.0, ("weight",), (net.weight,), (source,))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(InputError, match="cubic is not made for weights that are cut into shards"):
        Cubic(Cubic.Options()).attach(Setting(net, optimizer, [part]))


def test_a_kind_that_knows_whole_tensors_only_is_refused() -> None:
    launch(refuse)
