"""Measure the CPU time of `hfft --help` and `hfft tasks` next to `accelerate launch --help`.

That is `hfft --help` and `hfft tasks` against `accelerate launch --help`; to train, either has to
load torch. CPU time (user and system, of the command and of whatever it starts) is counted instead
of seconds on the clock, as other programs on the machine disturb it less. The commands take turns,
so that a slow minute falls on all of them. Each runs once beforehand, uncounted, which compiles
bytecode and brings the files into memory.

Usage:
    python benchmarks/startup.py --runs 7
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

YARDSTICK = ("accelerate", "launch", "--help")
COMMANDS = (("hfft", "--help"), ("hfft", "tasks"), YARDSTICK)


def children_cpu_seconds() -> float:
    """Return the user and system time of all child processes that have ended so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds(command: Sequence[str]) -> float:
    """Run a command of this environment and return the CPU seconds it took.

    Args:
        command: The name of a program in the folder of this Python, and its arguments.

    Returns:
        User plus system time.

    Raises:
        FileNotFoundError: If the environment has no such program.
        subprocess.CalledProcessError: If the command fails.
    """
    program = Path(sys.executable).parent / command[0]
    before = children_cpu_seconds()
    subprocess.run([program, *command[1:]], check=True, capture_output=True, text=True)
    return children_cpu_seconds() - before


def measure(runs: int) -> dict[tuple[str, ...], list[float]]:
    """Run the commands in turns.

    Args:
        runs: How often each is measured.

    Returns:
        CPU seconds of each run, by command.
    """
    for command in COMMANDS:
        cpu_seconds(command)
    times: dict[tuple[str, ...], list[float]] = {command: [] for command in COMMANDS}
    for _ in range(runs):
        for command in COMMANDS:
            times[command].append(cpu_seconds(command))
    return times


def report(times: dict[tuple[str, ...], list[float]]) -> str:
    """Lay out medians, ranges, and how many times as much the yardstick takes."""
    yardstick = statistics.median(times[YARDSTICK])
    rows = ["command                    median    lowest   highest   accelerate / this"]
    for command, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            f"{' '.join(command):24}{median:7.2f} s {min(seconds):7.2f} s {max(seconds):7.2f} s"
            f"{yardstick / median:20.1f}"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = argparse.ArgumentParser(
        description="Compare the CPU seconds that hfft and accelerate need to start."
    )
    parser.add_argument("--runs", type=int, default=7, help="runs of each command (default: 7)")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error(f"--runs must be at least 1, not {options.runs}")
    try:
        times = measure(options.runs)
    except FileNotFoundError as error:
        print(f"error: {error.filename} is missing: `pip install -e .` first", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error}\n{error.stderr}", file=sys.stderr)
        return 1
    print(
        f"CPU seconds (user + system), {options.runs} runs each in turns; "
        f"Python {platform.python_version()}, accelerate {version('accelerate')}\n"
    )
    print(report(times))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
