"""What an entry of the feature cache says of itself. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The layout of an entry: fixed when it is made, the same for all who write it."""

    examples: int
    rows_per_chunk: int
    columns: tuple[Mapping[str, Any], ...]
    """Of each: `name`, `dtype` as safetensors calls it, `shape`, `varies`."""
    description: Mapping[str, Any]
    """For a reader of `hfft cache ls`: model, split, boundary; nothing depends on it."""

    @property
    def chunks(self) -> int:
        """How many chunk files a complete entry has."""
        return -(-self.examples // self.rows_per_chunk)


def read_manifest(folder: Path) -> Manifest | None:
    """Read an entry's manifest; None where there is none, a damaged one or another format's."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        return None
    try:
        columns = tuple(column | {"shape": tuple(column["shape"])} for column in values["columns"])
        found = Manifest(**values | {"columns": columns})
        return found if found.examples >= 0 and found.rows_per_chunk > 0 else None
    except (TypeError, KeyError):
        return None


def manifest_text(manifest: Manifest) -> str:
    """Return the manifest as it is written."""
    return json.dumps({"format": _FORMAT} | asdict(manifest), indent=2, ensure_ascii=False) + "\n"
