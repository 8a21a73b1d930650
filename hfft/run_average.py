"""The average at a run's end: candidates are scored, and the chosen one is what the run leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hfft.adapters import inject, merge
from hfft.average_plan import member_source
from hfft.averaging import (
    Weights,
    interpolate,
    load_weights_into,
    uniform,
    weights_of,
    with_one_more,
)
from hfft.errors import InputError, RunFailedError
from hfft.hooks.ema import FILE
from hfft.plan import Plan
from hfft.sections import EmaAverage, SoupAverage, WiseFtAverage
from hfft.source import load_weights
from hfft.stage_models import StageModels
from hfft.weights_file import load_weights_of

logger = logging.getLogger("hfft")

Scores = dict[str, float]
"""A loss and a task's metrics, by name."""
Member = tuple[str, Callable[[], Weights]]
"""A model that goes into a soup: its name, and what reads its weights."""
Candidate = dict[str, Any]
"""As metrics.json has it: what tells it from others, and its scores."""

_SCORES = {"eval", "held_back"}


class HeldBack(Protocol):
    """What a model is scored by beside its own task; it chooses nothing."""

    metric: str

    def score(self, model: PreTrainedModel) -> Scores:
        """Return its scores with a model's weights."""


class RunAverage:
    """Puts an average in the place of the weights that a run's last stage ended with.

    Every process computes the same candidates, one at a time, and they score each together. What
    chooses is the task's metric on validation; test is scored, and chooses nothing.

    Args:
        plan: of a run with a section `average`.
        models: of the main trial.
        model: as the last stage left it, without adapters.
        score: scores it as it is on a split; None: there is no such split.
        held_back: a second score of each candidate.
    """

    def __init__(
        self,
        plan: Plan,
        models: StageModels,
        model: PreTrainedModel,
        score: Callable[[str], Scores | None],
        held_back: HeldBack | None = None,
    ) -> None:
        self.plan, self._models, self._model = plan, models, model
        self._score, self._held_back = score, held_back
        self._last = len(plan.main.stages) - 1
        self._checkpoints = models.checkpoints(self._last)

    def changes(self, names: Collection[str]) -> bool:
        """Whether weights of these names may differ from those that the last stage had."""
        match self.plan.config.average:
            case WiseFtAverage():
                return not set(names) <= self._models.untouched(self._last)
            case SoupAverage(of=of):
                return of != "checkpoints" and bool(names)
        return False

    def run(self) -> dict[str, Any]:
        """Leave the chosen weights in the model; return what metrics.json says of it."""
        average = self.plan.config.average
        assert average is not None
        before = {**self._scored(), "test": self._score("test")}
        match average:
            case WiseFtAverage(alphas=alphas):
                candidates, chosen = self._interpolated(alphas)
            case SoupAverage(kind="uniform_soup", of=of):
                candidates, chosen = self._uniform(self._members(of))
            case SoupAverage(of=of):
                candidates, chosen = self._greedy(self._members(of))
            case EmaAverage(decay=decay):
                load_weights_into(self._model, self._read(self._checkpoints.folder / FILE))
                chosen = {"decay": decay, **self._scored()}
                candidates = [chosen]
        [key] = chosen.keys() - _SCORES
        return {
            "kind": average.kind,
            "chosen": chosen[key],
            "metric": self.plan.task.metric,
            "held_back_metric": self._held_back.metric if self._held_back is not None else None,
            "candidates": candidates,
            "before": before,
        }

    def _interpolated(self, alphas: Iterable[float]) -> tuple[list[Candidate], Candidate]:
        """Score weights between the source's and these; of equal ones take the nearest to it."""
        source = self._source()
        tuned = _copied(self._model, leave_out=self._models.untouched(self._last))
        candidates = []
        for alpha in sorted(alphas):
            load_weights_into(self._model, interpolate(source, tuned, alpha))
            candidates.append({"alpha": alpha, **self._scored()})
            self._tell(f"alpha {alpha:g}", candidates[-1])
        chosen = max(candidates, key=self._goodness)  # the first of the best
        load_weights_into(self._model, interpolate(source, tuned, chosen["alpha"]))
        return candidates, chosen

    def _uniform(self, members: list[Member]) -> tuple[list[Candidate], Candidate]:
        """Take the mean of all members."""
        load_weights_into(self._model, uniform(read() for _, read in members))
        soup = {"members": [name for name, _ in members], **self._scored()}
        return [soup], soup

    def _greedy(self, members: list[Member]) -> tuple[list[Candidate], Candidate]:
        """Start from the best member, and add from the better to the worse what doesn't harm."""
        alone = []
        for name, read in members:
            load_weights_into(self._model, read())
            alone.append({"members": [name], **self._scored()})
            self._tell(name, alone[-1])
        order = sorted(range(len(members)), key=lambda n: self._goodness(alone[n]), reverse=True)
        soup, chosen, candidates = members[order[0]][1](), alone[order[0]], [*alone]
        for number in order[1:]:
            name, read = members[number]
            larger = with_one_more(soup, read(), len(chosen["members"]))
            load_weights_into(self._model, larger)
            candidate = {"members": [*chosen["members"], name], **self._scored()}
            candidates.append(candidate)
            self._tell(f"and {name}", candidate)
            if self._goodness(candidate) >= self._goodness(chosen):
                soup, chosen = larger, candidate
        load_weights_into(self._model, soup)
        return candidates, chosen

    def _members(self, of: str | tuple[str, ...]) -> list[Member]:
        """Return what a soup is made of: this run's model first, or its checkpoints in order."""
        if isinstance(of, str):
            checkpoints = self._checkpoints.whole()
            if not checkpoints:
                raise RunFailedError(
                    f"average: {self._checkpoints.folder} holds no whole checkpoint to average"
                )
            return [(p.name, partial(self._read, p / "model.safetensors")) for p in checkpoints]
        own = _copied(self._model)
        others = [(name, partial(self._of_run, name, number)) for number, name in enumerate(of)]
        return [(self.plan.config.output_dir, lambda: own), *others]

    def _of_run(self, folder: str, number: int) -> Weights:
        """Read the weights of another run's model."""
        config, subject, place = self.plan.config, self.plan.subject, f"average.of.{number}"
        source = member_source(folder, place, config)
        loaded = load_weights(subject.task.auto_model, source, subject.model_config)
        if loaded.new_head:
            raise InputError(f"{place}: {folder}: {loaded.notes[0]}; name a run of this task")
        return weights_of(loaded.model)

    def _read(self, file: Path) -> Weights:
        """Read what learned in the last stage, with its adapter merged as the stage's end was."""
        planned = self.plan.main.stages[self._last]
        if planned.stage.lora is None:
            return load_file(file)
        model, _ = self._models.entered(self._last)
        seed = self.plan.config.seed + self._last
        inject(model, planned.stage.lora, planned.subject.groups.head.parameters, seed=seed)
        load_weights_of(model, file)
        merge(model)
        return weights_of(model)

    def _source(self) -> dict[str, Tensor]:
        """Return theta_s, without buffers of modules that are new: a head is not in the source."""
        found = self._models.source(self._last, "original")
        parameters = dict(self._model.named_parameters())
        new = {name.rpartition(".")[0] for name in parameters if name not in found}
        return {
            name: tensor
            for name, tensor in found.items()
            if name in parameters or name.rpartition(".")[0] not in new
        }

    def _scored(self) -> Candidate:
        """Score the model as it is."""
        held_back = None
        if self._held_back is not None:
            held_back = self._held_back.score(self._model)[self._held_back.metric]
        # one process decides for all, whatever the last bit of a score is on another
        found = [{"eval": self._score("validation"), "held_back": held_back}]
        return dict(broadcast_object_list(found)[0])

    def _goodness(self, candidate: Candidate) -> float:
        """Return the metric that chooses, more being better; of what is no number, the least."""
        task = self.plan.task
        value = float(candidate["eval"][task.metric])
        if math.isnan(value):
            return -math.inf
        return -value if task.metric in ("loss", *task.lower_is_better) else value

    def _tell(self, what: str, candidate: Candidate) -> None:
        metric = self.plan.task.metric
        logger.info("average, %s: validation %s %.4f", what, metric, candidate["eval"][metric])


def _copied(model: PreTrainedModel, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a model's weights, copied to the CPU's memory."""
    own = weights_of(model)
    return {n: tensor.to("cpu", copy=True) for n, tensor in own.items() if n not in leave_out}
