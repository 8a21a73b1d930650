"""The processes of a run: joined as the launcher was asked, or said to be otherwise."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from accelerate import PartialState

from hfft.errors import InputError
from hfft.launcher import world_size_warning

logger = logging.getLogger("hfft")


def has_accelerator() -> bool:
    """Return whether torch sees a GPU or anything like one."""
    return bool(torch.accelerator.is_available())


@cache
def join_processes() -> PartialState:
    """Join the processes that the launcher started, over gloo where there is no accelerator.

    Raises:
        InputError: this is one of several processes, and they don't find each other; each would
            train alone and write over the others' results.
    """
    state = PartialState(cpu=not has_accelerator())
    warning = world_size_warning(state.num_processes)
    if warning is not None and "LOCAL_RANK" in os.environ:
        raise InputError(warning)
    if warning is not None:
        logger.warning(warning)
    return state
