"""Reading and writing configs: a YAML file, overrides, and everything that is wrong with them."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hfft import registry
from hfft.complaints import explain
from hfft.config import Config, Lora, Recipe, StageFields, StrategyConfig
from hfft.errors import InputError
from hfft.lora_fields import check_lora
from hfft.penalties.penalty import get as get_penalty
from hfft.penalties.penalty import kinds, make_penalty
from hfft.sections import AverageConfig
from hfft.training_fields import check_choice, check_training
from hfft.yaml_file import apply_override, read_yaml


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, and check every key and value.

    Args:
        path: the YAML file.
        overrides: dotted assignments such as `training.max_steps=10`; values are YAML.

    Raises:
        InputError: with every problem found, each with its dotted path.
    """
    path = Path(path)
    values = read_yaml(path)
    misplaced: list[str] = []
    for assignment in overrides:
        try:
            apply_override(values, assignment)
        except InputError as error:
            misplaced += error.messages
    values.setdefault("output_dir", f"runs/{path.stem}")
    problems: list[str] = []
    config: Config | None = None
    try:
        config = Config.model_validate(values)
        problems += _check_stages(config) + _check_lora(config)
    except ValidationError as error:
        problems += [_as_written(line, values) for line in explain(error, Config, ())]
    problems += _check_task_options(values.get("task"), "task")
    problems += _check_stage_tasks(values.get("stages"))
    problems += _check_retained_task(values.get("retention"))
    problems += check_training(values.get("training"))
    if misplaced or problems or config is None:
        raise InputError([*misplaced, *(f"{path}: {problem}" for problem in problems)])
    return config


def _as_written(problem: str, values: Mapping[str, Any]) -> str:
    """Name the place of a penalty as the file has it: one that stands alone has no number."""
    found = re.match(r"(?:strategy|stages\.(\d+))\.penalty\.0\b", problem)
    if not found:
        return problem
    section = values["stages"][int(found[1])] if found[1] else values["strategy"]
    alone = isinstance(section["penalty"], dict)
    return problem.replace(".penalty.0", ".penalty", 1) if alone else problem


def check_config(config: Config) -> None:
    """Check what a Config made in Python has not been checked for: options and training fields.

    Raises:
        InputError: with every problem found.
    """
    problems = _check_stages(config) + _check_lora(config)
    problems += _check_task_options(config.task.model_dump(), "task")
    problems += _check_stage_tasks([stage.model_dump() for stage in config.stages or []])
    if config.retention is not None:
        problems += _check_retained_task(config.retention.model_dump())
    problems += check_training(config.training)
    if problems:
        raise InputError(problems)


def dump_config(config: Config) -> str:
    """Return the YAML that `load_config` reads back as the same config."""
    return yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True)


def config_values(config: Config) -> dict[str, Any]:
    """Return what a config says, without the defaults it leaves out, as YAML has it."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    return values | {"output_dir": config.output_dir, "seed": config.seed}


def json_schema() -> dict[str, Any]:
    """Return the config's JSON Schema, with each task's and penalty's own options."""
    schema = Config.model_json_schema()
    definitions, sections = schema["$defs"], schema["properties"]
    schema["required"] = [key for key in schema["required"] if key != "output_dir"]
    tasks = {name: registry.get(name).Options for name in registry.entries()}
    forms = _forms(definitions, "name", tasks, definitions["TaskConfig"])
    definitions["TaskConfig"] = {"anyOf": [{"enum": sorted(tasks)}, *forms]}
    penalties = {kind: get_penalty(kind).Options for kind in kinds()}
    forms = _forms(definitions, "kind", penalties, definitions["PenaltyConfig"])
    definitions["PenaltyConfig"] = {"anyOf": forms}
    sections["model"] = {"anyOf": [sections["model"], {"type": "string"}]}
    towers = definitions["TowersConfig"]["properties"]
    for name, tower in towers.items():
        described = {"description": tower.pop("description")}
        towers[name] = {"anyOf": [tower, {"type": "string"}], **described}
    sections["strategy"]["anyOf"].append({"enum": _words_of(StrategyConfig, "name")})
    sections["average"]["anyOf"].append({"enum": _words_of(AverageConfig, "kind")})
    cache = sections["feature_cache"]
    sections["feature_cache"] = {
        "anyOf": [{"$ref": cache.pop("$ref")}, {"type": ["string", "boolean", "number"]}],
        **cache,
    }
    baseline = sections["baselines"]
    baseline["items"] = {"anyOf": [baseline["items"], {"enum": ["scratch", "frozen"]}]}
    for form in definitions.values():
        if "penalty" in form.get("properties", {}):  # one may stand for a list of one
            form["properties"]["penalty"]["anyOf"].append({"$ref": "#/$defs/PenaltyConfig"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _forms(
    definitions: dict[str, Any],
    key: str,
    options: Mapping[str, type[BaseModel]],
    common: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return a form for each registered name: what all have in common, and its own options."""
    forms = []
    for name, own in sorted(options.items()):
        form = own.model_json_schema()
        definitions.update(form.pop("$defs", {}))
        properties = common["properties"] | form.get("properties", {}) | {key: {"const": name}}
        required = [*common["required"], *form.get("required", [])]
        forms.append({**form, "properties": properties, "required": required})
    return forms


def _words_of(sections: Any, key: str) -> list[str]:
    """Return the words that tell a union's sections apart."""
    forms = typing.get_args(typing.get_args(sections)[0])
    words = [typing.get_args(form.model_fields[key].annotation) for form in forms]
    return [word for own in words for word in own]


def _check_stage_tasks(stages: object) -> list[str]:
    """Check the tasks that stages have of their own."""
    if not isinstance(stages, list):
        return []  # the schema has said so already
    return [
        problem
        for number, stage in enumerate(stages)
        if isinstance(stage, dict) and stage.get("task") is not None
        for problem in _check_task_options(stage["task"], f"stages.{number}.task")
    ]


def _check_retained_task(retention: object) -> list[str]:
    """Check the task that is scored before and after."""
    task = retention.get("task") if isinstance(retention, dict) else None
    return _check_task_options(task, "retention.task")


def _check_task_options(task: object, place: str) -> list[str]:
    """Check a task's name, and its own options."""
    task = {"name": task} if isinstance(task, str) else task
    if not isinstance(task, dict) or not isinstance(task.get("name"), str):
        return []  # the schema has said so already
    try:
        options = registry.get(task["name"]).Options
    except InputError as error:
        return [f"{place}: {message}" for message in error.messages]
    try:
        options.model_validate({key: value for key, value in task.items() if key != "name"})
    except ValidationError as error:
        return explain(error, options, (place,))
    return []


def _check_lora(config: Config) -> list[str]:
    """Check what is peft's among the options of strategy lora, and in stages."""
    problems: list[str] = []
    if isinstance(config.strategy, Lora):
        beside = Lora.model_fields
        problems += check_lora("strategy", config.strategy.model_extra or {}, beside)
    for number, stage in enumerate(config.stages or []):
        if stage.lora is not None:
            problems += check_lora(f"stages.{number}.lora", stage.lora)
    return problems


def _check_stages(config: Config) -> list[str]:
    """Check the schedules and penalties that stages name."""
    sections: dict[str, Recipe | None] = {"strategy": config.strategy}
    sections |= {f"stages.{number}": stage for number, stage in enumerate(config.stages or [])}
    sections |= {f"baselines.{number}": one for number, one in enumerate(config.baselines)}
    problems = []
    for place, section in sections.items():
        if section is not None and section.lr_scheduler_type is not None:
            from transformers import SchedulerType

            problems += check_choice(
                f"{place}.lr_scheduler_type", section.lr_scheduler_type, SchedulerType | None
            )
        penalties = section.penalty or () if isinstance(section, StageFields) else ()
        for number, penalty in enumerate(penalties):
            own = f"{place}.penalty" + (f".{number}" if len(penalties) > 1 else "")
            try:
                make_penalty(penalty)
            except InputError as error:
                problems += [f"{own}.{message}" for message in error.messages]
    return problems
