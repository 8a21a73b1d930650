"""The memory that penalties take, and what halving it costs; `penalty_cost.py` prints both.

Run as a program, this is one training of a few steps that prints the peak of its anonymous memory:
a theta_s that lies in a memory-mapped file belongs to the file, and the system can drop it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from peak_memory import EXACT, Watch
from penalty_cost_cases import DISTANCE, RATE, STRENGTH, is_lower, make, naive
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from hfft.hooks.penalty import PenaltyCallback
from hfft.penalties.penalty import Setting, make_penalty
from hfft.penalties.spaces import Dense
from hfft.penalties.weights import l2_sp_of
from hfft.sections import PenaltyConfig

STEPS = 3
MB = 1e6
VARIANTS = {
    "none": "without a penalty",
    "copy": "l2_sp, theta_s copied",
    "bfloat16": "l2_sp, theta_s copied in bfloat16",
    "file": "l2_sp, theta_s in the file it was loaded from",
    "naive": "l2_sp in the loss, theta_s copied",
    "none frozen": "lower half frozen, without a penalty",
    "copy frozen": "lower half frozen, l2_sp, theta_s copied",
}


def report_memory(name: str, batch: int) -> None:
    """Measure and print, for `bert`, `resnet` or `lora`."""
    wanted = [v for v in VARIANTS if v in ("none", "copy", "naive") or name != "lora"]
    if name != "bert":
        wanted = [v for v in wanted if v != "file"]
    print(f"{'peak of anonymous memory':50}{'MB':>7}{'over none':>11}{'copies of what learns':>23}")
    with TemporaryDirectory() as folder:
        if name != "resnet":
            torch.manual_seed(0)
            BertForSequenceClassification(BertConfig()).save_pretrained(folder)
        base = 0.0
        for variant in wanted:
            command = [sys.executable, __file__, name, str(batch), variant, folder]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | EXACT
            )
            found = json.loads(done.stdout.splitlines()[-1])
            base = found["peak"] if variant.startswith("none") else base
            more = found["peak"] - base
            label = "l2_sp" if (name, variant) == ("lora", "copy") else VARIANTS[variant]
            print(
                f"{label:50}{found['peak'] / MB:7.0f}{more / MB:11.0f}"
                f"{more / found['learning']:23.2f}",
                flush=True,
            )


def report_rounding() -> None:
    """Print what a theta_s rounded to bfloat16 does to L2-SP of a large matrix of weights."""
    torch.manual_seed(0)
    source = 0.02 * torch.randn(3072, 768)
    rounded = Dense([source], [source.bfloat16()])
    value = float(l2_sp_of(rounded.moments()).value)
    theta = source + DISTANCE * 0.02 * torch.randn_like(source)
    exact = theta - source
    found = torch.zeros_like(source)
    moved = Dense([theta], [source.bfloat16()])
    moved.add([found], [0.0], [1.0])
    error = float((found - exact).norm() / exact.norm())
    right = float((exact**2).sum() / 2)
    print(
        f"theta_s in bfloat16: R at theta_s is {value:.1e} instead of 0; at relative distance "
        f"{DISTANCE} R is {right:.1e} and the gradient is wrong by {error:.1%}"
    )


def train(name: str, batch: int, variant: str, folder: str) -> dict[str, float]:
    """Train a few steps; return the peak, and the size of what learns, in bytes."""
    torch.set_num_threads(1)
    kind, _, frozen = variant.partition(" ")
    net = None if name == "resnet" else BertForSequenceClassification.from_pretrained(folder)
    case = make(name, batch, net)
    if frozen:
        for parameter_name, p in case.model.named_parameters():
            p.requires_grad_(not is_lower(parameter_name))
    learning = case.learning()
    extra: Any = lambda: 0.0  # noqa: E731
    optimizer = torch.optim.AdamW(learning.values(), lr=RATE)
    if kind == "naive":
        source = {} if case.products else {n: p.detach().clone() for n, p in learning.items()}
        part = case.part(source)
        extra = lambda: STRENGTH * _value(naive("l2_sp", part))  # noqa: E731
    elif kind != "none" and case.products:
        config = PenaltyConfig(kind="l2_sp", strength=STRENGTH)
        make_penalty(config).attach(Setting(case.model, optimizer, [case.part({})]))
    elif kind != "none":
        callback = PenaltyCallback(
            case.model,
            "l2_sp",
            STRENGTH,
            source=folder if kind == "file" else None,
            dtype="bfloat16" if kind == "bfloat16" else None,
        )
        args: Any = SimpleNamespace(gradient_accumulation_steps=1)
        state: Any = SimpleNamespace(global_step=0, max_steps=STEPS)
        control: Any = None
        callback.on_train_begin(args, state, control, model=case.model, optimizer=optimizer)
    watch = Watch()
    for _ in range(STEPS):
        optimizer.zero_grad()
        (case.loss() + extra()).backward()
        optimizer.step()
    return {"peak": watch.end(), "learning": sum(4 * p.numel() for p in learning.values())}


def _value(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])))
