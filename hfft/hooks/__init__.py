"""Stock TrainerCallbacks, usable in anybody's transformers Trainer."""

from hfft.hooks.ema import EmaCallback
from hfft.hooks.epoch import EpochCallback
from hfft.hooks.freeze import FreezeCallback
from hfft.hooks.log import LogCallback
from hfft.hooks.logit_scale import LogitScaleCallback
from hfft.hooks.mixout import MixoutCallback
from hfft.hooks.penalty import PenaltyCallback
from hfft.hooks.progress import ProgressCallback
from hfft.hooks.replicas import ReplicasCallback
from hfft.hooks.stochnorm import StochNormCallback

__all__ = [
    "EmaCallback",
    "EpochCallback",
    "FreezeCallback",
    "LogCallback",
    "LogitScaleCallback",
    "MixoutCallback",
    "PenaltyCallback",
    "ProgressCallback",
    "ReplicasCallback",
    "StochNormCallback",
]
