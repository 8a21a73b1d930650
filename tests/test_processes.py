"""One process against two: launched for real, over gloo, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hfft

from .runs import largest_difference, log, losses, metrics, same_weights, write_config

ROOT = Path(__file__).parents[1]
TWO_CPU = ROOT / "configs" / "accelerate" / "two_cpu.yaml"

pytestmark = pytest.mark.slow


def accelerate(*arguments: str | Path) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_CPU)]
    # a free port for each launch, so that tests can't meet
    return [*launch, "--main_process_port", "0", *map(str, arguments)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def train_on_two(commands: list[list[str]], folder: Path) -> None:
    """Run `hfft train` with the arguments of each, in one launch of two processes.

    Args:
        commands: a config and overrides each.
        folder: for what the launch needs, caches of its own among it.
    """
    todo = folder / "runs.json"
    todo.write_text(json.dumps(commands))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("HFFT_CACHE", str(folder / "features"))
        run(accelerate(ROOT / "tests" / "many_launch.py", todo))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def still_vit(vit_folder: Path, folder: Path) -> Path:
    """The ViT without dropout, whose masks depend on how a batch is shared out."""
    shutil.copytree(vit_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["hidden_dropout_prob"] = config["attention_probs_dropout_prob"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GRADUAL = {"name": "gradual", "epochs_per_group": 1, "learning_rate": 1e-3}


def test_two_processes_equal_one_and_each_other(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    model = still_vit(vit_folder, tmp_path / "model")
    data = {"path": str(image_folder), "validation": "validation", "test": "test"}
    config = write_config(
        tmp_path / "c.yaml", model, image_folder, data=data, strategy=GRADUAL, baselines=["scratch"]
    )
    hfft.train(config)
    two = [f"output_dir={tmp_path / 'two'}", "training.per_device_train_batch_size=3"]
    script = ROOT / "tests" / "hashed_launch.py"
    out = run(accelerate(script, tmp_path, config, *two)).stdout
    assert out.count("The model is in") == 1  # only the main process prints
    ranks = [
        [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert all(line["world"] == 2 for rank in ranks for line in rank)
    assert len(ranks[0]) == 6  # five stages of gradual, one of the baseline
    assert ranks[0] == ranks[1]
    first, second = losses(tmp_path / "run"), losses(tmp_path / "two")
    assert [entry[:3] for entry in first] == [entry[:3] for entry in second]
    assert [e[3] for e in first] == pytest.approx([e[3] for e in second], abs=1e-5)
    assert largest_difference(tmp_path / "run", tmp_path / "two") < 1e-4
    one_scores, two_scores = metrics(tmp_path / "run"), metrics(tmp_path / "two")
    for key in ("eval", "test"):
        assert one_scores[key] == pytest.approx(two_scores[key], abs=1e-5)
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["num_processes"] == 2


def test_two_processes_train_the_adapter_of_one(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    model = still_vit(vit_folder, tmp_path / "model")
    adapter = {"freeze": "backbone", "epochs": 1, "learning_rate": 1e-2}
    stages = [
        {"name": "first", **adapter, "lora": {"r": 2, "merge": True}},
        {"name": "second", **adapter, "lora": {"r": 4, "merge": True}},
        {"name": "all", "epochs": 1},
    ]
    config = write_config(tmp_path / "c.yaml", model, image_folder, stages=stages)
    hfft.train(config)
    two = [f"output_dir={tmp_path / 'two'}", "training.per_device_train_batch_size=3"]
    run(accelerate(ROOT / "tests" / "hashed_launch.py", tmp_path, config, *two))
    ranks = [(tmp_path / f"rank{rank}.jsonl").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0].count('"world": 2') == 3
    first, second = losses(tmp_path / "run"), losses(tmp_path / "two")
    assert [e[3] for e in first] == pytest.approx([e[3] for e in second], abs=1e-5)
    assert largest_difference(tmp_path / "run", tmp_path / "two") < 1e-4


def test_a_penalised_run_on_two_processes_equals_one(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    kinds = ("l2_sp", "cosine", "euclidean", "orthogonal", "spd", "fisher", "delta")
    penalty = [{"kind": kind, "strength": 0.1, "schedule": "linear"} for kind in kinds]
    penalty[-2]["examples"] = 8
    penalty[-1] |= {"attention": "none", "strength": 0.01}
    config = write_config(
        tmp_path / "c.yaml",
        still_vit(vit_folder, tmp_path / "model"),
        image_folder,
        strategy={**GRADUAL, "learning_rate": 0.1, "penalty": penalty},
        training={"optim": "sgd"},  # Adam would make steps of the rounding of zero gradients
    )
    hfft.train(config)
    two = [f"output_dir={tmp_path / 'two'}", "training.per_device_train_batch_size=3"]
    run(accelerate(ROOT / "tests" / "hashed_launch.py", tmp_path, config, *two))
    ranks = [(tmp_path / f"rank{rank}.jsonl").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert '"world": 2' in ranks[0]
    assert largest_difference(tmp_path / "run", tmp_path / "two") < 1e-5
    one, other = log(tmp_path / "run"), log(tmp_path / "two")
    for kind in kinds:
        values = [[e[kind] for e in events if kind in e] for events in (one, other)]
        assert len(values[0]) == 12  # the four stages in which more than the head learns
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6)


def test_replicas_with_batchnorm_are_bit_identical(
    tmp_path: Path, timm_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", timm_folder, image_folder, strategy=GRADUAL)
    run(accelerate(ROOT / "tests" / "hashed_launch.py", tmp_path, config))
    ranks = [(tmp_path / f"rank{rank}.jsonl").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0].count('"world": 2') == 6


def test_lost_loss_on_the_second_process_alone_is_told_by_the_first(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    done = subprocess.run(
        accelerate(ROOT / "tests" / "lost_loss_launch.py", config),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1
    assert "hfft: stage whole: the loss is" in done.stderr
    assert "at step 2" in done.stderr


def test_launch_py_resumes_two_killed_processes(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    config = write_config(
        tmp_path / "c.yaml", vit_folder, image_folder, strategy=GRADUAL, training=saving
    )
    whole = [f"output_dir={tmp_path / 'whole'}", "training.per_device_train_batch_size=3"]
    run(accelerate("launch.py", config, *whole))
    killed = accelerate("launch.py", config, "training.per_device_train_batch_size=3")
    kill_when(killed, lambda: any((tmp_path / "run").glob("checkpoints/main/02-*/*/SEALED")))
    assert not (tmp_path / "run" / "metrics.json").exists()
    run([*killed, "--resume"])
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_resuming_with_another_number_of_processes_is_refused(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    config = write_config(
        tmp_path / "c.yaml", vit_folder, image_folder, strategy=GRADUAL, training=saving
    )
    kill_when(
        accelerate("launch.py", config),
        lambda: any((tmp_path / "run").glob("checkpoints/main/*/checkpoint-*/SEALED")),
    )
    with pytest.raises(hfft.InputError, match="was started on 2 processes, this run has 1"):
        hfft.train(config, resume=True)


@pytest.mark.parametrize("moment", range(10))
def test_run_killed_at_a_random_moment_ends_at_the_same_weights(
    moment: int, tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    """kill -9, aimed by how many files the run has written, so that a slow machine is no matter."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    config = write_config(
        tmp_path / "c.yaml",
        vit_folder,
        image_folder,
        strategy=GRADUAL,
        training=saving,
        baselines=["frozen"],
    )
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    command = [sys.executable, "-m", "hfft", "train", str(config)]
    run_folder = tmp_path / "run"
    lines = 1 + 4 * moment  # of about 40
    kill_when(command, lambda: log_lines(run_folder) >= lines)
    run([*command, "--resume"])
    assert same_weights(tmp_path / "whole", run_folder)
    assert losses(tmp_path / "whole") == losses(run_folder)
    for key in ("eval", "baselines"):
        assert metrics(tmp_path / "whole")[key] == metrics(run_folder)[key]


def log_lines(run_folder: Path) -> int:
    path = run_folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_when(command: list[str], ready: object) -> None:
    """Start a command and kill -9 its whole process group once `ready()`."""
    assert callable(ready)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not ready() and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
