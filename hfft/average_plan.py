"""What of `average` depends on the model, its stages and other runs, checked before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hfft.averaging import decay_at
from hfft.config import Config
from hfft.errors import InputError
from hfft.sections import EmaAverage, ModelConfig, SoupAverage, WiseFtAverage
from hfft.source import read_model_config, skeleton
from hfft.subject import Subject
from hfft.yaml_file import read_yaml

if TYPE_CHECKING:
    from hfft.plan import PlannedStage


def check_average(config: Config, subject: Subject, stages: Sequence[PlannedStage]) -> list[str]:
    """Check that what is to be averaged will be there, and is alike.

    Args:
        config: the run's.
        subject: what it learns in the end.
        stages: of the fine-tune, at least one.
    """
    average, problems = config.average, list[str]()
    if average is None:
        return problems
    if isinstance(average, EmaAverage) and config.training.get("load_best_model_at_end"):
        problems.append(
            "average: ema goes to the last step, training.load_best_model_at_end to the best; keep "
            "one of them"
        )
    if kept := [one for one in stages if one.stage.lora and not one.stage.lora.get("merge", False)]:
        problems.append(
            f"average: the adapter of stage {kept[0].stage.name} is kept apart, and would not be "
            f"that of the averaged weights; set merge: true beside its fields"
        )
    if isinstance(average, WiseFtAverage) and not any(map(_moves_the_source, stages)):
        problems.append(
            "average: wise_ft: no stage changes a weight of the source, so there is nothing "
            "between it and what is fine-tuned; let more than a new head learn, or leave it out"
        )
    if isinstance(average, SoupAverage) and average.of == "checkpoints":
        problems += _check_checkpoints(config, stages[-1])
    elif isinstance(average, SoupAverage):
        for number, folder in enumerate(average.of):
            try:
                _check_member(folder, f"average.of.{number}", config, subject)
            except InputError as error:
                problems += error.messages
    return problems


def average_notes(config: Config, stages: Sequence[PlannedStage]) -> list[str]:
    """Say what makes an average of little use."""
    average, notes = config.average, list[str]()
    if isinstance(average, EmaAverage):
        steps = stages[-1].steps
        decays = (decay_at(n, average.decay, warmup=average.warmup) for n in range(1, steps + 1))
        if (left := math.prod(decays)) > 0.1:
            notes.append(
                f"average: after {steps} steps at a decay of {average.decay:g}, {left:.0%} of the "
                f"average is what the stage starts with; lower average.decay, or set warmup: true"
            )
    if isinstance(average, SoupAverage) and average.of != "checkpoints":
        for folder in average.of:
            source = _source_of(Path(folder))
            if source is not None and source != config.model.name:
                notes.append(
                    f"average: {folder} was fine-tuned from {source}, this run from "
                    f"{config.model.name}; the mean of weights with different sources is seldom "
                    f"better than either"
                )
    return notes


def told_average(config: Config, metric: str, stages: Sequence[PlannedStage]) -> list[str]:
    """Describe the average in a line; none: there is none.

    Args:
        config: the run's.
        metric: that chooses, on validation.
        stages: of the fine-tune.
    """
    match config.average:
        case WiseFtAverage(alphas=alphas):
            what = (
                f"wise_ft, the best of {len(alphas)} weights between the source's and the "
                f"fine-tuned ones, by {metric} on validation"
            )
        case SoupAverage(kind=kind, of="checkpoints"):
            count = _checkpoints(config, stages[-1])
            how = f", by {metric} on validation" if kind == "greedy_soup" else ""
            many = f"the last {count}" if count is not None else "those"
            what = f"{kind} of {many} checkpoints that stage {stages[-1].stage.name} keeps{how}"
        case SoupAverage(kind=kind, of=folders):
            how = f", by {metric} on validation" if kind == "greedy_soup" else ""
            what = f"{kind} of this run and {', '.join(folders)}{how}"
        case EmaAverage(decay=decay, warmup=warmup):
            what = f"ema of stage {stages[-1].stage.name}, decay {decay:g}" + (
                ", reached by warmup" if warmup else ""
            )
        case _:
            return []
    return [f"Average: {what}"]


def member_source(folder: str, place: str, config: Config) -> ModelConfig:
    """Return the model of a finished run, or of a model folder, as a source of weights.

    Raises:
        InputError: there is no model.
    """
    path = Path(folder)
    inner = path / "model"
    if not (inner / "config.json").is_file() and not (path / "config.json").is_file():
        why = (
            "the run has no model yet; finish it: hfft train --resume"
            if (path / "config.yaml").is_file()
            else "is neither a run folder (config.yaml) nor a model folder"
        )
        raise InputError(f"{place}: {folder}: {why}")
    found = inner if (inner / "config.json").is_file() else path
    trust = config.model.trust_remote_code
    source = ModelConfig(name=str(found), trust_remote_code=trust)
    source._place = place
    return source


def _moves_the_source(planned: PlannedStage) -> bool:
    """Whether more than what is new learns in a stage."""
    subject = planned.subject
    return planned.stage.lora is not None or bool(
        subject.sizes.keys() - subject.new - planned.frozen
    )


def _check_checkpoints(config: Config, last: PlannedStage) -> list[str]:
    count = _checkpoints(config, last)
    if count is None or count > 1:
        return []
    return [
        f"average.of: checkpoints: stage {last.stage.name}, the last one, keeps {count}, and a "
        f"soup is of two or more; set training.save_strategy: steps and lower training.save_steps"
    ]


def _checkpoints(config: Config, last: PlannedStage) -> int | None:
    """Return how many checkpoints the last stage will keep; None: that depends on its scores."""
    training = config.training
    strategy = str(training.get("save_strategy", "epoch"))
    every = float(training.get("save_steps", 500))
    written = {
        "no": 0,
        "epoch": math.ceil(last.epochs),
        "steps": math.ceil(1 / every if every < 1 else last.steps / every),
    }
    if strategy not in written:
        return None
    return min(written[strategy], max(2, training.get("save_total_limit") or 2))


def _check_member(folder: str, place: str, config: Config, subject: Subject) -> None:
    """Compare a finished run's model with the one that is trained.

    Raises:
        InputError: there is none, or its weights are others by name or shape, or its classes are.
    """
    source = member_source(folder, place, config)
    own, theirs = subject.model_config, read_model_config(source)
    if theirs.model_type != own.model_type:
        raise InputError(f"{place}: {folder} holds a {theirs.model_type}, not a {own.model_type}")
    if subject.labels and theirs.id2label != own.id2label:
        names = ", ".join([name for _, name in sorted((theirs.id2label or {}).items())][:10])
        raise InputError(f"{place}: {folder} has other classes than this run's: {names}")
    model = skeleton(subject.task.auto_model, theirs, source.trust_remote_code)
    if difference := _difference(_shapes(model), _shapes(subject.skeleton)):
        raise InputError(
            f"{place}: {folder}: {difference}; weights can be averaged only where the "
            f"architecture is the same"
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _difference(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say what is the first thing that two models don't have in common; "": nothing."""
    for name in own:
        if name not in theirs:
            return f"lacks {name}, which this run's model has"
        if theirs[name] != own[name]:
            return f"{name} is {theirs[name]} there, and {own[name]} in this run"
    more = [name for name in theirs if name not in own]
    return f"has {more[0]}, which this run's model lacks" if more else ""


def _source_of(folder: Path) -> str | None:
    """Return what a run was fine-tuned from, where its folder says so."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    model = read_yaml(path).get("model")
    return model.get("name") if isinstance(model, dict) else model
