"""Stock TrainerCallbacks, usable in anybody's transformers Trainer."""

from hfft.hooks.epoch import EpochCallback
from hfft.hooks.freeze import FreezeCallback
from hfft.hooks.log import LogCallback
from hfft.hooks.mixout import MixoutCallback
from hfft.hooks.penalty import PenaltyCallback
from hfft.hooks.progress import ProgressCallback
from hfft.hooks.replicas import ReplicasCallback
from hfft.hooks.stochnorm import StochNormCallback

__all__ = [
    "EpochCallback",
    "FreezeCallback",
    "LogCallback",
    "MixoutCallback",
    "PenaltyCallback",
    "ProgressCallback",
    "ReplicasCallback",
    "StochNormCallback",
]
