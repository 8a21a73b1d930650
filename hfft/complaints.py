"""Pydantic's errors as lines to act on: the dotted path, what is wrong, the nearest name."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

# Pydantic's words for these name Python's classes.
_NO_SECTION = ("model_type", "model_attributes_type", "dict_type")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest right name, or the names there are."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are: {', '.join(names)}" if len(names) <= 20 else ""


def explain(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...]) -> list[str]:
    """Return one line an error, each with its dotted path below `prefix`."""
    lines: dict[str, None] = {}
    found = [(*_walk(model, item["loc"]), item) for item in error.errors()]
    for location, section, item in found:
        place = ".".join((*prefix, *location))
        kind, context = item["type"], item.get("ctx", {})
        if kind in ("literal_error", "model_type") and _other_form_meant(location, item, found):
            continue
        if kind == "too_short" and _is_wrong_inside(location, found):
            continue
        if kind == "extra_forbidden":
            hint = nearest(location[-1], section.model_fields)
            lines[f"{place}: unknown key{hint}"] = None
        elif kind == "missing":
            lines[f"{place}: is missing"] = None
        elif kind == "union_tag_not_found":
            lines[f"{place}.{str(context['discriminator']).strip(chr(39))}: is missing"] = None
        elif kind in ("union_tag_invalid", "literal_error"):
            expected = [t.strip(" '") for t in re.split(r",| or ", _expected(context))]
            given = context.get("tag", item["input"])
            lines[f"{place}: {given!r} is none of its values{nearest(str(given), expected)}"] = None
        elif kind == "value_error":
            lines[f"{place}: {context['error']}" if place else str(context["error"])] = None
        elif kind in ("tuple_type", "list_type"):
            lines[f"{place}: expected a list, found {item['input']!r}"] = None
        elif kind in _NO_SECTION:
            lines[f"{place}: expected `key: value` lines, found {item['input']!r}"] = None
        else:
            lines[f"{place}: {item['msg']}, found {item['input']!r}"] = None
    return list(lines)


def _other_form_meant(
    location: list[str], item: ErrorDetails, found: list[tuple[list[str], Any, ErrorDetails]]
) -> bool:
    """Whether one form of a union complains (a name, a section) where the other one was written."""
    others = [(place, other["type"]) for place, _, other in found if other is not item]
    if isinstance(item["input"], dict):
        return any(place[: len(location)] == location for place, _ in others)
    return item["type"] == "model_type" and (location, "literal_error") in others


def _is_wrong_inside(location: list[str], found: list[tuple[list[str], Any, ErrorDetails]]) -> bool:
    """Whether a list is too short only since pydantic dropped what is wrong in it."""
    return any(place != location and place[: len(location)] == location for place, _, _ in found)


def _expected(context: Mapping[str, Any]) -> str:
    return str(context.get("expected_tags") or context.get("expected") or "")


def _walk(
    model: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel]]:
    """Drop pydantic's union tags from an error's location; return the section it lies in."""
    path: list[str] = []
    section: type[BaseModel] | None = model
    holder: type[BaseModel] = model
    for part in location:
        holder = section or holder
        if isinstance(part, int):
            path.append(str(part))
            continue
        if section is not None and part in section.model_fields:
            path.append(part)
            section = _section_of(section.model_fields[part].annotation, None)
        elif section is not None and part == section.__name__:
            continue  # the arm of a union
        elif (tagged := _section_of(_annotation(model, path), part)) is not None:
            section = tagged
        elif not _is_union_arm(part):
            path.append(part)
    return path, section or holder


def _is_union_arm(part: str) -> bool:
    return part.startswith(("literal[", "tuple[", "function-", "constrained-")) or part in (
        "int",
        "str",
        "float",
        "bool",
    )


def _annotation(model: type[BaseModel], path: list[str]) -> Any:
    """Return the annotation of the field at the top of the path, where a tagged union stands."""
    name = next((part for part in reversed(path) if not part.isdigit()), "")
    return model.model_fields[name].annotation if name in model.model_fields else None


def _section_of(annotation: Any, tag: str | None) -> type[BaseModel] | None:
    """Find the section class inside an annotation; with a tag, the one of that `name` or `kind`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = annotation.model_fields.get("name") or annotation.model_fields.get("kind")
        if tag is None or (name is not None and tag in typing.get_args(name.annotation)):
            return annotation
        return None
    for argument in typing.get_args(annotation):
        found = _section_of(argument, tag)
        if found is not None and (tag is not None or _single(annotation)):
            return found
    return None


def _single(annotation: Any) -> bool:
    """Whether an annotation leads to one section only (not to a tagged union of several)."""
    arguments = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    return sum(isinstance(a, type) and issubclass(a, BaseModel) for a in arguments) <= 1
