"""What predictions are made for: files, and records of a file and what it may be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hfft.errors import InputError
from hfft.text.inputs import read_records

_RECORDS = (".jsonl", ".json")


def read_given(
    given: Sequence[str], role: str, find: Callable[[Sequence[str]], Iterable[Path]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each and its record, `{role: file, "candidates": names}` or without names.

    Args:
        given: files of the other tower's kind, folders of them, and JSON Lines, whose paths are
            relative to themselves.
        role: the other tower's.
        find: returns files as they are, and those in folders.

    Raises:
        InputError: a folder holds none, or a record can't be read.
    """
    for one in given:
        if Path(one).suffix.lower() not in _RECORDS:
            for path in find([one]):
                yield str(path), {role: _undecoded(path)}
            continue
        records = read_records([one], (role,), alone=None, optional=("candidates",))
        for place, record in records:
            names = record.get("candidates") or ()
            if wrong := [name for name in names if not isinstance(name, str) or not name.strip()]:
                raise InputError(f"{place}: the candidate {wrong[0]!r} names nothing; give texts")
            yield place, {**record, role: _undecoded(Path(one).parent / record[role])}


def _undecoded(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": None}
