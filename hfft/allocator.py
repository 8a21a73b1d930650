"""Freed memory is kept for the next tensor, instead of going back to the kernel.

glibc maps every block above a threshold anew and unmaps it when it is freed; the kernel then hands
out zeroed pages one fault at a time. Activations are such blocks: in a ResNet-50 forward pass of 32
images that is a quarter to two fifths of the CPU's time; keeping them takes up to a tenth more
memory there. A training step gains next to nothing, since it holds on to its activations.
"""

from __future__ import annotations

import ctypes
import os
import sys

VARIABLE = "HFFT_MALLOC"
"""The environment variable that, set to `system`, leaves the C library as it is."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_KEPT = 2**31 - 1
"""Bytes at the heap's top that are not given back: the most that an int holds."""

_MAPPED = (2**30, 2**25)
"""Bytes from which blocks are mapped, the first that is accepted. Rarely more than one tensor of a
run is as large as the first; before 2.35, glibc takes none above the second."""

_OTHERS = ("jemalloc", "tcmalloc", "mimalloc", "hoard")


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed; return whether it does because of this call.

    Before the large allocations, once a process; workers that are forked off inherit it. Nothing
    is done without glibc, under another allocator, or where the user has set malloc already.
    """
    if not _is_glibc() or _is_users_own():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MAPPED):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))


def _is_glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # musl has no such name
        return False


def _is_users_own() -> bool:
    """Return whether malloc is as the user, or a preloaded library, wants it."""
    names = ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "MMAP_MAX", "TOP_PAD")
    own = any(f"MALLOC_{name}_" in os.environ for name in names)
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    other = any(name in os.environ.get("LD_PRELOAD", "") for name in _OTHERS)
    return own or tuned or other or os.environ.get(VARIABLE) == "system"
