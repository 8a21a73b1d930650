"""Stock TrainerCallbacks, usable in anybody's transformers Trainer."""

from hfft.hooks.epoch import EpochCallback
from hfft.hooks.freeze import FreezeCallback
from hfft.hooks.log import LogCallback
from hfft.hooks.progress import ProgressCallback
from hfft.hooks.replicas import ReplicasCallback

__all__ = ["EpochCallback", "FreezeCallback", "LogCallback", "ProgressCallback", "ReplicasCallback"]
