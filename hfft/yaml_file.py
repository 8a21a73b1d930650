"""A YAML file as a mapping, and dotted overrides of it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from hfft.errors import InputError

# What PyYAML raises: a date without such a day is a ValueError, deep nesting a RecursionError.
_INVALID = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `5e-5` as a number; refuses a key that stands twice or is no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a plain word, not a list or a mapping", key.start_mark
                )
            kind = key.tag.rpartition(":")[2]
            if kind not in ("str", "merge"):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is read as {kind}; quote it", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raise InputError with the line where it can't be read."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: there is no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read: {error}") from None
    except _INVALID as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise InputError(f"{path}: expected `key: value` lines, found {found}")
    return values


def apply_override(values: dict[str, Any], assignment: str) -> None:
    """Set one dotted key in place: `stages.0.epochs=2`, `training.max_steps=10`."""
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"override {assignment!r}: expected key=value, such as seed=1")
    try:
        value = yaml.load(text, Loader=_Loader)
    except _INVALID as error:
        raise InputError(f"override {assignment!r}: the value is not valid YAML: {error}") from None
    node: Any = values
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        place: Any = _index(node, part, where) if isinstance(node, list) else part
        child = node[place] if isinstance(node, list) else node.get(place)
        section = "baselines" if parents[:depth] == ["baselines"] else where
        child = node[place] = whole_section(section, child)
        if child is None:
            child = node[place] = {}
        elif not isinstance(child, dict | list):
            raise InputError(f"override {assignment!r}: {where} is a value, it has no {last!r}")
        node = child
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def whole_section(section: str, value: Any) -> Any:
    """Return what one word in a section's place stands for: its name, kind, mode or limit."""
    if section in ("task", "model", "strategy", "baselines"):
        return {"name": value} if isinstance(value, str) else value
    if section == "average":
        return {"kind": value} if isinstance(value, str) else value
    if section == "feature_cache" and isinstance(value, str | int | float):
        mode = isinstance(value, bool) or value in ("auto", "on", "off")
        return {"mode" if mode else "limit": value}
    return value


def _index(items: list[Any], part: str, where: str) -> int:
    if not items:
        raise InputError(f"override {where}: the list is empty")
    if not part.isdecimal() or int(part) >= len(items):
        raise InputError(f"override {where}: expected a number from 0 to {len(items) - 1}")
    return int(part)
