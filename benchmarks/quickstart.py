"""Run the quickstart and print how long it takes and what it scores; the README quotes both.

Usage:
    python benchmarks/quickstart.py    # after `make quickstart` has drawn the digits
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Time `hfft train configs/quickstart.yaml` as a whole process, start-up included."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "hfft", "train", "configs/quickstart.yaml"]
        started = time.monotonic()
        done = subprocess.run([*command, f"output_dir={run}"], cwd=ROOT, check=False)
        seconds = time.monotonic() - started
        if done.returncode:
            return done.returncode
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    scores = {"fine-tuned": metrics["test"]} | {
        name: baseline["test"] for name, baseline in metrics["baselines"].items()
    }
    print(f"\n{seconds:.0f} seconds in all")
    for name, score in scores.items():
        print(f"{name:<12}{score['accuracy']:.4f} test accuracy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
