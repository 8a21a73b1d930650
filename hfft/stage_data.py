"""What a stage's Trainer reads: whole examples, or what frozen layers made of them."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hfft.examples import ExampleDataset
from hfft.features.cut import Autocast, Cut
from hfft.features.keys import processor_identity
from hfft.features.prepare import Setting, Wanted, plain, prepare
from hfft.features.stored import Collate
from hfft.hooks.freeze import kept_in_eval
from hfft.plan import Plan, PlannedStage, Trial
from hfft.processes import join_processes
from hfft.subject import Subject

logger = logging.getLogger("hfft")


class StageData:
    """The data of the stage that runs.

    Args:
        plan: the run it belongs to.
        trial: which of the run's trials.
    """

    def __init__(self, plan: Plan, trial: Trial) -> None:
        self.plan, self.trial = plan, trial
        self._features = plain({}, trial.stages[0].subject.collate)
        self._in_use = ExitStack()
        self._proved: dict[Subject, dict[frozenset[str], Cut]] = {}

    @property
    def splits(self) -> dict[str, Dataset[Any]]:
        """The datasets, by split."""
        return self._features.datasets

    @property
    def collate(self) -> Collate:
        """What batches their examples."""
        return self._features.collate

    @property
    def report(self) -> dict[str, Any] | None:
        """What metrics.json says of the feature cache."""
        return self._features.report

    def open(self, number: int, model: PreTrainedModel, args: TrainingArguments) -> None:
        """Have a stage's features ready, and let the model take them until `close`.

        Args:
            number: of the stage.
            model: with `requires_grad` set for it, and not yet wrapped.
            args: the stage's.
        """
        planned, examples = self.trial.stages[number], self._examples(number)
        wanted, subject = planned.features, planned.subject
        self._features = plain(examples, subject.collate)
        scored_only = self._is_merged(planned, model)
        if not wanted.splits or scored_only:
            if planned.frozen and self.plan.config.feature_cache.mode == "on":
                logger.warning(f"{planned.stage.name}: the frozen layers are {wanted.reason}")
            return
        setting = self._setting(args, subject)
        model.to(setting.processes.device)
        with kept_in_eval(model, adapted=planned.stage.lora is not None):
            own = Wanted(wanted.frozen, wanted.splits)
            later = self._later(number)
            proved = self._proved.setdefault(subject, {})
            self._features = prepare(model, own, later, examples, setting, proved)
        self._in_use.callback(self._features.close)
        self._in_use.enter_context(self._features.replayed(model))

    def _is_merged(self, planned: PlannedStage, model: PreTrainedModel) -> bool:
        """Whether a stage's adapter is part of the weights already: what is left is scoring."""
        return planned.stage.lora is not None and not any(
            name in planned.frozen and ".base_layer." in name
            for name, _ in model.named_parameters()
        )

    def forget_features(self) -> None:
        """Go on with whole examples, which the model takes until `close` too."""
        last = len(self.trial.stages) - 1
        self._features = plain(self._examples(last), self.trial.stages[last].subject.collate)

    def close(self) -> None:
        """Leave the model as it was; nothing may wrap it any more."""
        self._in_use.close()
        self._features = plain({}, self._features.collate)  # lets go of the files

    def _examples(self, number: int) -> dict[str, ExampleDataset]:
        """Return the data as a stage sees it, by split."""
        config, subject, found = self.plan.config, self.trial.stages[number].subject, {}
        for name, own in subject.examples.items():
            training = name == "train"
            transform = subject.transforms["train" if training else "evaluation"]
            views = config.feature_cache.views if training and subject.task.augments else None
            # fixed views are the same in all stages, so that all can read the same features;
            # what evaluation draws is the same too, so that scores can be compared
            seed = config.seed + (number if training and views is None else 0)
            found[name] = ExampleDataset(own.rows, transform, seed, views, own.split)
        return found

    def _later(self, number: int) -> list[Wanted]:
        """Return what later stages store of layers that stay as they are until then."""
        stages = self.trial.stages
        found = []
        for later in range(number + 1, len(stages)):
            features = stages[later].features
            if stages[later].subject is not stages[number].subject:
                break
            between = (stage.frozen for stage in stages[number:later])
            if features.splits and all(features.frozen <= frozen for frozen in between):
                found.append(Wanted(features.frozen, features.splits))
        return found

    def _setting(self, args: TrainingArguments, subject: Subject) -> Setting:
        plan, processes = self.plan, join_processes()
        cache = plan.config.feature_cache
        return Setting(
            identity={
                "task": subject.task.name,
                "options": subject.task.options.model_dump(mode="json"),
                "processor": processor_identity(subject.processor),
            },
            fingerprints=subject.data.fingerprints,
            description={"model": plan.config.model.name},
            collate=subject.collate,
            batch_size=args.per_device_train_batch_size,
            autocast=_autocast(args, processes.device.type),
            dtype=None if cache.dtype is None else getattr(torch, cache.dtype),
            limit=cache.limit,
            workers=args.dataloader_num_workers,
            processes=processes,
        )


def _autocast(args: TrainingArguments, device: str) -> tuple[str, Autocast]:
    """Return the precision that the Trainer computes in, and its name.

    `mixed_precision` is that of `bf16` and `fp16`, or of the launcher.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    if dtype is None:
        return args.mixed_precision, nullcontext
    return args.mixed_precision, partial(torch.autocast, device, dtype=dtype)
