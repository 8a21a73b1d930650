"""CLIP's and SigLIP's losses over a large batch, forward and backward: hfft beside its peers.

    hfft          `contrastive_loss`: a few rows of logits at a time, the gradient in closed form
    open_clip     ClipLoss's formula: logits of images and of texts, a cross-entropy over each;
                  across processes its gather_with_grad and local_loss
    transformers  CLIP's or SigLIP's formula: one matrix of logits, and its transpose; it knows no
                  other process's pairs

Embeddings of length 1, the scale, and SigLIP's bias learn. In every round all take turns in the
same processes, of one thread each, whose CPU seconds are counted; of several processes the most
that one takes. Values and gradients are compared with those of the last in the table; where they
differ, the exit status is 1. The peak of memory over the inputs, gradients included, is that of
processes of their own.

Usage:
    OMP_NUM_THREADS=1 python benchmarks/contrastive_loss.py               # about 3 minutes
    OMP_NUM_THREADS=1 python benchmarks/contrastive_loss.py --processes 2
    OMP_NUM_THREADS=1 python benchmarks/contrastive_loss.py --loss sigmoid
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing
from peak_memory import EXACT, Watch
from torch import Tensor
from torch.distributed.nn import functional as differentiable
from torch.nn import functional

from hfft.contrastive.losses import contrastive_loss

MB = 2**20
PAIRS = 8192
GOALS = {"seconds": 1.5, "memory": 8.0}
"""How many times less than open_clip's formula takes, for PAIRS in one process."""
TOLERANCE = 1e-3
"""Of float32 values and gradients."""


@dataclass(frozen=True)
class Pairs:
    """A process's share of the batch."""

    kind: Literal["softmax", "sigmoid"]
    first: Tensor
    second: Tensor
    scale: Tensor
    bias: Tensor
    keys: Tensor

    @classmethod
    def make(cls, kind: Literal["softmax", "sigmoid"], n: int, d: int) -> Pairs:
        """Draw pairs about as near to one another as CLIP's: a cosine of 0.3."""
        torch.manual_seed(dist.get_rank())
        first = torch.randn(n, d)
        second = functional.normalize(0.3 * first + torch.randn(n, d), dim=1)
        first = functional.normalize(first, dim=1)
        numbers = torch.tensor(50.0), torch.tensor(-10.0)
        keys = (torch.arange(n) + n * dist.get_rank())[:, None].expand(n, 2)
        return cls(kind, *(t.requires_grad_() for t in (first, second, *numbers)), keys)

    def learning(self) -> list[Tensor]:
        """Return what learns."""
        sigmoid = [self.bias] if self.kind == "sigmoid" else []
        return [self.first, self.second, self.scale, *sigmoid]


def hfft(pairs: Pairs) -> Tensor:
    """Return this process's share of the mean loss, as the others do."""
    bias = pairs.bias if pairs.kind == "sigmoid" else None
    numbers = pairs.first, pairs.second, pairs.scale, bias
    total = contrastive_loss(pairs.kind, *numbers, pairs.keys, across=True)
    return total / (2 * len(pairs.first) * dist.get_world_size())


def open_clip(pairs: Pairs) -> Tensor:
    """As open_clip/loss.py: ClipLoss(local_loss=True, gather_with_grad=True)."""
    n, world = len(pairs.first), dist.get_world_size()
    every_first, every_second = pairs.first, pairs.second
    if world > 1:
        every_first = torch.cat(differentiable.all_gather(pairs.first))
        every_second = torch.cat(differentiable.all_gather(pairs.second))
    per_first = pairs.scale * pairs.first @ every_second.T
    per_second = pairs.scale * pairs.second @ every_first.T
    labels = torch.arange(n) + n * dist.get_rank()
    ways = (functional.cross_entropy(logits, labels) for logits in (per_first, per_second))
    return sum(ways, torch.zeros(())) / (2 * world)


def transformers(pairs: Pairs) -> Tensor:
    """As image_text_contrastive_loss of modeling_clip.py, and modeling_siglip.py."""
    n = len(pairs.first)
    if pairs.kind == "softmax":
        logits = torch.matmul(pairs.second, pairs.first.T) * pairs.scale
        labels = torch.arange(n)
        ways = (functional.cross_entropy(z, labels) for z in (logits, logits.T))
        return sum(ways, torch.zeros(())) / 2
    logits = torch.matmul(pairs.second, pairs.first.T) * pairs.scale + pairs.bias
    signs = -torch.ones_like(logits) + 2 * torch.eye(n)
    return -torch.sum(functional.logsigmoid(signs * logits), dim=-1).mean()


CONTENDERS: dict[str, Callable[[Pairs], Tensor]] = {
    "hfft": hfft,
    "transformers": transformers,
    "open_clip": open_clip,
}


@dataclass(frozen=True)
class Found:
    """What a contender gave and took, in a process.

    Attributes:
        seconds: of CPU, a median.
        error: the largest difference from the last contender's, relative to its largest number.
        memory: the peak over the inputs, in bytes.
    """

    seconds: float = 0
    error: float = 0
    memory: float = 0


Measure = Callable[[Pairs], dict[str, Found]]


def pass_through(contender: Callable[[Pairs], Tensor], pairs: Pairs) -> list[Tensor]:
    """Run forward and backward; return the loss and the gradients, scale's and bias's shares."""
    for tensor in pairs.learning():
        tensor.grad = None
    loss = contender(pairs)
    loss.backward()
    return [loss.detach(), *(t.grad for t in pairs.learning() if t.grad is not None)]


def summed(results: Sequence[Tensor]) -> list[Tensor]:
    """Return results with the numbers among them, which are shares, summed over processes."""
    results = [t.clone() for t in results]
    for tensor in results:
        if tensor.dim() == 0:
            dist.all_reduce(tensor)
    return results


def measure_seconds(names: Sequence[str], pairs: Pairs, *, repeats: int) -> dict[str, Found]:
    """Time the contenders in turns, after one to warm up; compare what they give."""
    times: dict[str, list[float]] = {name: [] for name in names}
    given: dict[str, list[Tensor]] = {}
    for repeat in range(-1, repeats):
        for name in names:
            started = time.process_time()
            results = pass_through(CONTENDERS[name], pairs)
            if repeat >= 0:
                times[name].append(time.process_time() - started)
            else:
                given[name] = summed(results)
    right = given[names[-1]]

    def error(results: list[Tensor]) -> float:
        return max(
            float((one - other).abs().max() / other.abs().max())
            for one, other in zip(results, right, strict=True)
        )

    return {n: Found(statistics.median(times[n]), error(given[n])) for n in names}


def measure_memory(name: str, pairs: Pairs) -> dict[str, Found]:
    """Watch the peak of a contender, once a small batch has let libraries make room for theirs."""
    pass_through(CONTENDERS[name], Pairs.make(pairs.kind, 64, pairs.first.shape[1]))
    watch = Watch()
    pass_through(CONTENDERS[name], pairs)
    return {name: Found(memory=watch.end() - watch.first)}


def work(rank: int, options: argparse.Namespace, measure: Measure, folder: str) -> None:
    """Measure as one of the processes; leave what was found in the folder."""
    torch.set_num_threads(1)
    # gather_with_grad's own function, whose successor torch keeps private
    warnings.filterwarnings("ignore", ".*functional.all_gather is deprecated", FutureWarning)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.processes)
    pairs = Pairs.make(options.loss, options.pairs // options.processes, options.dimension)
    found = measure(pairs)
    torch.save({name: astuple(one) for name, one in found.items()}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def measured(options: argparse.Namespace, measure: Measure) -> dict[str, Found]:
    """Return the most that any of new processes found."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (options, measure, folder), nprocs=options.processes)
        ranks = [torch.load(path) for path in Path(folder).glob("*.pt")]
    assert len(ranks) == options.processes
    return {
        name: Found(*map(max, zip(*(rank[name] for rank in ranks), strict=True)))
        for name in ranks[0]
    }


def report(options: argparse.Namespace, names: Sequence[str]) -> bool:
    """Measure and print; return whether values and gradients were the same."""
    found = measured(options, partial(measure_seconds, names, repeats=options.repeats))
    os.environ |= EXACT
    memory = {name: measured(options, partial(measure_memory, name))[name].memory for name in names}
    own, own_memory = found[names[0]], memory[names[0]]
    print(
        f"{'':14}{'CPU seconds':>12}{'over hfft':>11}{'peak MB':>10}{'over hfft':>11}{'error':>10}"
    )
    for name in names:
        seconds = found[name].seconds
        print(
            f"{name:14}{seconds:12.2f}{seconds / own.seconds:11.2f}{memory[name] / MB:10.0f}"
            f"{memory[name] / own_memory:11.2f}{found[name].error:10.1e}"
        )
    if (options.loss, options.pairs, options.processes) == ("softmax", PAIRS, 1):
        print(f"goals over open_clip: {GOALS['seconds']} in seconds, {GOALS['memory']:.0f} in MB")
    return max(one.error for one in found.values()) < TOLERANCE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description="Time contrastive losses, forward and backward.")
    parser.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help=f"of all processes (default: {PAIRS})"
    )
    parser.add_argument("--dimension", type=int, default=512, help="(default: 512)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--processes", type=int, default=1, help="over gloo (default: 1)")
    options = parser.parse_args(arguments)
    if options.loss == "sigmoid" and options.processes > 1:
        parser.error("no peer's sigmoid loss across processes is measured here")
    names = ["hfft", "transformers"]
    if options.loss == "softmax":
        names = ["hfft", "open_clip"] if options.processes > 1 else [*names, "open_clip"]
    print(
        f"torch {torch.__version__}; {options.loss}, {options.pairs} pairs of {options.dimension} "
        f"in {options.processes} process{'es'[: 2 * (options.processes > 1)]}, each:"
    )
    return 0 if report(options, names) else 1


if __name__ == "__main__":
    sys.exit(main())
