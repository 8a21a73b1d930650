"""A fine-tune, in the six steps that a practitioner would list."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfft.allocator import keep_freed_memory
from hfft.config import Config
from hfft.config_file import check_config, load_config
from hfft.errors import InputError
from hfft.folder import RunFolder, describe_environment
from hfft.hub import push, write_card
from hfft.plan import Plan, make_plan
from hfft.processes import has_accelerator, join_processes
from hfft.retention import Retention
from hfft.subject import make_task
from hfft.task import Task
from hfft.trial import TrialRun

logger = logging.getLogger("hfft")


@dataclass(frozen=True)
class RunResult:
    """What a run came to: the contents of metrics.json, where the model is, and its task."""

    metrics: dict[str, Any]
    model_dir: Path
    task: Task

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages' entries of metrics.json."""
        stages: list[dict[str, Any]] = self.metrics["stages"]
        return stages


def train(
    config: str | Path | Config,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Fine-tune as a config says.

    Args:
        config: the path of a YAML file, or a Config.
        overrides: dotted assignments such as `training.max_steps=100`; only with a path.
        resume: go on where a stopped run of the same output_dir was.
        overwrite: replace a run of the same output_dir.

    Raises:
        InputError: the config, the data or the model is wrong; nothing has been written.
        RunFailedError: the run broke off; `resume` goes on from its last checkpoint.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        raise InputError("overrides go with the path of a config, not with a Config")
    else:
        check_config(config)
    started = time.monotonic()
    processes = join_processes(config.training.get("ddp_timeout", 1800))
    if not has_accelerator():
        keep_freed_memory()
    folder = RunFolder(config.output_dir)
    folder.check(config, processes.num_processes, resume=resume, overwrite=overwrite)
    if resume and folder.metrics.exists():
        logger.info("%s is complete; nothing to resume", folder.path)
        metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
        return RunResult(metrics, folder.model, make_task(config.task))

    plan = make_plan(config)  # 1. check everything
    if resume:
        folder.check_data(plan.fingerprint)
    processes.wait_for_everyone()
    if processes.is_main_process:  # 2. claim the folder
        environment = describe_environment(processes.num_processes, plan.fingerprint)
        folder.open(config, environment, overwrite=overwrite)
    processes.wait_for_everyone()
    for note in plan.notes:
        logger.info(note)

    retention: Retention | None = None
    if plan.retention is not None:
        retention = Retention(config, plan.retention, folder.retention)
    trials = [TrialRun(plan, plan.main, folder, retention)]
    trials += [TrialRun(plan, trial, folder) for trial in plan.baselines]
    try:
        if retention is not None:
            retention.before()
        results = {run.trial.name: run.result() for run in trials}  # 3. train, 4. score
    except InputError:
        if processes.is_main_process:
            folder.abandon()
        raise
    seconds = time.monotonic() - started + sum(run.spent_before for run in trials)
    metrics = _metrics(plan, results, seconds)
    if config.average is not None:
        metrics["average"] = results["main"]["average"]
    if retention is not None:
        metrics["retention"] = retention.compared(results["main"]["retention"])
    if processes.is_main_process:  # 5. write what came of it
        write_card(folder.model, plan, metrics)
        folder.close(metrics)
        if config.hub is not None:  # 6. push
            hub = config.hub
            push(folder.path, hub.repo_id, private=hub.private, code=hub.code)
    processes.wait_for_everyone()
    return RunResult(metrics, folder.model, plan.task)


def _metrics(plan: Plan, results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    main = results["main"]
    scores = {t.name: {k: results[t.name][k] for k in ("eval", "test")} for t in plan.baselines}
    return {
        "task": plan.task.name,
        "model": plan.config.model.name,
        "seed": plan.config.seed,
        "seconds": round(seconds, 3),
        "eval": main["eval"],
        "test": main["test"],
        "baselines": scores or None,
        "stages": main["stages"],
    }
