"""The model on its way through a trial's stages: as it starts, as it is handed on, theta_s."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from hfft.checkpoints import StageCheckpoints
from hfft.folder import RunFolder
from hfft.optim import OptimizerState
from hfft.penalties.coverage import source_tensors
from hfft.plan import Plan, Trial
from hfft.sections import EmaAverage, SoupAverage
from hfft.source import hand_on, initialise, load_weights
from hfft.subject import Subject

logger = logging.getLogger("hfft")


class StageModels:
    """Makes the model that a stage starts with.

    A stage whose task is not that of the stage before goes on with its body, under a head of its
    own: the source's, where it has one that fits, else a new one. Where only the data are others,
    and the classes are the same, the head goes on too.

    Args:
        plan: the run the trial belongs to.
        trial: which of the run's trials.
        folder: where finished stages are kept.
    """

    def __init__(self, plan: Plan, trial: Trial, folder: RunFolder) -> None:
        self.plan, self.trial, self.folder = plan, trial, folder
        self._checked = set[Subject]()

    def checkpoints(self, number: int) -> StageCheckpoints:
        """Return where a stage keeps what a killed run goes on from."""
        return self.folder.stage(self.trial.name, number, self.trial.stages[number].stage.name)

    def entered(self, number: int) -> tuple[PreTrainedModel, OptimizerState]:
        """Return model and optimizer state as a stage starts with them, from what is on disk."""
        stages = self.trial.stages
        if number == 0:
            return self._model(stages[0].subject), OptimizerState()
        model = self._model(stages[number - 1].subject)
        state = self.checkpoints(number - 1).restore(model)
        return self.handed_on(number, model, state)

    def handed_on(
        self, number: int, model: PreTrainedModel, state: OptimizerState
    ) -> tuple[PreTrainedModel, OptimizerState]:
        """Return what a stage makes of what the stage before it ended with."""
        stages = self.trial.stages
        if number == len(stages) or stages[number].subject is stages[number - 1].subject:
            return model, state
        new = self._model(stages[number].subject)
        carried = hand_on(self.plan.config.model, model, new)
        return new, {name: own for name, own in state.items() if name in carried}

    def _model(self, subject: Subject) -> PreTrainedModel:
        """Return the source with a subject's head, which is the same in every process."""
        set_seed(self.plan.config.seed)
        task, source = subject.task, self.plan.config.model
        if self.trial.from_scratch:
            trust = source.trust_remote_code
            model = initialise(task.auto_model, subject.model_config, trust)
        else:
            loaded = load_weights(task.auto_model, source, subject.model_config)
            model = loaded.model
            if self.trial.name == "main":
                for note in loaded.notes:
                    logger.info(note)
        if subject not in self._checked:
            task.check_model(model)
            self._checked.add(subject)
        model.accepts_loss_kwargs = False  # type: ignore[assignment]  # the task has the loss
        return model

    def source(self, number: int, which: Literal["original", "adapted"]) -> dict[str, Tensor]:
        """Return theta_s of a stage by name, read anew.

        Args:
            number: of the stage.
            which: what the source's file holds, shared with it on the CPU; or the body as the
                last stage with another task left it.
        """
        config, subject = self.plan.config, self.trial.stages[number].subject
        with torch.random.fork_rng():  # a new head is drawn on the way, and is not theta_s
            if which == "adapted":
                return source_tensors(self.entered(self._adapted_before(number) + 1)[0])
            torch.manual_seed(config.seed)
            loaded = load_weights(subject.task.auto_model, config.model, subject.model_config)
        return source_tensors(loaded.model)

    def _adapted_before(self, number: int) -> int:
        """Return the last stage before a stage that has another task."""
        stages = self.trial.stages
        return max(n for n in range(number) if stages[n].subject is not stages[number].subject)

    def are_members(self, number: int) -> bool:
        """Whether a stage's checkpoints are what a soup at the end is made of."""
        average = self.plan.config.average
        return (
            isinstance(average, SoupAverage) and average.of == "checkpoints" and self._ends(number)
        )

    def is_smoothed(self, number: int) -> bool:
        """Whether the moving average of a stage's weights is wanted at the end."""
        return isinstance(self.plan.config.average, EmaAverage) and self._ends(number)

    def _ends(self, number: int) -> bool:
        return self.trial.name == "main" and number == len(self.trial.stages) - 1

    def are_wanted(self, number: int, after: int) -> bool:
        """Whether a stage's weights are still to be read once those before `after` are over.

        Penalties of later ones may pull to them, or an adapter that is averaged lie beside them.
        """
        next_one = number + 1
        averaged = self.are_members(next_one) or self.is_smoothed(next_one)
        if averaged and self.trial.stages[next_one].stage.lora is not None:
            return True
        return any(
            penalty.config.source == "adapted" and self._adapted_before(later) == number
            for later in range(after, len(self.trial.stages))
            for penalty in self.trial.stages[later].penalties
        )

    def untouched(self, number: int) -> frozenset[str]:
        """Return the parameters that no stage so far has changed.

        Adapters change frozen ones, and under another task's head they may have other names.
        """
        so_far = self.trial.stages[: number + 1]
        subject = so_far[-1].subject
        if any(one.stage.lora is not None or one.subject is not subject for one in so_far):
            return frozenset()
        return frozenset.intersection(*(stage.frozen for stage in so_far))
