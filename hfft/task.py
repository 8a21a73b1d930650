"""What a task must provide. The engine knows nothing else of it.

A task file imports this module, `hfft.registry`, what tasks of its kind share (`hfft.text`,
`hfft.vision`, `hfft.audio`,
`hfft.contrastive_task`) and third parties; everything else that a task needs of ours
is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, pipeline

from hfft.class_scores import draw_confusion, scores_by_class
from hfft.data import Column, Needs
from hfft.errors import InputError
from hfft.sections import ModelConfig, Section
from hfft.text.inputs import IGNORED

__all__ = [
    "IGNORED",
    "Collate",
    "Column",
    "Encode",
    "InputError",
    "ModelConfig",
    "Row",
    "Section",
    "Split",
    "Task",
    "Transform",
    "draw_confusion",
    "scores_by_class",
]

Row = Mapping[str, Any]
"""One example: role to value, or what `encode` made of it."""
Transform = Callable[[Row], dict[str, Any]]
"""Turns one example into model inputs."""
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Batches model inputs."""
Encode = Callable[[Mapping[str, list[Any]]], Mapping[str, list[Any]]]
"""Turns a batch of examples, role to values, into a batch of any number of encoded ones."""


@dataclass(frozen=True)
class Split:
    """A split as its scores are computed from it.

    Attributes:
        rows: the examples, by role.
        encoded: what `encode` made of them, in the order of the predictions; else the rows.
        labels: class names; none for a task without.
        processor: of the model.
        reference: what the task's `reference` returned.
    """

    rows: Any
    encoded: Any
    labels: Sequence[str] = ()
    processor: Any = field(default=None, repr=False)
    reference: Any = field(default=None, repr=False)


class Task(ABC):
    """What is learned: how examples become inputs, which model class and head, which metrics.

    A task is made once a run, of its options. Its methods are pure: what they need is handed in.
    """

    name: ClassVar[str]
    """The Hub's pipeline tag; set by `hfft.registry.register`."""
    Options: ClassVar[type[BaseModel]] = Section
    """The keys that stand beside `name` under `task:`."""
    auto_model: ClassVar[Any]
    """The transformers Auto class with this task's head."""
    model_suffix: ClassVar[str | tuple[str, ...]]
    """How this task's model classes end: `ForImageClassification`."""
    checked: ClassVar[bool] = False
    """Whether `flaws` looks at the examples."""
    open_classes: ClassVar[bool] = False
    """Whether a model can be scored on classes that it was not trained for, by their names."""
    generates: ClassVar[bool] = False
    """Whether `metrics` is given what `generate` returns too: a pair of that and of `reduce`'s."""

    columns: Mapping[str, Column]
    """The roles that the data must, or may, fill; options may decide."""
    metric_names: tuple[str, ...]
    """What `metrics` may return, by name; options may decide."""
    lower_is_better: tuple[str, ...] = ()
    """Those of the metrics of which less is better; a loss always is."""
    metric: str
    """The one of the metrics that says whether fine-tuning helped; options may decide."""

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    @classmethod
    def options_of(cls, config: PretrainedConfig) -> dict[str, Any]:
        """Return the options that a finished model's config tells, for a model without its run."""
        return {}

    @classmethod
    def labels_of(cls, config: PretrainedConfig) -> list[str]:
        """Return the classes that a finished model's config names."""
        return [name for _, name in sorted((config.id2label or {}).items())]

    @classmethod
    def takes(cls, config: PretrainedConfig) -> bool:
        """Say whether a finished model is one of this task's."""
        classes = list(config.architectures or [])
        if config.model_type == "timm_wrapper":
            classes.append("TimmWrapperForImageClassification")
        return any(name.endswith(cls.model_suffix) for name in classes)

    @property
    def augments(self) -> bool:
        """Whether `transform` for training is random: its examples can't be computed once then."""
        return True

    @property
    def smooths(self) -> bool:
        """Whether `loss` has labels that can be smoothed."""
        return True

    @property
    def truncates(self) -> bool:
        """Whether examples that `encode` cut short are a note to the user, not an error.

        The option `overlong` says so, where a task has it.
        """
        return getattr(self.options, "overlong", "truncate") == "truncate"

    @property
    def needs(self) -> Needs:
        """What the data must hold."""
        return Needs(self.columns, self.roles, self.flaws if self.checked else None)

    def roles(self, found: Collection[str]) -> Collection[str]:
        """Return which of the roles serve, given those that the data has a column for.

        Raises:
            InputError: optional ones are missing that can't all be.
        """
        return found

    def flaws(self, rows: Mapping[str, list[Any]]) -> list[str]:
        """Return what is wrong with each example of a batch, as in "row 3 ..."; "" for nothing."""
        raise NotImplementedError

    @abstractmethod
    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Return the model's config with labels and options in it; may change what it is given.

        Raises:
            InputError: the model can't do what the options ask for.
        """

    @abstractmethod
    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return what prepares inputs as the model's pretraining did.

        What the model has to know of it (a padding token) is added to its config.
        """

    def encode(self, processor: Any, config: PretrainedConfig) -> Encode | None:
        """Return what turns examples into encoded ones, once a run and without chance.

        It is called with batches of the roles' columns and `index`, each example's place in the
        split, and returns columns of its own, `input_ids` among them. One example may give
        several or none. It is pickled and its result kept on disk. Images and sounds come as
        their identities, numbers that are equal for the same file and for the same bytes.

        Three columns are the engine's: `truncated`, whether tokens were cut off, is counted,
        said, and dropped; examples whose `input_ids` are empty are counted, said, and left out;
        and where there is a `row`, the index of the example that an encoded one was made of,
        `transform` is handed the columns of both.
        """
        return None

    def pack(self, lengths: np.ndarray, config: PretrainedConfig) -> list[np.ndarray] | None:
        """Return which encoded training examples make up each row, given (N,) lengths in tokens.

        `transform` is then handed `{"packed": [example, ...]}`.
        """
        return None

    @abstractmethod
    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return the function from one example, encoded if need be, to model inputs.

        It may draw random numbers, under a seed of its example's own; when not training, these
        are the same in every epoch. Inputs other than `labels` are the model's arguments.
        """

    @abstractmethod
    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Return what batches inputs; `labels` of IGNORED are no items of the loss."""

    def loss(
        self, outputs: Any, labels: Tensor, items: Tensor | int | None = None, smoothing: float = 0
    ) -> Tensor:
        """Return the cross-entropy of a batch, summed and divided by the items of the whole step.

        Args:
            outputs: the model's; logits of shape (..., classes).
            labels: classes of shape (...), aligned with the logits; IGNORED ones count nothing.
            items: labels that count in all micro-batches of all processes; None: in this batch.
            smoothing: of the labels (Szegedy et al. 2016).
        """
        kept = labels != IGNORED
        logits = outputs.logits[kept].float()  # only these: a vocabulary's logits are large
        total = functional.cross_entropy(
            logits, labels[kept], reduction="sum", label_smoothing=smoothing
        )
        return total / torch.as_tensor(kept.sum() if items is None else items).clamp(min=1)

    def check_skeleton(self, model: PreTrainedModel) -> None:
        """Look at a model without its weights, before anything else is read.

        Raises:
            InputError: it lacks what the task needs.
        """
        return

    def idle(
        self, model: PreTrainedModel, batch: Callable[[], Mapping[str, Any]]
    ) -> frozenset[str]:
        """Return the names of parameters that the task's loss doesn't depend on; they stay frozen.

        Args:
            model: without its weights.
            batch: returns inputs.
        """
        return frozenset()

    def reduce(self, outputs: Any, labels: Tensor) -> Any:
        """Return what `metrics` needs of a batch's outputs: a tensor, or several, (B, ...)."""
        return outputs.logits

    def generate(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the token ids, (B, T), that a model answers inputs with."""
        raise NotImplementedError

    def check_model(self, model: PreTrainedModel) -> None:
        """Try a model with its weights on what the options ask of it, before it is trained.

        Raises:
            InputError: it can't do that.
        """
        return

    def reference(self, model: Any, split: Split) -> Any:
        """Return what `metrics` needs of the model itself, beside its predictions."""
        return None

    @abstractmethod
    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score predictions, arrays of shape (N, ...) padded with IGNORED, against labels.

        A `loss` among the scores takes the place of the batches' mean loss.
        """

    def scores_by_label(
        self, predictions: Any, labels: np.ndarray, split: Split
    ) -> list[dict[str, Any]]:
        """Return a row of scores for each label; none where labels have no names."""
        return []

    def draw(self, folder: Path, predictions: Any, labels: np.ndarray, split: Split) -> list[Path]:
        """Write the task's own pictures of a result into `folder`; return their paths."""
        return []

    @abstractmethod
    def read_inputs(self, given: Sequence[str]) -> Iterable[tuple[str, Any]]:
        """Yield what `hfft predict` was given as pairs of its name and its value.

        Raises:
            InputError: something can't be read.
        """

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[Any], dict[str, Any]]:
        """Return what answers one value of `read_inputs`: here, the pipeline of the task's name."""
        # transformers' own annotation lists its tasks' names
        run: Any = pipeline(
            self.name,  # type: ignore[call-overload]
            model=str(folder),
            trust_remote_code=trust_remote_code,
        )
        return lambda value: {"scores": run(value)}

    def told(self, answer: Mapping[str, Any]) -> str:
        """Return a predictor's answer as a person reads it, in a line."""
        return "  ".join(f"{s['label']} {s['score']:.4f}" for s in answer["scores"])
