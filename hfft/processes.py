"""The processes of a run: joined as the launcher was asked, or said to be otherwise."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from hfft.errors import InputError
from hfft.launcher import world_size_warning

logger = logging.getLogger("hfft")


def has_accelerator() -> bool:
    """Return whether torch sees a GPU or anything like one."""
    return bool(torch.accelerator.is_available())


_joined: list[PartialState] = []


def join_processes(timeout: int = 1800) -> PartialState:
    """Join the processes that the launcher started, over gloo where there is no accelerator.

    Args:
        timeout: seconds that they wait for one another, as while one of them reads the data; the
            first call's holds.

    Raises:
        InputError: this is one of several processes, and they don't find each other; each would
            train alone and write over the others' results.
    """
    if _joined:
        return _joined[0]
    state = PartialState(cpu=not has_accelerator(), timeout=timedelta(seconds=timeout))
    warning = world_size_warning(state.num_processes)
    if warning is not None and "LOCAL_RANK" in os.environ:
        raise InputError(warning)
    if warning is not None:
        logger.warning(warning)
    _joined.append(state)
    return state


def leave_processes() -> None:
    """Part from the others, for a script's end: what joins them must not outlive the interpreter.

    Threads of the process group that run on at its exit may abort a process whose work is done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
