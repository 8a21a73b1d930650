"""Numbers that tell texts and files apart: of equal ones they are equal, everywhere.

They depend on nothing but what is told apart: not on the split, the process or the machine.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from xxhash import xxh3_64_intdigest

_BITS = (1 << 63) - 1
"""Of an int64 that is not negative, so that none is IGNORED."""


def identity(content: Any) -> int:
    """The identity, in 63 bits, of a text, or of bytes or a buffer of them."""
    encoded = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    return xxh3_64_intdigest(encoded) & _BITS


def file_identities(values: Any) -> list[int]:
    """The identity of each image or sound: by its bytes, else by the file that its path leads to.

    Args:
        values: an Arrow array of (N,) undecoded ones, `{"path", "bytes"}`, whose bytes are not
            copied.
    """

    @cache
    def of_file(path: str | None) -> int:
        return identity(_resolved(path or ""))

    found = []
    for chunk in getattr(values, "chunks", [values]):
        contents, paths = chunk.field("bytes"), chunk.field("path").to_pylist()
        found += [
            identity(content.as_buffer()) if content.is_valid else of_file(path)
            for content, path in zip(contents, paths, strict=True)
        ]
    return found


def _resolved(path: str) -> str:
    """Where a path leads, links followed; without a look at each folder for every file in it."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(_resolved_folder(folder), name)


@cache
def _resolved_folder(folder: str) -> str:
    return os.path.realpath(folder)
