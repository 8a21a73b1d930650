"""Task names to tasks. Listing imports no task; asking for one imports that one alone.

A task of ours is a file in `hfft/tasks`; a third party's is an entry point in the group
`hfft.tasks` whose value is the module. Either way the module registers its class:

    @register("image-classification")
    class ImageClassification(Task): ...
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hfft.errors import InputError

if TYPE_CHECKING:
    from hfft.task import Task

T = TypeVar("T", bound="type[Task]")

_NAME = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
_registered: dict[str, type[Task]] = {}


@dataclass(frozen=True)
class Entry:
    """Where a task is found, known without importing it."""

    name: str
    module: str
    summary: str


def register(name: str) -> Callable[[T], T]:
    """Register a Task class under a name such as `image-classification`.

    Raises:
        ValueError: the name is taken, or isn't lower-case words joined by dashes.
    """
    if not _NAME.match(name):
        raise ValueError(f"task name {name!r}: use lower-case words joined by dashes")

    def decorate(task: T) -> T:
        taken = _registered.get(name)
        if taken is not None and taken.__qualname__ != task.__qualname__:
            raise ValueError(f"task name {name!r} is taken by {taken.__module__}.{taken.__name__}")
        if taken is not None and taken.__module__ != task.__module__:
            raise ValueError(f"task {name!r} is registered by {taken.__module__} already")
        task.name = name
        _registered[name] = task
        return task

    return decorate


def entries() -> dict[str, Entry]:
    """Return every task there is, by name, without importing any.

    Raises:
        InputError: two sources claim one name.
    """
    found = {entry.name: entry for entry in _own()}
    for point in entry_points(group="hfft.tasks"):
        source = point.dist.name if point.dist is not None else "an installed package"
        if point.name in found:
            raise InputError(
                f"task {point.name!r}: both {found[point.name].module} and {point.value} "
                f"(from {source}) provide it; uninstall one of them"
            )
        found[point.name] = Entry(point.name, point.value, f"from {source}")
    return dict(sorted(found.items()))


def get(name: str) -> type[Task]:
    """Import and return one task.

    Raises:
        InputError: there is no such task, or its module can't be imported.
    """
    if name not in _registered:
        known = entries()
        if name not in known:
            from hfft.complaints import nearest

            raise InputError(f"there is no task {name!r}{nearest(name, known)}")
        module = known[name].module
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(
                f"task {name!r}: its module {module} needs {error.name}: {error}"
            ) from error
        if name not in _registered:
            raise InputError(f"task {name!r}: {module} does not register that name")
    return _registered[name]


@cache
def _own() -> tuple[Entry, ...]:
    spec = importlib.util.find_spec("hfft.tasks")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("hfft.tasks is not installed: reinstall hfft")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return tuple(
        Entry(path.stem.replace("_", "-"), f"hfft.tasks.{path.stem}", _summary(path))
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("_")
    )


def _summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, read without importing it."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
