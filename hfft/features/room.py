"""Where the feature cache lies, what is in it, who uses it, and what goes when room is short.

    ROOT/features/KEY/manifest.json             the entry's layout
    ROOT/features/KEY/chunk-00000.safetensors   rows; each file is whole or absent
    ROOT/features/KEY/lock                      locked, shared, by whoever uses the entry
    ROOT/features/KEY/used                      its time of change is the entry's last use
    ROOT/features/.lock                         locked to make an entry or to remove one

Locks are the kernel's (flock): they end with their process, however it ends. Imports no torch,
so that `hfft cache` starts at once.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from hfft.errors import InputError
from hfft.features import manifest
from hfft.features.manifest import Manifest, read_manifest

_LOCK = "lock"
_USED = "used"
_KEY = re.compile(r"[0-9a-f]{8,128}")
_CHUNK = re.compile(r"chunk-\d{5,}\.safetensors")
_PARTIAL = re.compile(
    rf"({_CHUNK.pattern}|{_KEY.pattern})\.(?P<host>.+)\.(?P<pid>\d{{1,7}})\.[0-9a-f]{{8}}\.partial"
)
_REMOVED = re.compile(rf"\.rm-{_KEY.pattern}-[0-9a-f]{{8}}")
_DAY = 86_400  # seconds: no chunk takes that long, so an older partial file is nobody's
_GIB = 2**30


def _flock(descriptor: int, *, exclusive: bool = False, wait: bool = True) -> None:
    """Lock an open file until it is closed.

    Raises:
        BlockingIOError: somebody else holds it, and we were not to wait.
        OSError: the file system has no locks, or the operating system has none of this kind.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError("the feature cache needs a system with flock: Linux, macOS") from error
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)


class NoRoomError(OSError):
    """Neither the limit nor the disk has room for what is to be written."""


class Hold:
    """The use of one entry: while it lasts, nobody removes the entry.

    It ends with `close`, with the object or with the process; forked processes share it. A pickled
    hold takes the entry again where it is unpickled.

    Args:
        folder: the entry's folder.

    Raises:
        FileNotFoundError: the entry was removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._release = weakref.finalize(self, os.close, lock)
        _flock(lock)
        if not _is_file(lock, folder / _LOCK):  # removed while we waited
            self.close()
            raise FileNotFoundError(f"{folder} was removed")
        (folder / _USED).touch()

    def close(self) -> None:
        """End the use."""
        self._release()

    def __reduce__(self) -> tuple[type[Hold], tuple[Path]]:
        return Hold, (self.folder,)


@dataclass(frozen=True)
class Listed:
    """An entry as `hfft cache ls` shows it."""

    folder: Path
    bytes: int
    used: float
    """Seconds since the epoch."""
    written: int
    """How many chunks there are, of `manifest.chunks`."""
    manifest: Manifest | None
    """None: damaged, or of another version's format."""

    @property
    def key(self) -> str:
        """The entry's name."""
        return self.folder.name

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return self.manifest is not None and self.written >= self.manifest.chunks


def cache_root() -> Path:
    """Return `$HFFT_CACHE`, by default `~/.cache/hfft`."""
    return Path(os.environ.get("HFFT_CACHE") or "~/.cache/hfft").expanduser()


def default_limit(root: Path) -> int:
    """Return the bytes that entries may take where nothing is said: theirs and half of the rest."""
    there = root
    while not there.exists():
        there = there.parent
    held = sum(entry.bytes for entry in list_entries(root)) if there == root else 0
    return held + shutil.disk_usage(there).free // 2


def entry_folder(root: Path, key: str) -> Path:
    """Return where an entry lies.

    Raises:
        ValueError: the key is no hexadecimal digest.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r}: a key is 8 to 128 hexadecimal digits")
    return root / "features" / key


def chunk_name(chunk: int) -> str:
    """Return the file name of a chunk."""
    return f"chunk-{chunk:05d}.safetensors"


def partial_name(name: str) -> str:
    """Return what a file or an entry is called until it is whole; it tells whose it is."""
    return f"{name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.partial"


def clear_partial(folder: Path) -> None:
    """Remove what dead processes left half-written or half-removed in a folder of the cache."""
    for path in _paths(folder):
        if _REMOVED.fullmatch(path.name) or _is_abandoned(path):
            _delete(path)


def is_entry(folder: Path) -> bool:
    """Tell an entry, or what is left of one, from what is none of ours to remove."""
    if not _KEY.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in _paths(folder)}
    return manifest.NAME in names or all(
        name in (_LOCK, _USED) or _CHUNK.fullmatch(name) or _PARTIAL.fullmatch(name)
        for name in names
    )


def list_entries(root: Path) -> list[Listed]:
    """Return the entries there are, the least recently used first."""
    found = []
    for folder in filter(is_entry, _paths(root / "features")):
        with suppress(FileNotFoundError):  # removed meanwhile
            used = folder / _USED
            found.append(
                Listed(
                    folder,
                    bytes_of(folder),
                    (used if used.exists() else folder).stat().st_mtime,
                    sum(bool(_CHUNK.fullmatch(path.name)) for path in _paths(folder)),
                    read_manifest(folder),
                )
            )
    return sorted(found, key=lambda entry: entry.used)


def bytes_of(folder: Path) -> int:
    """Return the size of an entry, with what is being written."""
    total = 0
    for path in _paths(folder):
        with suppress(FileNotFoundError):  # a partial file was renamed meanwhile
            total += path.stat().st_size
    return total


def find_entries(root: Path, prefixes: Sequence[str]) -> list[Listed]:
    """Return the entries whose keys begin so.

    Raises:
        InputError: a prefix fits no entry or several.
    """
    entries = list_entries(root)
    found, complaints = {}, []
    for prefix in prefixes:
        fitting = [entry for entry in entries if entry.key.startswith(prefix)]
        if len(fitting) == 1:
            found[fitting[0].key] = fitting[0]
        elif fitting:
            keys = ", ".join(entry.key for entry in fitting)
            complaints.append(
                f"{prefix}: fits {len(fitting)} entries, {keys}; give more of the key"
            )
        else:
            near = get_close_matches(prefix, [entry.key for entry in entries], n=1, cutoff=0)
            hint = f"; the nearest is {near[0]}" if near else ""
            complaints.append(f"{prefix}: {root / 'features'} has no such entry{hint}")
    if complaints:
        raise InputError(complaints)
    return list(found.values())


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Be the only process that makes or removes entries."""
    (root / "features").mkdir(parents=True, exist_ok=True)
    lock = os.open(root / "features" / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(lock, exclusive=True)
        yield
    finally:
        os.close(lock)


def remove(folder: Path) -> bool:
    """Remove an entry unless somebody holds it, inside `locked`; return whether it went."""
    with suppress(FileNotFoundError), _claim(folder) as free:
        if free:
            # Renamed first: killed on the way, we leave no half entry that looks whole.
            doomed = folder.with_name(f".rm-{folder.name}-{secrets.token_hex(4)}")
            folder.rename(doomed)
            _delete(doomed)
            return True
    return False


def make_room(root: Path, needed: int, limit: int, keep: Collection[str] = ()) -> None:
    """Remove least recently used entries until what is to come has room.

    It reserves nothing: who writes at the same time counts on the same room.

    Args:
        root: the cache's root folder.
        needed: the bytes that are to be written.
        limit: the most bytes that all entries may have together.
        keep: keys of entries to leave, besides those that somebody holds.

    Raises:
        NoRoomError: there isn't the room, whatever may be removed; nothing was.
    """
    with locked(root):
        features = root / "features"
        clear_partial(features)
        entries = list_entries(root)
        taken = sum(entry.bytes for entry in entries)
        free = shutil.disk_usage(features).free
        lacking = max(taken + needed - limit, needed - free)
        if lacking <= 0:
            return
        idle = [entry for entry in entries if entry.key not in keep and _is_idle(entry.folder)]
        spare = sum(entry.bytes for entry in idle)
        if spare >= lacking:
            for entry in idle:
                if lacking > 0 and remove(entry.folder):
                    lacking -= entry.bytes
        if lacking > 0:
            raise NoRoomError(
                f"{features}: {needed / _GIB:.2f} GiB more have no room; the feature cache holds "
                f"{taken / _GIB:.2f} GiB of at most {limit / _GIB:.2f} GiB, "
                f"{(taken - spare) / _GIB:.2f} GiB of it in use, and the disk has "
                f"{free / _GIB:.2f} GiB free; raise the limit, free the disk, or set HFFT_CACHE to "
                f"a folder on another disk"
            )


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Lock an entry against all others; give whether nobody holds it."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            _flock(lock, exclusive=True, wait=False)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(lock)


def _is_idle(folder: Path) -> bool:
    with _claim(folder) as free:
        return free


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_abandoned(path: Path) -> bool:
    match = _PARTIAL.fullmatch(path.name)
    if match is None:
        return False
    try:
        if time.time() - path.stat().st_mtime > _DAY:
            return True
        if match["host"] == socket.gethostname():
            os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process, or the file is whole by now
        return False
    return False


def _paths(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it too
    else:
        path.unlink(missing_ok=True)
