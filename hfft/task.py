"""What a task must provide. The engine knows nothing else of it.

A task file imports this module, `hfft.registry`, and third parties; everything a task needs of
ours is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel
from transformers import PretrainedConfig

from hfft.config import ModelConfig, Section
from hfft.data import Column
from hfft.errors import InputError
from hfft.image_inputs import Preparation, as_pixels, find_preparation, open_pixels
from hfft.images import View, find_images, open_image

__all__ = [
    "Column",
    "InputError",
    "ModelConfig",
    "Preparation",
    "Row",
    "Section",
    "Task",
    "Transform",
    "View",
    "as_pixels",
    "find_images",
    "find_preparation",
    "open_image",
    "open_pixels",
]

Row = Mapping[str, Any]
"""One example of the data: role to value."""
Transform = Callable[[Row], dict[str, Any]]
"""Turns one example into model inputs."""


class Task(ABC):
    """What is learned: how examples become inputs, which model class and head, which metrics.

    A task is made once a run, of its options. Its methods are pure: what they need is handed in.
    """

    name: ClassVar[str]
    """The Hub's pipeline tag; set by `hfft.registry.register`."""
    columns: ClassVar[Mapping[str, Column]]
    """The roles that the data must fill."""
    Options: ClassVar[type[BaseModel]] = Section
    """The keys that stand beside `name` under `task:`."""
    metric_names: ClassVar[tuple[str, ...]]
    """What `metrics` returns, by name."""
    metric: ClassVar[str]
    """The one of them, higher being better, that says whether fine-tuning helped."""
    auto_model: ClassVar[Any]
    """The transformers Auto class with this task's head."""
    model_suffix: ClassVar[str]
    """How this task's model classes end: `ForImageClassification`."""

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    @property
    def augments(self) -> bool:
        """Whether `transform` for training is random: its examples can't be computed once then."""
        return True

    @abstractmethod
    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> None:
        """Write labels and options into the model's config, in place."""

    @abstractmethod
    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return what prepares inputs as the model's pretraining did."""

    @abstractmethod
    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return the function from one example to model inputs; random only when training."""

    @abstractmethod
    def collate(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch what `transform` returns."""

    @abstractmethod
    def read_inputs(self, given: Sequence[str]) -> list[tuple[str, Any]]:
        """Return what `hfft predict` was given as pairs of its name and its value.

        Raises:
            InputError: something can't be read.
        """

    @abstractmethod
    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score predictions of shape (N, ...) against labels of shape (N, ...)."""

    def scores_by_label(
        self, predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return a row of scores for each label; none where labels have no names."""
        return []

    def draw(
        self, folder: Path, predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]
    ) -> list[Path]:
        """Write the task's own pictures of a result into `folder`; return their paths."""
        return []
