"""Measure what penalties cost in a training step, beside the same R as a term of the loss.

CPU seconds of one thread, which other programs disturb less than seconds on the clock. In every
round all take turns: forward and backward pass, AdamW's step with every penalty attached to it
through `Penalty.attach`, each timed by hooks around its own, and backward passes of the naive
forms (`penalty_cost_cases.naive`). Then whole steps: without, with L2-SP, with it in the loss.
Peak memory is that of processes of their own: see `penalty_cost_memory.py`.

Usage:
    OMP_NUM_THREADS=1 python benchmarks/penalty_cost.py --repeats 8
    python benchmarks/penalty_cost.py --model lora --no-memory
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from penalty_cost_cases import DENSE_ROWS, LORA_ROWS, RATE, STRENGTH, Case, Row, make, naive
from penalty_cost_memory import report_memory, report_rounding
from torch import Tensor

from hfft.penalties.penalty import Attachment, Mode, Part, Setting, make_penalty
from hfft.sections import PenaltyConfig

Times = dict[str, list[float]]


def attach(
    row: Row, case: Case, part: Part, optimizer: torch.optim.Optimizer, step: Callable[[], int]
) -> Attachment:
    """Attach a row's penalty as a training does."""
    config = PenaltyConfig(kind=row.kind, strength=STRENGTH, mode=row.mode, **row.options)
    mode: Mode = config.mode
    return make_penalty(config).attach(Setting(case.model, optimizer, [part], mode, step=step))


class Clocks:
    """Times each penalty's hooks, by hooks before and after them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.times: Times = {}
        self._optimizer, self._last, self._spent = optimizer, 0.0, {"": 0.0}

    def around(self, name: str, attach_it: Callable[[], object]) -> None:
        """Attach something, whose time is to count for this name."""
        self._mark("")  # what lies between does not count
        attach_it()
        self._mark(name)

    def step(self) -> None:
        """Take the optimizer's step, and keep what each took."""
        self._spent = {}
        self._last = time.thread_time()
        self._optimizer.step()
        del self._spent[""]
        for name, spent in self._spent.items():
            self.times.setdefault(name, []).append(spent)

    def _mark(self, name: str) -> None:
        def mark(*_: Any) -> None:
            now = time.thread_time()
            self._spent[name] = self._spent.get(name, 0.0) + now - self._last
            self._last = now

        self._optimizer.register_step_pre_hook(mark)
        self._optimizer.register_step_post_hook(mark)


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread that work takes."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def level(times: Sequence[float], turn: int) -> float:
    """Return the mean over the steps of a turn of each one's median."""
    return statistics.mean(statistics.median(times[k::turn]) for k in range(turn))


def measure_rows(case: Case, rows: Sequence[Row], repeats: int) -> tuple[Times, Times, Times]:
    """Return the times of the step's parts, of the penalties, and of their naive forms."""
    source = case.moved()
    parts = {row.name: case.part(source, row.kind, upper_half=row.upper_half) for row in rows}
    plain = torch.optim.AdamW(case.learning().values(), lr=RATE)
    hooked = torch.optim.AdamW(case.learning().values(), lr=RATE)
    clocks, done = Clocks(hooked), 0

    def step() -> int:
        return done

    for row in rows:
        part = parts[row.name]
        clocks.around(row.name, lambda r=row, p=part: attach(r, case, p, hooked, step))
    own: Times = {"passes": [], "optimizer": []}
    naives: Times = {}
    for done in range(-1, repeats):
        hooked.zero_grad()
        passes = timed(lambda: case.loss().backward())
        clocks.step()
        optimizer = timed(plain.step)
        for row in rows:
            first = row.kind not in [r.kind for r in rows[: rows.index(row)]]
            if done >= 0 and (first or row.upper_half) and row.kind != "spd":
                spent = timed(lambda r=row: _naive_pass(r.kind, parts[r.name]))
                naives.setdefault(row.name, []).append(spent)
        if done >= 0:  # the first round warms up
            own["passes"].append(passes)
            own["optimizer"].append(optimizer)
    return own, {name: times[1:] for name, times in clocks.times.items()}, naives


def _naive_pass(kind: str, part: Part) -> None:
    value = naive(kind, part)
    assert value is not None
    (STRENGTH * value).backward()


def measure_steps(case: Case, repeats: int) -> Times:
    """Return the times of whole steps without a penalty, with L2-SP, and with it in the loss."""
    part = case.part(case.moved())
    optimizer = torch.optim.AdamW(case.learning().values(), lr=RATE)

    def step(extra: Callable[[], Tensor | float]) -> None:
        optimizer.zero_grad()
        (case.loss() + extra()).backward()
        optimizer.step()

    times: Times = {"without": [], "l2_sp": [], "naive": []}
    for n in range(-1, repeats):
        for name, kept in times.items():
            attached = attach(Row("l2_sp"), case, part, optimizer, lambda: 0)
            if name != "l2_sp":
                attached.remove()

            def extra(name: str = name) -> Tensor | float:
                return STRENGTH * (naive("l2_sp", part) or 0.0) if name == "naive" else 0.0

            spent = timed(lambda e=extra: step(e))
            attached.remove()
            if n >= 0:
                kept.append(spent)
    return times


def report(case: Case, rows: Sequence[Row], repeats: int) -> None:
    """Measure and print."""
    own, closed, naives = measure_rows(case, rows, repeats)
    passes, optimizer = (statistics.median(own[name]) for name in ("passes", "optimizer"))
    whole = passes + optimizer
    learning = sum(p.numel() for p in case.learning().values())
    print(
        f"step without a penalty: {whole:.2f} s (passes {passes:.2f}, AdamW {optimizer:.2f}); "
        f"{learning / 1e6:.1f} million parameters learn\n"
    )
    print(f"{'penalty':28}{'hfft':>10}{'of a step':>11}{'in the loss':>14}{'of a step':>11}")
    for row in rows:
        cost = level(closed[row.name], row.turn)
        line = f"{row.name:28}{cost * 1e3:7.1f} ms{cost / whole:11.2%}"
        if row.name in naives:
            other = statistics.median(naives[row.name])
            line += f"{other * 1e3:11.1f} ms{other / whole:11.2%}"
        print(line, flush=True)
    steps = {name: statistics.median(times) for name, times in measure_steps(case, repeats).items()}
    base = steps["without"]
    print(
        f"whole steps in turns: {base:.2f} s without, {steps['l2_sp'] / base - 1:+.2%} with l2_sp, "
        f"{steps['naive'] / base - 1:+.2%} with it in the loss\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(description="Measure what penalties cost in a training step.")
    models = ("bert", "resnet", "lora")
    parser.add_argument("--model", choices=(*models, "all"), default="all")
    parser.add_argument(
        "--repeats", type=int, default=8, help="rounds; multiples of 4 (default: 8)"
    )
    parser.add_argument("--batch", type=int, default=8, help="examples (default: 8)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if options.repeats < 4 or options.repeats % 4:
        parser.error(f"--repeats must be 4 or a multiple, not {options.repeats}")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one thread")
    for name in models if options.model == "all" else (options.model,):
        case = make(name, options.batch)
        print(f"\n{case.title}, batch {options.batch}", flush=True)
        if options.time:
            report(case, LORA_ROWS if name == "lora" else DENSE_ROWS, options.repeats)
        if options.memory:
            report_memory(name, options.batch)
        if name == "bert":
            report_rounding()
    return 0


if __name__ == "__main__":
    sys.exit(main())
