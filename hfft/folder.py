"""The run folder: what a run leaves behind, and when it may be written."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hfft.checkpoints import StageCheckpoints, write_json
from hfft.config import Config
from hfft.config_file import config_values, dump_config
from hfft.errors import InputError
from hfft.sections import SoupAverage
from hfft.yaml_file import read_yaml

_OURS = (
    "config.yaml",
    "metrics.json",
    "log.jsonl",
    "checkpoints",
    "model",
    "adapter",
    "per_class.csv",
    "average.csv",
    "average.png",
    "confusion_matrix.png",
    "environment.json",  # what tells a run from other people's files: written first, removed last
)
_PACKAGES = (
    *("hfft", "torch", "transformers", "accelerate", "timm", "datasets", "safetensors"),
    "peft",  # of strategy lora, where it is installed
)


class RunFolder:
    """The folder of one run.

    Args:
        path: the run's output_dir.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.json"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.retention = self.checkpoints / "retention" / "before.json"

    def check(self, config: Config, processes: int, *, resume: bool, overwrite: bool) -> None:
        """Make sure that nothing of another run can be lost.

        Raises:
            InputError: the folder holds a run, and neither flag says what to do about it; or
                `--resume` with another config or number of processes than the run's; or
                `--overwrite` of what is no run, or holds this one's model or data.
        """
        if os.path.exists(self.path) and not self.path.is_dir():
            raise InputError(f"output_dir: {self.path} is a file; name a folder")
        present = [name for name in _OURS if os.path.exists(self.path / name)]
        if overwrite and resume:
            raise InputError("--resume and --overwrite exclude each other")
        if not present:
            return
        before = self._processes(present)
        if overwrite:
            self._check_sources(config)
            return
        if not resume:
            raise InputError(
                f"output_dir: {self.path} holds a run already ({', '.join(present)}); go on with "
                f"it by --resume, replace it by --overwrite, or name another output_dir"
            )
        if self.config.exists():
            self._check_same(config)
        if before != processes:
            raise InputError(
                f"--resume: {self.path} was started on {before} processes, this run has "
                f"{processes}; start {before}, or begin anew with --overwrite"
            )

    def open(self, config: Config, environment: dict[str, Any], *, overwrite: bool) -> None:
        """Make the folder, with what the run was asked to do and where it runs.

        Raises:
            InputError: nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._fill(config, environment, overwrite=overwrite)
        except OSError as error:
            raise InputError(f"output_dir: {self.path} can't be written: {error}") from error

    def _fill(self, config: Config, environment: dict[str, Any], *, overwrite: bool) -> None:
        if overwrite:
            self._remove()
        if self.config.exists():  # a resumed run keeps what it was started with
            return
        write_json(self.environment, environment)
        self.checkpoints.mkdir(exist_ok=True)
        partial = self.path / "config.yaml.partial"
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(self.config)

    def check_data(self, fingerprint: str) -> None:
        """Make sure that a resumed run goes on with the data it was started with.

        Raises:
            InputError: files were added, removed or changed.
        """
        if not self.environment.exists():
            return
        before = json.loads(self.environment.read_text(encoding="utf-8"))["data_fingerprint"]
        if before != fingerprint:
            raise InputError(
                f"--resume: the data has changed since {self.path} was started; put it back as it "
                f"was, or begin anew with --overwrite"
            )

    def abandon(self) -> None:
        """Remove a run that has come to nothing: there is no checkpoint to go on from."""
        if not any(self.checkpoints.rglob("checkpoint-*")) and not any(
            self.checkpoints.rglob("result.json")
        ):
            self._remove()
            with suppress(OSError):  # it holds what is not ours
                self.path.rmdir()

    def _remove(self) -> None:
        for name in _OURS:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def stage(self, trial: str, number: int, name: str) -> StageCheckpoints:
        """Return where a stage's checkpoints lie."""
        return StageCheckpoints(self.checkpoints / trial / f"{number:02d}-{name}")

    def trial_result(self, trial: str) -> Path:
        """Return where a trial's scores lie until the run is complete."""
        return self.checkpoints / trial / "result.json"

    def close(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, which mark the run as complete; checkpoints have served then."""
        write_json(self.metrics, metrics)
        for path in self.checkpoints.iterdir():
            shutil.rmtree(path)

    def _processes(self, present: list[str]) -> int:
        """Return how many processes the run there was started on.

        Raises:
            InputError: what is there is no run of ours, so neither flag may touch it.
        """
        try:
            text = self.environment.read_text(encoding="utf-8")
            return int(json.loads(text)["num_processes"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"output_dir: {self.path} is no run of hfft, but has files that a run would write "
                f"over ({', '.join(present)}); name another output_dir"
            ) from None

    def _check_sources(self, config: Config) -> None:
        ours = [(self.path / name).resolve() for name in _OURS]
        named = [*(("model", name) for name in config.model.names), ("data.path", config.data.path)]
        if config.retention is not None:
            named.append(("retention.data.path", config.retention.data.path))
        if isinstance(config.average, SoupAverage) and config.average.of != "checkpoints":
            named += [("average.of", str(Path(name) / "model")) for name in config.average.of]
        for key, name in named:
            if any(Path(name).resolve().is_relative_to(path) for path in ours):
                raise InputError(
                    f"--overwrite: {key} {name} lies in the run that would be replaced; name "
                    f"another output_dir"
                )

    def _check_same(self, config: Config) -> None:
        before, now = map(_deciding, (read_yaml(self.config), config_values(config)))
        keys = (before.keys() | now.keys()) - {"output_dir"}  # a run folder may be moved
        changed = sorted(key for key in keys if before.get(key) != now.get(key))
        if changed:
            raise InputError(
                f"--resume: {self.path} was started with another {', '.join(changed)} "
                f"({self.config}); use the config it was started with, or --overwrite"
            )


def _deciding(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a config whether features are kept, which changes no result.

    Kept in another type than they are computed in, they are rounded.
    """
    cache = values.get("feature_cache", {})
    if "dtype" in cache:
        return values
    own = {name: value for name, value in cache.items() if name not in ("mode", "limit")}
    return values | {"feature_cache": own}


def describe_environment(processes: int, fingerprint: str) -> dict[str, Any]:
    """Return versions, hardware, number of processes, git commit and data fingerprint."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in _PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu_threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "num_processes": processes,
        "git_commit": _git_commit(),
        "data_fingerprint": fingerprint,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the working directory, with `+changes` where it has been edited."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
