"""A strategy name expands to a list of stages, and to nothing else.

Every function here is pure: options and layer groups in, stages out. `hfft plan` prints what comes
out as YAML that can be pasted under `stages`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hfft.complaints import nearest
from hfft.config import Frozen, Full, Gradual, Lora, LpFt, Stage, StageFields, StrategyConfig
from hfft.errors import InputError
from hfft.layers import LayerGroups

DEFAULT_EPOCHS = 3.0  # of transformers.TrainingArguments, where a config names no length


def expand(
    strategy: StrategyConfig, groups: LayerGroups, total_epochs: float | None
) -> list[Stage]:
    """Turn a strategy into stages.

    Args:
        strategy: the name and its options.
        groups: the model's layer groups.
        total_epochs: `training.num_train_epochs` where the config sets it.

    Raises:
        InputError: the strategy needs an order of layers that the model doesn't have.
    """
    match strategy:
        case Frozen():
            return [_stage(strategy, name="head", freeze="backbone")]
        case Full():
            return [_stage(strategy, name="whole", freeze="none")]
        case LpFt():
            return _lp_ft(strategy, total_epochs)
        case Gradual():
            return _gradual(strategy, groups, total_epochs)
        case Lora():
            lora = {**(strategy.model_extra or {}), **({"merge": True} if strategy.merge else {})}
            return [_stage(strategy, name="lora", freeze="backbone", lora=lora)]


def _stage(options: StageFields, **fields: Any) -> Stage:
    """Make a stage of a strategy's stage fields, some of them replaced."""
    kept = options.model_dump(include=set(StageFields.model_fields), exclude_none=True)
    return Stage.model_validate({**kept, **fields})


def _lp_ft(options: LpFt, total_epochs: float | None) -> list[Stage]:
    """Head first, then everything, together as long as the strategy: half each by default."""
    head: float
    whole: float
    if options.steps is not None:
        unit, whole = "steps", options.steps
        head = max(1, options.steps // 2)
    else:
        unit, whole = "epochs", options.epochs or total_epochs or DEFAULT_EPOCHS
        head = options.head_epochs or whole / 2
    if head >= whole:
        raise InputError(
            f"strategy: the head takes {head:g} of {whole:g} {unit}, and nothing is left to "
            f"fine-tune everything; lower head_epochs, or raise {unit}"
        )
    rate = options.head_learning_rate
    probe = {} if rate is None else {"learning_rate": rate}
    lengths = [{"epochs": None, "steps": None, unit: part} for part in (head, whole - head)]
    return [
        _stage(options, **{**lengths[0], **probe, "name": "head", "freeze": "backbone"}),
        _stage(options, **{**lengths[1], "name": "whole", "freeze": "none"}),
    ]


def _gradual(options: Gradual, groups: LayerGroups, total_epochs: float | None) -> list[Stage]:
    """Head first, then `groups_per_step` more groups a stage, from the top of every tower.

    Towers with a `freeze` of their own keep it: locked-image tuning (Zhai et al. 2022) thaws the
    text tower alone.
    """
    groups.require_order("strategy gradual")
    fixed = options.of_towers("freeze")
    free = {name: body for name, body in groups.towers.items() if name not in fixed}
    if not free:
        raise InputError(
            "strategy.towers: each tower has a freeze of its own, and none is left to thaw group "
            "by group; leave freeze out of one, or take strategy full"
        )
    groups = replace(groups, towers=free)
    in_the_end = _groups_to_thaw(options.last_group, groups)
    thawed = [*range(0, in_the_end, options.groups_per_step), in_the_end]
    lengths = _lengths(options, len(thawed), total_epochs)
    rates = {} if options.rate_decay is None else {"layer_decay": options.rate_decay}
    return [
        _stage(
            options,
            name="head" if not count else "whole" if count == groups.depth else f"top-{count}",
            **_all_but_the_top(count, groups, options),
            **{"epochs": None, "steps": None, **length, **rates},
        )
        for count, length in zip(thawed, lengths, strict=False)
    ]


def _groups_to_thaw(last_group: str | int, groups: LayerGroups) -> int:
    """Return how many groups thaw, from the top down to the last one, which is among them."""
    if isinstance(last_group, int):
        if not 0 <= last_group < groups.depth:
            raise InputError(
                f"strategy.last_group: {last_group} is not a number from 0 to {groups.depth - 1}"
            )
        return groups.depth - last_group
    for body in groups.towers.values():
        for number, group in enumerate(body):
            if group.name == last_group:
                return len(body) - number
    names = [group.name for body in groups.towers.values() for group in body]
    raise InputError(f"strategy.last_group: no group {last_group!r}{nearest(last_group, names)}")


def _lengths(options: Gradual, stages: int, total_epochs: float | None) -> list[dict[str, Any]]:
    """Share the whole length out: a fixed length a stage, and what is left to the last one."""
    per_stage: float
    whole: float | None
    if options.steps_per_group is not None or options.steps is not None:
        unit, whole = "steps", options.steps
        per_stage = options.steps_per_group or max(1, (options.steps or 0) // stages)
    else:
        unit, whole = "epochs", options.epochs or total_epochs
        per_stage = options.epochs_per_group or 1.0
    if whole is None:
        return [{unit: per_stage}] * stages
    fitting = min(stages, math.ceil(round(whole / per_stage, 6)))  # 2.1 / 0.7 is a bit above 3
    last = round(whole - per_stage * (fitting - 1), 6)
    return [{unit: per_stage}] * (fitting - 1) + [{unit: last}]


def _all_but_the_top(count: int, groups: LayerGroups, options: StageFields) -> dict[str, Any]:
    """Return the fields that leave the top `count` groups of every tower of `groups` learning."""
    if count == 0:
        return {"freeze": "backbone"}
    if count == groups.depth:
        return {"freeze": "none"}
    if all(len(body) == groups.depth for body in groups.towers.values()):
        return {"freeze": groups.depth - count}
    towers = options.model_dump(include={"towers"}, exclude_none=True).get("towers", {})
    for name, body in groups.towers.items():
        left = max(0, len(body) - count)
        towers[name] = {**towers.get(name, {}), "freeze": left or "none"}
    return {"freeze": "none", "towers": towers}
