"""Does it help? Test accuracy with few labels, for each way of fine-tuning, over several seeds.

Two data sets: `digits` (`few_labels_digits.py`) and `docstrings` (`few_labels_docstrings.py`).
Within each, all methods take the same number of optimizer steps. Each method has one setting that
is tuned for each size, on validation, with seeds that are not among the tested ones, over as many
values as any other method: a learning rate, or for what goes on top of `full` its strength, at the
highest of the rates that `full` tries, which is what holding on to the source is for. The grids,
and what was chosen, stand in those files.

A line of JSON is appended to the results file for every run, so a benchmark that was stopped goes
on. `build/` is in nobody's repository.

Usage:
    OMP_NUM_THREADS=1 python benchmarks/few_labels.py    # all of it
    python benchmarks/few_labels.py --dataset digits --methods full frozen --seeds 0 1 2
    python benchmarks/few_labels.py --table              # what the results file holds
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

DATASETS = {"digits": "few_labels_digits", "docstrings": "few_labels_docstrings"}
SEEDS = (0, 1, 2, 3, 4)
FIRST_TUNING_SEED = 100
YARDSTICK = "full"

Settings = Mapping[str, float]
Row = dict[str, Any]


class Results:
    """The runs done so far, in a file of JSON lines.

    Args:
        path: the file; it and its folder need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def find(self, **wanted: Any) -> list[Row]:
        """Return the rows that have all of the given values."""
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def add(self, row: Row) -> None:
        """Keep a row, in the file as well."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Benchmark:
    """One data set's runs.

    Args:
        dataset: a key of `DATASETS`.
        results: the runs done so far.
        work: a folder for what the data set makes.
    """

    def __init__(self, dataset: str, results: Results, work: Path) -> None:
        self.dataset, self.results, self.work = dataset, results, work
        self.module: ModuleType = import_module(DATASETS[dataset])

    def run(self, methods: Iterable[str], seeds: Sequence[int], *, tune: bool) -> None:
        """Tune every method that needs it, then run each seed's methods in turns.

        Args:
            methods: keys of the data set's `GRIDS`.
            seeds: the seeds to test.
            tune: tune again what the data set's `CHOSEN` settles.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        self.module.prepare(self.work)
        settings = {
            (size, method): self.settle(method, size, tune=tune)
            for size in self.module.SIZES
            for method in methods
        }
        for seed in seeds:
            for (size, method), chosen in settings.items():
                self._once(method, size, seed, chosen, "test")

    def settle(self, method: str, size: int, *, tune: bool) -> Settings:
        """Return a method's settings: as the data set's file has them, or the best on validation.

        Of equals the first in the grid is taken.
        """
        known: Mapping[str, Settings] = self.module.CHOSEN.get(size, {})
        if method in known and not tune:
            return known[method]
        ((key, grid),) = self.module.GRIDS[method].items()
        base = {} if key == "learning_rate" else {"learning_rate": max(self._rates())}
        tried = {value: base | {key: value} for value in grid}
        scores = {
            value: statistics.fmean(
                self._once(method, size, seed, settings, "validation")["accuracy"]
                for seed in self.module.TUNING_SEEDS
            )
            for value, settings in tried.items()
        }
        chosen: Settings = tried[max(grid, key=scores.__getitem__)]
        print(f"{self.dataset}, {size}: {method} takes {chosen}", file=sys.stderr, flush=True)
        return chosen

    def _rates(self) -> Sequence[float]:
        rates: Sequence[float] = self.module.GRIDS[YARDSTICK]["learning_rate"]
        return rates

    def _once(self, method: str, size: int, seed: int, settings: Settings, split: str) -> Row:
        """Run, unless the results file has it."""
        what = {
            "dataset": self.dataset,
            "size": size,
            "method": method,
            "seed": seed,
            "split": split,
            "settings": dict(settings),
        }
        done = self.results.find(**what)
        if done:
            return done[0]
        row = what | self.module.run(self.work, method, size, seed, settings, split)
        self.results.add(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is not a number."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(rows: Sequence[Row]) -> str:
    """Lay out the test accuracies as Markdown, one table a data set.

    A second column for each size has the difference from `full`, taken seed by seed, with its
    own standard error: methods share a seed's training examples. Where a method was tested with
    several settings, those of the newest row count.
    """
    lines: list[str] = []
    tested = [row for row in rows if row["split"] == "test"]
    for dataset in dict.fromkeys(row["dataset"] for row in tested):
        own = [row for row in tested if row["dataset"] == dataset]
        sizes = sorted({row["size"] for row in own})
        heads = [f"{size} a class | minus `{YARDSTICK}` | with" for size in sizes]
        lines += [
            f"| {dataset} | {' | '.join([*heads, 'seeds', 'CPU seconds'])} |",
            "| --- " * (3 + 3 * len(sizes)) + "|",
            *(_line(method, own, sizes) for method in dict.fromkeys(row["method"] for row in own)),
            "",
        ]
    return "\n".join(lines)


def _line(method: str, rows: Sequence[Row], sizes: Sequence[int]) -> str:
    cells, seeds, seconds = [f"`{method}`"], set[int](), list[float]()
    for size in sizes:
        own, full = _newest(rows, method, size), _newest(rows, YARDSTICK, size)
        shared = sorted(own.keys() & full.keys())
        differences = [own[seed]["accuracy"] - full[seed]["accuracy"] for seed in shared]
        settings = next(iter(own.values()))["settings"] if own else {}
        cells += [
            _cell([row["accuracy"] for row in own.values()], ""),
            _cell(differences, "+") if method != YARDSTICK else "",
            ", ".join(f"{key} {value:g}" for key, value in settings.items()),
        ]
        seeds |= own.keys()
        seconds += [row["seconds"] for row in own.values()]
    return f"| {' | '.join([*cells, str(len(seeds)), f'{statistics.fmean(seconds):.0f}'])} |"


def _newest(rows: Sequence[Row], method: str, size: int) -> dict[int, Row]:
    """Return seed to row, of the settings that were tested last."""
    own = [row for row in rows if row["method"] == method and row["size"] == size]
    return {row["seed"]: row for row in own if row["settings"] == own[-1]["settings"]}


def _cell(values: Sequence[float], sign: str) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    if math.isnan(error):
        return f"{100 * mean:{sign}.1f}"
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare ways of fine-tuning where labels are few, over several seeds."
    )
    parser.add_argument("--dataset", choices=DATASETS, help="default: both, one after the other")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED", help="default: 0 1 2 3 4"
    )
    parser.add_argument(
        "--tune", action="store_true", help="choose again what the data set's file has chosen"
    )
    parser.add_argument("--table", action="store_true", help="print the results file's table only")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("build/few_labels.jsonl"),
        metavar="FILE",
        help="where results are kept (default: build/few_labels.jsonl)",
    )
    options = parser.parse_args(arguments)
    if any(seed >= FIRST_TUNING_SEED for seed in options.seeds):
        parser.error(f"seeds from {FIRST_TUNING_SEED} on are those that settings are chosen with")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = parse_arguments(arguments)
    results = Results(options.results.resolve())
    if not options.table:
        logging.disable(logging.WARNING)
        work = results.path.with_suffix("")
        for dataset in [options.dataset] if options.dataset else DATASETS:
            benchmark = Benchmark(dataset, results, work)
            grids = benchmark.module.GRIDS
            unknown = [method for method in options.methods or () if method not in grids]
            if unknown:
                print(f"error: {dataset} has {', '.join(grids)}; not {unknown}", file=sys.stderr)
                return 2
            benchmark.run(options.methods or grids, options.seeds, tune=options.tune)
    print(table(results.rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
