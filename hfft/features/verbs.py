"""`hfft cache`: what the feature cache holds, and its removal. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from hfft.errors import InputError
from hfft.features.room import (
    Listed,
    cache_root,
    clear_partial,
    find_entries,
    list_entries,
    locked,
)
from hfft.features.room import remove as remove_entry
from hfft.table import table

_SHOWN = ("model", "split", "boundary")


def listing(*, as_json: bool) -> str:
    """Describe the entries, the last used first."""
    entries = list_entries(cache_root())[::-1]
    if as_json:
        return json.dumps([_values(entry) for entry in entries], ensure_ascii=False)
    if not entries:
        return f"{cache_root() / 'features'} is empty"
    rows = [
        (
            entry.key[:12],
            _mib(entry.bytes),
            _state(entry),
            f"{_last_use(entry):%Y-%m-%d %H:%M}",
            *(_described(entry).get(name, "") for name in _SHOWN),
        )
        for entry in entries
    ]
    total = sum(entry.bytes for entry in entries)
    return (
        table(("key", "MiB", "chunks", "last used", *_SHOWN), rows)
        + f"\n\n{_count(len(entries))}, {_mib(total)} MiB, in {cache_root() / 'features'}"
    )


def remove(prefixes: Sequence[str], *, everything: bool) -> None:
    """Remove entries; print each as it goes.

    Raises:
        InputError: no entries are named, or some that aren't there, or some are in use. Those in
            use stay, the others go.
    """
    if bool(prefixes) == everything:
        raise InputError("cache rm: give the keys of entries (`hfft cache ls` has them), or --all")
    root = cache_root()
    freed, gone, used = 0, 0, []
    with locked(root):
        for entry in list_entries(root) if everything else find_entries(root, prefixes):
            if remove_entry(entry.folder):
                print(f"removed {entry.key}: {_mib(entry.bytes)} MiB", flush=True)
                freed, gone = freed + entry.bytes, gone + 1
            else:
                used.append(entry.key)
        clear_partial(root / "features")
    print(f"{_count(gone)} removed, {_mib(freed)} MiB freed")
    if used:
        raise InputError(f"{key}: in use by a run; it stays" for key in used)


def _values(entry: Listed) -> dict[str, object]:
    return {
        "key": entry.key,
        "folder": str(entry.folder),
        "bytes": entry.bytes,
        "complete": entry.complete,
        "chunks_written": entry.written,
        "chunks": entry.manifest and entry.manifest.chunks,
        "last_used": _last_use(entry).isoformat(),
        "manifest": entry.manifest and asdict(entry.manifest),
    }


def _described(entry: Listed) -> dict[str, object]:
    return dict(entry.manifest.description) if entry.manifest else {}


def _state(entry: Listed) -> str:
    if entry.manifest is None:
        return "damaged"
    chunks = entry.manifest.chunks
    return f"all {chunks}" if entry.complete else f"{entry.written} of {chunks}"


def _last_use(entry: Listed) -> datetime:
    return datetime.fromtimestamp(entry.used).astimezone()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _count(entries: int) -> str:
    return f"{entries:,} entr{'y' if entries == 1 else 'ies'}"
