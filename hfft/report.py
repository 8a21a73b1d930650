"""What a person reads: plans and results as tables on standard output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from hfft.average_plan import told_average
from hfft.average_scores import average_told
from hfft.layers import LayerGroups
from hfft.plan import Plan, PlannedStage, Trial
from hfft.subject import Subject
from hfft.table import table
from hfft.task import Task


def plan_report(plan: Plan) -> str:
    """Describe a checked run: data, labels, groups, stages."""
    parts = [
        *map(partial(_subject, plan), dict.fromkeys(stage.subject for stage in plan.main.stages)),
        *_retained(plan),
        *plan.notes,
        _groups(plan.subject),
        _stages((plan.main, *plan.baselines)),
        _features((plan.main, *plan.baselines)),
        *told_average(plan.config, plan.task.metric, plan.main.stages),
        *_penalties(plan),
        "The stages as YAML:\n\n" + stages_yaml(plan.main),
    ]
    return "\n\n".join(parts)


def stages_yaml(trial: Trial) -> str:
    """Return a trial's stages as they can be pasted into a config."""
    stages = [
        {"name": planned.stage.name}
        | planned.stage.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
        for planned in trial.stages
    ]
    return yaml.safe_dump({"stages": stages}, sort_keys=False, allow_unicode=True)


def result_report(task: Task, metrics: Mapping[str, Any], model_dir: object) -> str:
    """Describe a finished run: stages, scores beside the baselines', what to make of them."""
    metric = task.metric
    stages = [
        (
            stage["name"],
            stage["steps"],
            f"{stage['trainable_parameters']:,}",
            f"{stage['seconds']:.1f}",
            stage["eval"][metric] if metric in stage["eval"] else _scores(stage["eval"]),
        )
        for stage in metrics["stages"]
    ]
    parts = [table(("stage", "steps", "learning", "seconds", f"validation {metric}"), stages)]
    names = [name for name in metrics["eval"] if name in task.metric_names]
    split = "test" if metrics["test"] else "eval"
    trials = {"fine-tuned": metrics, **(metrics["baselines"] or {})}
    scores = [(name, *(trial[split][key] for key in names)) for name, trial in trials.items()]
    shown = "validation" if split == "eval" else split
    parts.append(table(("", *(f"{shown} {name}" for name in names)), scores))
    parts += [average_told(metrics["average"])] if "average" in metrics else []
    parts += comparison(task, metrics)
    parts += retained(metrics)
    parts.append(f"The model is in {model_dir}")
    return "\n\n".join(parts)


def _scores(found: Mapping[str, float]) -> str:
    """Name the scores of a stage that has a task of its own."""
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if name != "loss")


def comparison(task: Task, metrics: Mapping[str, Any]) -> list[str]:
    """Return a plain sentence for each baseline that fine-tuning did not beat."""
    metric = task.metric
    better = -1 if metric in task.lower_is_better else 1
    split = "test" if metrics["test"] else "eval"
    own = metrics[split][metric]
    meaning = {
        "scratch": "the same network trained from scratch: the source's weights did not help here",
        "frozen": "the frozen source with a new head: changing the source's weights did not help",
    }
    return [
        f"Fine-tuning ({own:.4f}) did not beat {meaning.get(name, name)} "
        f"({scores[split][metric]:.4f} {metric})."
        for name, scores in (metrics["baselines"] or {}).items()
        if better * own <= better * scores[split][metric]
    ]


def retained(metrics: Mapping[str, Any]) -> list[str]:
    """Return a sentence on what was forgotten, where a run scores that."""
    if (found := metrics.get("retention")) is None:
        return []
    metric = found["metric"]
    return [
        f"Retention, {found['task']} on {found['data']}: {metric} {found['after'][metric]:.4f}, "
        f"of the source {found['before'][metric]:.4f} ({found['change']:+.4f})."
    ]


def _retained(plan: Plan) -> list[str]:
    """Say what is scored before and after."""
    if plan.retention is None:
        return []
    return ["Scored before and after, for what is forgotten:\n\n" + _subject(plan, plan.retention)]


def _subject(plan: Plan, subject: Subject) -> str:
    """Say what is learned, of what data; a stage's own task first."""
    lines = [
        f"task    {subject.task.name}",
        f"model   {plan.config.model.name} ({subject.groups.model_name}, "
        f"{sum(subject.sizes.values()):,} parameters)",
        f"data    {_splits(subject)}",
    ]
    if names := subject.labels:
        shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        lines.append(f"labels  {len(names)}: {shown}")
    return "\n".join(lines)


def _splits(subject: Subject) -> str:
    """Count the examples, and where there are tokens these too."""
    told = []
    for name, examples in subject.examples.items():
        rows = len(subject.data.splits[name])
        counted = "" if len(examples) == rows else f" in {len(examples):,} rows"
        if examples.lengths is not None:
            counted += f" of {int(examples.lengths.sum()):,} tokens"
        told.append(f"{rows:,} {name}{counted}")
    return ", ".join(told)


def _groups(subject: Subject) -> str:
    rows: list[tuple[object, ...]] = []
    sizes = subject.sizes
    for tower, groups in subject.groups.towers.items():
        for number, group in enumerate(groups):
            size = sum(sizes[name] for name in group.parameters)
            rows.append((number, tower, group.name, f"{size:,}"))
    size = sum(sizes[name] for name in subject.groups.head.parameters)
    rows.append(("", "", subject.groups.head.name, f"{size:,}"))
    order = "" if subject.groups.ordered else " (no order could be found: freeze by patterns)"
    return f"Layer groups, from the input{order}:\n\n" + table(
        ("", "tower", "group", "parameters"), rows
    )


def _stages(trials: Sequence[Trial]) -> str:
    rows = [
        (
            trial.name,
            planned.stage.name,
            _freeze(planned),
            f"{planned.trainable_parameters:,}",
            f"{planned.total_parameters:,}",
            _rate(planned),
            f"{planned.epochs:.4g}",
            planned.steps,
        )
        for trial in trials
        for planned in trial.stages
    ]
    heads = ("run", "stage", "freeze", "learning", "parameters", "rate", "epochs", "steps")
    return "Stages:\n\n" + table(heads, rows)


def _features(trials: Sequence[Trial]) -> str:
    """Say what becomes of each stage's frozen layers."""
    lines = [
        f"  {trial.name}, {planned.stage.name}: {planned.features.reason}"
        for trial in trials
        for planned in trial.stages
        if planned.frozen
    ]
    return "\n".join(["Frozen layers:", *(lines or ["  none"])])


def _penalties(plan: Plan) -> Iterator[str]:
    """Say which tensors each penalty covers, in groups of one strength."""
    for planned in plan.main.stages:
        for penalty in planned.penalties:
            kind, sizes = penalty.config.kind, penalty.coverage
            for what, strengths in (("", sizes.to_source), (", to 0", sizes.to_zero)):
                for strength in dict.fromkeys(strengths.values()):
                    names = [name for name, own in strengths.items() if own == strength]
                    yield (
                        f"Stage {planned.stage.name}, penalty {kind}{what}, strength "
                        f"{strength:g}, covers {len(names)} tensors:\n  "
                        + "\n  ".join(_listed(names, planned.groups))
                    )


def _listed(names: Sequence[str], groups: LayerGroups) -> Iterator[str]:
    """Name whole groups, and fold what differs by a number only: `block.*.weight (0, 1, 2)`."""
    folded: dict[str, list[int]] = {}
    left = dict.fromkeys(names)
    for group in groups:
        if set(group.parameters) <= left.keys():
            yield f"{group.name}: all {len(group.parameters)}"
            for name in group.parameters:
                del left[name]
    for name in left:
        parts = name.split(".")
        numbers = [n for n, part in enumerate(parts) if part.isdigit()]
        if not numbers:
            folded.setdefault(name, [])
            continue
        number = int(parts[numbers[0]])
        parts[numbers[0]] = "*"
        folded.setdefault(".".join(parts), []).append(number)
    for name, found in folded.items():
        yield f"{name} ({', '.join(map(str, found))})" if found else name


def _freeze(planned: PlannedStage) -> str:
    """Write what is frozen; where a tower has its own freeze, by tower."""
    freeze, own = planned.stage.freeze, planned.stage.of_towers("freeze")
    whole = ", ".join(map(str, freeze)) if isinstance(freeze, tuple) else str(freeze)
    if not own:
        return whole
    return ", ".join(f"{name} {own.get(name, whole)}" for name in planned.groups.towers)


def _rate(planned: PlannedStage) -> str:
    """Write the learning rate, and those that towers have in its place."""
    own = planned.stage.of_towers("learning_rate")
    return ", ".join(
        [f"{planned.learning_rate:.3g}", *(f"{name} {rate:.3g}" for name, rate in own.items())]
    )
