"""What fine-tuning forgets: a second task, scored with the source and with what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hfft.checkpoints import write_json
from hfft.config import Config
from hfft.errors import InputError
from hfft.labels import listing
from hfft.processes import join_processes
from hfft.scoring import score_split
from hfft.source import body_in_common, hand_on, load_weights
from hfft.subject import Subject, read_scored

Scores = dict[str, float]
"""A loss and a task's metrics, by name."""


def plan_retention(config: Config, trained: Subject) -> Subject | None:
    """Check what is scored before and after; None: nothing is.

    Args:
        config: the run's.
        trained: what the run learns in the end.

    Raises:
        InputError: data or task are wrong, or the source has no head for it, so that there is no
            score before; or its model has no body in common with the one that is trained.
    """
    if config.retention is None:
        return None
    retained = config.retention
    subject = read_scored(config, retained.task, retained.data, "retention: ")
    model, name = subject.skeleton, config.model.name
    if subject.new:
        of_classes = f" of {listing(subject.labels)}" if subject.labels else ""
        raise InputError(
            f"retention.task: {subject.task.name}{of_classes}: {name} lacks "
            f"{len(subject.new)} weights of a {type(model).__name__}, first "
            f"{min(subject.new)}, so it can't do that before it is fine-tuned; name a task that it "
            f"was trained for, and data with its classes"
        )
    try:
        body_in_common(trained.skeleton, model)
    except InputError as error:
        raise InputError(
            f"retention.task: {subject.task.name}: {error}, so what is trained says nothing of it; "
            f"name a task on the same body"
        ) from error
    return subject


class Retention:
    """Scores what the source can do: as it is, and with the weights of a fine-tuned model.

    The model scored is the source's own, with the head that the source has for the task. A
    fine-tuned model gives it its body; its head too, where that is one of the same class, for the
    same classes (the same task on other data, a zero-shot task). Training a classifier of other
    classes replaces the source's head: what is then scored after is the source's head on the
    fine-tuned body.

    Args:
        config: the run's.
        subject: what `plan_retention` found.
        kept: the file that keeps the scores before, for a run that is resumed.
    """

    def __init__(self, config: Config, subject: Subject, kept: Path) -> None:
        self.config, self.subject, self._kept = config, subject, kept
        assert config.retention is not None
        self._data = config.retention.data.path
        self.metric = subject.task.metric
        self._before: Scores | None = None

    def before(self) -> Scores:
        """Return the source's scores, computed once a run."""
        if self._before is None and self._kept.exists():
            self._before = json.loads(self._kept.read_text(encoding="utf-8"))
        if self._before is None:
            with torch.random.fork_rng():  # which loading and a Trainer seed
                self._before = self._scores(self._source())
            processes = join_processes()
            if processes.is_main_process:
                self._kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._kept, self._before)
            processes.wait_for_everyone()
        return self._before

    def score(self, model: PreTrainedModel) -> Scores:
        """Return the scores with a fine-tuned model's weights, which are left as they are.

        All processes call it together.

        Args:
            model: of the run's task, without adapters, in no distributed wrapper.
        """
        with torch.random.fork_rng():
            scored = self._source()
            hand_on(self.config.model, model, scored)
            return self._scores(scored)

    def compared(self, after: Scores) -> dict[str, Any]:
        """Return what metrics.json says: both scores, and the change of the main metric."""
        before = self.before()
        return {
            "task": self.subject.task.name,
            "data": self._data,
            "metric": self.metric,
            "before": before,
            "after": after,
            "change": after[self.metric] - before[self.metric],
        }

    def _source(self) -> PreTrainedModel:
        """Return the source's model of the task.

        Raises:
            InputError: it has no head for it, which a Hub id's config did not tell.
        """
        task, source = self.subject.task, self.config.model
        torch.manual_seed(self.config.seed)
        loaded = load_weights(task.auto_model, source, self.subject.model_config)
        if loaded.new_head:
            raise InputError(
                f"retention.task: {task.name}: {loaded.notes[0]}, so there is no score before; "
                f"name a task that {source.name} was trained for"
            )
        return loaded.model

    def _scores(self, model: PreTrainedModel) -> Scores:
        subject = self.subject
        return score_split(
            subject.task,
            model,
            subject.examples["validation"],
            transform=subject.transforms["evaluation"],
            collate=subject.collate,
            training=self.config.training,
            seed=self.config.seed,
        ).scores
