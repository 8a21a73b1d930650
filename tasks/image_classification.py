"""Image to class: any timm model or image classifier of transformers, CLIP with its own head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from hfft.contrastive.prompts import Templates
from hfft.contrastive.zero_shot import with_zero_shot_head
from hfft.reach import unreached
from hfft.registry import register
from hfft.task import (
    Collate,
    Column,
    ModelConfig,
    Row,
    Split,
    Task,
    Transform,
    draw_confusion,
    scores_by_class,
)
from hfft.vision.inputs import (
    IMAGE,
    ImageOptions,
    adapt_config,
    image_transform,
    load_image_processor,
    read_images,
    stack_pixels,
)

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""Of Radford et al. 2021, for classes of no kind in particular."""


class ClassificationOptions(ImageOptions):
    """The task's own keys."""

    head: Literal["new", "zero-shot"] = Field(
        "new",
        description="new: the source's own for the same classes, else a new one; zero-shot: of a "
        "CLIP or SigLIP, what its text tower makes of the classes' names",
    )
    templates: Templates | None = Field(
        None,
        strict=False,
        min_length=1,
        description="of head: zero-shot, sentences with {} for the name of a class, whose "
        "embeddings are averaged; default: `a photo of a {}.`",
    )

    @model_validator(mode="after")
    def _of_a_head(self) -> ClassificationOptions:
        if self.templates is not None and self.head == "new":
            raise ValueError("templates go with head: zero-shot")
        return self


@register("image-classification")
class ImageClassification(Task):
    """Image to one of several classes, by cross-entropy."""

    columns: Mapping[str, Column] = {
        "image": IMAGE,
        "label": Column("label", ("label", "labels", "class", "target", "category", "cls")),
    }
    Options = ClassificationOptions
    metric_names = ("accuracy", "macro_f1")
    metric = "accuracy"
    auto_model = AutoModelForImageClassification
    model_suffix = "ForImageClassification"

    @property
    def _own(self) -> ClassificationOptions:
        """The options, of this task's type."""
        return cast(ClassificationOptions, self.options)

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        return self._own.augments

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Name the classes and, where options ask for it, change head and input size."""
        if self._own.head == "zero-shot":
            config = with_zero_shot_head(config, self._own.templates or DEFAULT_TEMPLATES)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
        if isinstance(config, TimmWrapperConfig):
            config.label_names = list(labels)
        else:  # models with a distillation head beside the head return no loss
            names = config.architectures or []
            config.architectures = [name.removesuffix("WithTeacher") for name in names]
        adapt_config(config, self._own)
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the model's own image processor, at the size the options ask for."""
        return load_image_processor(source, config, self._own)

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return image to `pixel_values` of shape (C, H, W) and its class number."""
        prepare = image_transform(processor, self._own, training=training)

        def inputs(row: Row) -> dict[str, Any]:
            return {"pixel_values": prepare(row["image"]), "labels": row["label"]}

        return inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Stack to `pixel_values` of shape (B, C, H, W) and `labels` of shape (B,)."""

        def collate(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            return {
                "pixel_values": stack_pixels([example["pixel_values"] for example in inputs]),
                "labels": torch.tensor([example["labels"] for example in inputs]),
            }

        return collate

    def idle(
        self, model: PreTrainedModel, batch: Callable[[], Mapping[str, Any]]
    ) -> frozenset[str]:
        """Return what models have that their classifiers leave out."""
        inputs = {"pixel_values": batch()["pixel_values"]}
        return unreached(model, inputs, lambda outputs: outputs.logits)

    def read_inputs(self, given: Sequence[str]) -> list[tuple[str, Any]]:
        """Open image files, and all images in folders."""
        return read_images(given)

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score logits of shape (N, classes): accuracy, and F1 averaged over the classes seen."""
        guesses = predictions.argmax(axis=-1)
        return {
            "accuracy": float(accuracy_score(labels, guesses)),
            "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0)),
        }

    def scores_by_label(
        self, predictions: Any, labels: np.ndarray, split: Split
    ) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of examples of each class."""
        return scores_by_class(labels, predictions.argmax(axis=-1), split.labels)

    def draw(self, folder: Path, predictions: Any, labels: np.ndarray, split: Split) -> list[Path]:
        """Draw the confusion matrix; beyond 40 classes without names and numbers."""
        return [draw_confusion(folder, labels, predictions.argmax(axis=-1), split.labels)]
