"""Fine-tuning on Hugging Face's stack: a task, and a list of stages.

Importing hfft imports no torch; each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfft.config import Config, Stage
    from hfft.errors import InputError
    from hfft.registry import register
    from hfft.run import RunResult, train
    from hfft.task import Task

__version__ = "0.1.0"

_HOME = {
    "Config": "hfft.config",
    "InputError": "hfft.errors",
    "RunResult": "hfft.run",
    "Stage": "hfft.config",
    "Task": "hfft.task",
    "register": "hfft.registry",
    "train": "hfft.run",
}
__all__ = ["Config", "InputError", "RunResult", "Stage", "Task", "register", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hfft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
