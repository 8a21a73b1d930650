"""Progress on standard error: stage, step, loss, metric, time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressCallback(TrainerCallback):
    """A bar for each stage; nothing where standard error is not a terminal.

    Args:
        title: what the bar is called.
        metric: the metric shown beside the loss, by its name without `eval_`.
    """

    def __init__(self, title: str, metric: str) -> None:
        self.title = title
        self._names = {"loss": "loss", f"eval_{metric}": metric}
        self._shown: dict[str, str] = {}
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step the stage starts from."""
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on by one optimizer step."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss and the newest metrics."""
        if self._bar is not None and logs:
            newest = {n: f"{logs[key]:.4g}" for key, n in self._names.items() if key in logs}
            self._shown |= newest
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
