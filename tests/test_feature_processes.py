"""Stored features of several processes, and of some that are killed: launched for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hfft

from .feature_runs import FLIPPED, cache_folder, chunks, config_of, furthest, reused, stored
from .runs import largest_difference, metrics, same_weights
from .test_processes import ROOT, accelerate, environment, kill_when, still_vit

pytestmark = pytest.mark.slow

LAUNCH = ROOT / "tests" / "feature_launch.py"
HALF = "training.per_device_train_batch_size=3"
GRADUAL = {"name": "gradual", "epochs": 3}
FILES = 2 * (3 + 2)
"""Of a run with two boundaries: three of train, two of validation at each."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for three files of train, and two of validation."""
    folder = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for split, number in {"train": 24, "validation": 12}.items():
        for name in ("1", "2", "3"):
            (folder / split / name).mkdir(parents=True)
            for image in range(number):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{image:02d}.png")
    return folder


def single(trouble: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(LAUNCH), trouble, "0", *map(str, arguments)]


def double(trouble: str, rank: int, *arguments: str | Path) -> list[str]:
    return accelerate(LAUNCH, trouble, str(rank), *arguments)


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command at work; its whole process group is gone at the end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finished(process: subprocess.Popen[str], seconds: float = 150) -> str:
    """Wait for a command to end well; return what it said."""
    said = process.communicate(timeout=seconds)[1]
    assert process.returncode == 0, said[-3000:]
    return said


def run(command: list[str]) -> str:
    with started(command) as process:
        return finished(process)


def leftovers() -> list[Path]:
    return [path for path in cache_folder().rglob("*") if ".partial" in path.name]


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": GRADUAL, "baselines": ["frozen"]},
        {"task": FLIPPED, "strategy": GRADUAL},
    ],
)
def test_features_of_two_processes_end_where_one_without_them_does(
    sections: dict[str, Any], tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    model = still_vit(vit_folder, tmp_path / "model")
    views = {"views": 2} if "task" in sections else {}
    one = config_of(tmp_path / "one", model, images, {"mode": "off", **views}, **sections)
    hfft.train(one)
    cache = {"mode": "on", **views}
    two = config_of(tmp_path / "two", model, images, cache, **sections)
    run(accelerate(ROOT / "tests" / "hashed_launch.py", tmp_path, two, HALF))
    ranks = [(tmp_path / f"rank{rank}.jsonl").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert stored(tmp_path / "two") == [True] * 3
    loss, weight = furthest(tmp_path / "one", tmp_path / "two")
    assert loss < 1e-5
    assert weight < 1e-4
    scores = [metrics(tmp_path / name)["eval"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert leftovers() == []
    two_again = config_of(tmp_path / "again", model, images, cache, **sections)
    assert hfft.train(two_again).stages[0]["feature_cache"]["reused"]


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_slow_process_leaves_no_file_out(
    slow_rank: int, tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    """The other one is at the next split, and has written some of it, before it gets there."""
    config = config_of(tmp_path / "run", vit_folder, images, "on")
    said = run(double("slow", slow_rank, config, HALF))
    assert "computed in every epoch" not in said
    assert reused(tmp_path / "run") == [False, True]
    assert len(chunks()) == FILES
    assert leftovers() == []


@pytest.mark.parametrize("full_rank", [0, 1])
def test_one_process_that_cant_write_has_both_go_on_without(
    full_rank: int, tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    config = config_of(tmp_path / "run", vit_folder, images, "on")
    said = run(double("full", full_rank, config, HALF))
    assert "No space left on device" in said
    assert stored(tmp_path / "run") == [False, False]
    assert chunks() == leftovers() == []
    plain = config_of(tmp_path / "plain", vit_folder, images, "off")
    run(accelerate("launch.py", plain, HALF))
    assert same_weights(tmp_path / "run", tmp_path / "plain")


def test_processes_that_see_another_runs_files_at_different_times_agree(
    tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    config = config_of(tmp_path / "run", vit_folder, images, "on")
    run(double("ahead", 1, config, HALF))
    assert stored(tmp_path / "run") in ([True, True], [False, False])


@pytest.mark.parametrize("files", [0, 1, 3, 6])
def test_a_run_killed_in_the_pass_ends_where_one_without_features_does(
    files: int, tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    plain = config_of(tmp_path / "plain", vit_folder, images, "off")
    hfft.train(plain)
    config = config_of(tmp_path / "run", vit_folder, images, "on")

    def ready() -> bool:
        begun = (cache_folder() / "features" / ".lock").exists()
        return begun and len(chunks()) >= files

    kill_when(single("slow", config), ready)
    kept = {path: path.stat().st_mtime_ns for path in chunks()}
    assert files <= len(kept) < FILES
    run([sys.executable, "-m", "hfft", "train", str(config), "--resume"])
    assert reused(tmp_path / "run") == [False, True]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not computed again
    assert len(chunks()) == FILES
    assert leftovers() == []
    assert same_weights(tmp_path / "plain", tmp_path / "run")
    assert furthest(tmp_path / "plain", tmp_path / "run") == (0, 0)


def test_two_processes_killed_in_the_pass_resume(
    tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    config = config_of(tmp_path / "run", vit_folder, images, "on")
    kill_when(double("slow", 1, config, HALF), lambda: len(chunks()) >= 2)
    assert len(chunks()) < FILES
    run([*accelerate("launch.py", config, HALF), "--resume"])
    assert stored(tmp_path / "run") == [True, True]
    assert leftovers() == []
    plain = config_of(tmp_path / "plain", vit_folder, images, "off")
    run(accelerate("launch.py", plain, HALF))
    assert same_weights(tmp_path / "run", tmp_path / "plain")


def test_a_run_killed_in_a_stage_on_features_resumes_bit_for_bit(
    tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    training = {"save_strategy": "steps", "save_steps": 3}
    whole = config_of(tmp_path / "whole", vit_folder, images, "off", training=training)
    hfft.train(whole)
    config = config_of(tmp_path / "run", vit_folder, images, "on", training=training)
    command = [sys.executable, "-m", "hfft", "train", str(config)]
    checkpoint = tmp_path / "run" / "checkpoints" / "main" / "01-top"
    kill_when(command, lambda: any(checkpoint.glob("checkpoint-*/SEALED")))
    run([*command, "--resume"])
    assert reused(tmp_path / "run")[1]
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert furthest(tmp_path / "whole", tmp_path / "run") == (0, 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_two_runs_at_once_on_an_empty_cache_end_alike(
    processes: int, tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    configs = [config_of(tmp_path / name, vit_folder, images, "on") for name in ("one", "two")]
    commands = [
        single("slow", config) if processes == 1 else double("slow", 0, config, HALF)
        for config in configs
    ]
    with started(commands[0]) as first, started(commands[1]) as second:
        finished(first)
        finished(second)
    for name in ("one", "two"):
        assert stored(tmp_path / name) == [True, True]
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert largest_difference(tmp_path / "one", tmp_path / "two") == 0
    assert len(chunks()) == FILES
    assert leftovers() == []


def test_removal_from_another_process_in_the_pass_is_refused(
    tmp_path: Path, vit_folder: Path, images: Path
) -> None:
    config = config_of(tmp_path / "run", vit_folder, images, "on")
    with started(single("slow", config)) as process:
        while not chunks() and process.poll() is None:
            time.sleep(0.05)
        removal = [sys.executable, "-m", "hfft", "cache", "rm", "--all"]
        removed = subprocess.run(
            removal, capture_output=True, text=True, env=environment(), check=False
        )
        finished(process)
    assert removed.returncode == 2
    assert "in use by a run" in removed.stderr
    assert reused(tmp_path / "run") == [False, True]
    listed = subprocess.run(
        [sys.executable, "-m", "hfft", "cache", "ls", "--json"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert [entry["complete"] for entry in json.loads(listed.stdout)] == [True] * 4
