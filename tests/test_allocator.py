"""Memory that is freed stays with the process, unless the user or the platform says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hfft import allocator

needs_glibc = pytest.mark.skipif(not allocator._is_glibc(), reason="not glibc")

FAULTS = """
import resource
from hfft.allocator import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(100 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def run(**environment: str) -> tuple[str, int]:
    """Whether memory was kept, and the page faults of a second block of 100 MiB."""
    names = ("HFFT_MALLOC", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith("MALLOC_")
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@needs_glibc
def test_a_second_block_takes_the_first_ones_pages() -> None:
    kept, faults = run()
    assert kept == "True"
    assert faults < 100


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HFFT_MALLOC", "system"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
        ("LD_PRELOAD", "libjemalloc.so.2"),  # absent: the loader warns and goes on
    ],
)
def test_what_the_user_has_chosen_stays(name: str, value: str) -> None:
    kept, faults = run(**{name: value})
    assert kept == "False"
    assert faults > 1000 or name == "LD_PRELOAD"


@needs_glibc
def test_tunables_that_do_not_concern_malloc_do_not_count() -> None:
    assert run(GLIBC_TUNABLES="glibc.rtld.optional_static_tls=1024")[0] == "True"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_is_done(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown)
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(("accepted", "tried"), [(2**31, 1), (2**25, 2), (0, 2)])
def test_a_threshold_that_is_refused_gives_way_to_a_smaller_one(
    accepted: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Library:
        def __init__(self, _: None) -> None: ...

        def mallopt(self, parameter: int, value: int) -> int:
            if parameter == allocator._M_MMAP_THRESHOLD:
                asked.append(value)
                return int(value <= accepted)
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    monkeypatch.setattr(allocator, "_is_glibc", lambda: True)
    monkeypatch.setattr(allocator, "_is_users_own", lambda: False)
    assert allocator.keep_freed_memory() == bool(accepted)
    assert asked == list(allocator._MAPPED)[:tried]
