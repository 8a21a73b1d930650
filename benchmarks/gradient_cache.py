"""A step over a batch of pairs in chunks, beside the same step over all of it at once.

The model is a CLIP of half the width and half the depth of ViT-B/32, random weights: 50 tokens an
image, 77 a text. All take turns in one process of one thread, whose CPU seconds are counted;
medians. Gradients are compared with the whole batch's; where they differ, the exit status is 1. The
peak of memory over the model's and its gradient's is that of processes of their own.

Usage:
    OMP_NUM_THREADS=1 python benchmarks/gradient_cache.py     # about 8 minutes
    python benchmarks/gradient_cache.py --batch 128 --chunks 16 64
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peak_memory import EXACT, Watch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from hfft import registry
from hfft.contrastive_step import ContrastiveStep

MB = 2**20
GOAL = 1.33
"""The most that a step in chunks may take, over the whole."""
TOLERANCE = 1e-4
"""Of float32 gradients."""
TEXT = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
VISION = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 32}
DEPTH = {"num_hidden_layers": 6}


class Case:
    """A model, a batch of pairs, and the step that hfft trains with.

    Args:
        batch: how many pairs.
    """

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        config = CLIPConfig(text_config=TEXT | DEPTH, vision_config=VISION | DEPTH)
        self.model: Any = CLIPModel(config).train()
        text = config.text_config
        ids = torch.randint(3, text.vocab_size - 1, (batch, text.max_position_embeddings))
        ids[:, -1] = text.eos_token_id
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(batch, 3, 224, 224),
            "labels": torch.arange(batch)[:, None].expand(batch, 2),
        }
        kind = registry.get("zero-shot-image-classification")
        self._task: Any = kind(kind.Options())
        self._accelerator = Accelerator(cpu=True)
        self.step(batch)  # libraries make room, and gradients have theirs

    def step(self, chunk: int) -> float:
        """Run forward and backward; return the CPU seconds."""
        self.model.zero_grad(set_to_none=False)
        step = ContrastiveStep(self._task, self._accelerator, chunk)
        started = time.process_time()
        step(self.model, self.inputs, 2 * len(self.inputs["labels"]))
        return time.process_time() - started

    def gradients(self) -> list[Tensor]:
        """Return a copy of what the last step came to."""
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def difference(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the length of the difference of two gradients over that of the second."""
    apart = torch.stack([(one - other).norm() for one, other in zip(found, right, strict=True)])
    return float(apart.norm() / torch.stack([other.norm() for other in right]).norm())


def peak(batch: int, chunk: int) -> int:
    """Return the bytes that a step takes in a process of its own."""
    command = [sys.executable, __file__, "--batch", str(batch), "--memory", str(chunk)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | EXACT
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def report(batch: int, chunks: Sequence[int], repeats: int) -> bool:
    """Measure and print; return whether gradients were the same."""
    case = Case(batch)
    sizes = [batch, *chunks]
    right = case.gradients()
    errors = {}
    for size in sizes:
        case.step(size)
        errors[size] = difference(case.gradients(), right)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            times[size].append(case.step(size))
    memory = {size: peak(batch, size) for size in sizes}
    print(f"{'chunk':>8}{'CPU seconds':>13}{'ratio':>8}{'peak MB':>10}{'ratio':>8}{'error':>10}")
    whole = statistics.median(times[batch])
    for size in sizes:
        seconds = statistics.median(times[size])
        print(
            f"{size:8}{seconds:13.2f}{seconds / whole:8.2f}{memory[size] / MB:10.0f}"
            f"{memory[size] / memory[batch]:8.2f}{errors[size]:10.1e}"
        )
    print(f"goal: {GOAL} of the seconds at most")
    return max(errors.values()) < TOLERANCE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description="Time a contrastive step in chunks.")
    parser.add_argument("--batch", type=int, default=64, help="pairs (default: 64)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[32, 16, 8, 4], help="(default: 32 16 8 4)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--memory", type=int, help="print the peak of this chunk alone, in bytes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory is not None:
        case = Case(options.batch)
        watch = Watch()
        case.step(options.memory)
        print(json.dumps(watch.end() - watch.first))
        return 0
    size = sum(p.numel() for p in Case(2).model.parameters()) / 1e6
    print(f"torch {torch.__version__}; {options.batch} pairs, {size:.0f} million parameters:")
    return 0 if report(options.batch, options.chunks, options.repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
