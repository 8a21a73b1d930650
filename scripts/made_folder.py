"""A folder that a script makes: all of it or nothing, once, and known again by its note."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

NOTE = "about.json"

Note = Mapping[str, object]
Counts = Mapping[str, int]


def make_and_tell(out_dir: Path, note: Note, write: Callable[[Path], Counts]) -> int:
    """Make a data set as a script's work, and say on standard error what came of it.

    Args:
        out_dir: The folder to make, as the user named it.
        note: As for ``make_folder``.
        write: As for ``make_folder``; a ValueError is the user's to read.

    Returns:
        The script's exit status.
    """
    try:
        counts = make_folder(out_dir.resolve(), note, write)
    except (FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if counts is None:
        print(f"{out_dir} is up to date", file=sys.stderr)
    else:
        summary = ", ".join(f"{count} {split}" for split, count in counts.items())
        print(f"wrote {out_dir}: {summary}", file=sys.stderr)
    return 0


def make_folder(folder: Path, note: Note, write: Callable[[Path], Counts]) -> Counts | None:
    """Make a data set in one step: either all of it is at ``folder`` afterwards or none.

    Args:
        folder: The folder to make.
        note: What its bytes depend on, kept in ``about.json``.
        write: Fills the folder it is given; returns the number of examples in each split.

    Returns:
        What ``write`` returned, or None if the folder was there already.

    Raises:
        FileExistsError: If ``folder`` holds anything else, which is the caller's to delete.
    """
    if is_finished(folder, note):
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        counts = write(partial)
        (partial / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def is_finished(folder: Path, note: Note) -> bool:
    """Tell whether ``folder`` already holds exactly this data set.

    Args:
        folder: The folder to look at; it need not exist.
        note: What the folder should have been made from.

    Returns:
        True if it was made from the same, False if there is no such folder or it is empty.

    Raises:
        FileExistsError: If the folder holds anything else, which is the caller's to delete.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    kept = folder / NOTE
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == note:
        return True
    raise FileExistsError(f"{folder} exists and was made differently: delete it or name another")
