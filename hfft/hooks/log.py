"""One line of JSON a log event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LogCallback(TrainerCallback):
    """Append the Trainer's log events to a file, from the main process alone.

    Args:
        path: the file; lines are added to it.
        labels: put into every line, so that stages can be told apart.
    """

    def __init__(self, path: Path, **labels: str) -> None:
        self.path = path
        self.labels = labels

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one event."""
        if state.is_world_process_zero and logs:
            line = {**self.labels, "step": state.global_step, **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def drop_unfinished(path: Path, step: int, **labels: str) -> None:
    """Remove the events beyond a step, which a resumed stage is about to repeat."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:  # cut off when the run was killed
            continue
        if event["step"] <= step or any(event.get(key) != labels[key] for key in labels):
            kept.append(line)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
