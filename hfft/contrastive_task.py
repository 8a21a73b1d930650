"""What contrastive tasks share: two towers, a text one and another, that embed pairs alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from hfft.class_scores import draw_confusion, scores_by_class
from hfft.contrastive.embeddings import Embeddings, check_towers, embed_texts, scale_and_bias, unit
from hfft.contrastive.logits import loss_of_logits
from hfft.contrastive.losses import contrastive_loss
from hfft.contrastive.processor import PairProcessor
from hfft.contrastive.prompts import PairEncoder, Prompts, Templates, padding
from hfft.contrastive.ranks import retrieval_scores
from hfft.errors import InputError
from hfft.examples import Parts
from hfft.models.dual_encoder import DualEncoderConfig
from hfft.reach import unreached
from hfft.roles import Column
from hfft.sections import ModelConfig
from hfft.task import IGNORED, Collate, Row, Split, Task, Transform
from hfft.text.inputs import TextOptions, load_tokenizer, longest

CAPTIONS = Column(
    "captions",
    (
        *("caption", "captions", "text", "texts", "sentence", "sentences", "txt", "title"),
        *("alt_text", "description", "prompt", "transcription", "transcript"),
    ),
    optional=True,
)
CLASSES = Column("label", ("label", "labels", "class", "target", "category", "cls"), optional=True)


class ContrastiveOptions(TextOptions):
    """Keys that contrastive tasks have in common."""

    loss: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="over all pairs of the global batch: CLIP's, or SigLIP's"
    )
    templates: Templates | None = Field(
        None,
        strict=False,
        min_length=1,
        description="sentences with {} for the name of a class, such as `a photo of a {}.`, where "
        "the data has classes: their captions, unless it has its own, and what zero-shot "
        "classification averages over",
    )


@dataclass(frozen=True)
class Reference:
    """What scores need of the model itself.

    Attributes:
        scale: that similarities are multiplied by.
        bias: that is added to them, by a model of the sigmoid loss.
        classes: (K, D) embeddings of the classes, each of all templates; None: there are none.
    """

    scale: Tensor
    bias: Tensor | None
    classes: Tensor | None


class ContrastiveTask(Task):
    """Learns to embed what belongs together alike, and apart from the rest of the global batch.

    CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023). An example is a pair; of several
    captions each makes a pair. With classes and templates for their names in the place of captions
    it fine-tunes a classifier as the source was pretrained (FLYP, Goyal et al. 2023).

    A subclass says what the other tower reads.
    """

    Options = ContrastiveOptions
    auto_model = AutoModel
    open_classes = True
    other: ClassVar[str]
    """What the tower beside the text tower reads, `image`: a role, and part of names."""
    template: ClassVar[str]
    """How a class may be named, for messages."""
    other_config: ClassVar[str]
    """Where a model's config keeps that tower's."""
    column: Column
    """What the data has of it; options may decide."""

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        one, other = f"{self.other}_to_text", f"text_to_{self.other}"
        ranks = [f"{way}_recall_at_{k}" for way in (one, other) for k in (1, 5, 10)]
        medians = (f"{one}_median_rank", f"{other}_median_rank")
        self.columns = {self.other: self.column, "caption": CAPTIONS, "label": CLASSES}
        retrieval = ("recall_at_1", *ranks, *medians)
        if self._own.templates is None:
            del self.columns["label"]
            self.metric_names, self.metric = retrieval, "recall_at_1"
        else:
            self.metric_names = ("zero_shot_accuracy", *retrieval)
            self.metric = "zero_shot_accuracy"
        self.lower_is_better = medians

    @property
    def _own(self) -> ContrastiveOptions:
        """The options, of this task's type."""
        return cast(ContrastiveOptions, self.options)

    @classmethod
    def options_of(cls, config: PretrainedConfig) -> dict[str, Any]:
        """Return the loss that a model learned by, and the templates it was fine-tuned with."""
        own = "sigmoid" if "siglip" in config.model_type else "softmax"
        found = {"loss": getattr(config, "loss", own)}  # a dual encoder's says it
        if templates := getattr(config, "prompt_templates", None):
            found["templates"] = templates
        return found

    @classmethod
    def labels_of(cls, config: PretrainedConfig) -> list[str]:
        """Return the classes that a model was fine-tuned on; it has no output for each."""
        return list(getattr(config, "class_names", None) or ())

    @property
    def augments(self) -> bool:
        """Whether either half of a pair is changed, or drawn, at random."""
        return bool(self.drawn)

    @property
    def drawn(self) -> set[str]:
        """Which halves of a pair training draws at random: of classes, prompts."""
        drawn = {self.other} if self.augments_other else set[str]()
        return drawn | ({"text"} if len(self._own.templates or ()) > 1 else set())

    @property
    def augments_other(self) -> bool:
        """Whether `prepare` for training is random."""
        return True

    @property
    def smooths(self) -> bool:
        """A pair belongs together, or it doesn't."""
        return False

    def roles(self, found: Collection[str]) -> Collection[str]:
        """Take captions, and classes where there are templates for them."""
        if self._own.templates is None and "caption" not in found:
            raise InputError(
                "has no captions; map them (`data.columns.caption: NAME`), or, for data with "
                f'classes, say how to name one: `task.templates: ["{self.template}"]`'
            )
        if self._own.templates is not None and "label" not in found:
            raise InputError(
                "has no classes for task.templates; map them (`data.columns.label: NAME`), or "
                "leave task.templates out"
            )
        return found

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Choose the loss; the classes are remembered, but are no part of the model."""
        for kind, name in ((self.other, self.other_config), ("text", "text_config")):
            if getattr(config, name, None) is None:
                raise InputError(
                    f"model: {config.name_or_path or config.model_type} has no {kind} tower; take "
                    f"a two-tower model, or put one together: "
                    f"model.towers: {{{self.other}: NAME, text: NAME}}"
                )
        if isinstance(config, DualEncoderConfig) and not config.architectures:
            config.loss = self._own.loss  # of towers that have not met; others were trained by one
        for name, value in (("class_names", labels), ("prompt_templates", self._own.templates)):
            if self._own.templates is not None:
                setattr(config, name, list(value or ()))
            elif hasattr(config, name):
                delattr(config, name)  # of an earlier fine-tune
        return config

    def check_skeleton(self, model: PreTrainedModel) -> None:
        """Check that the model has what the loss learns."""
        check_towers(model, self._own.loss)

    def idle(
        self, model: PreTrainedModel, batch: Callable[[], Mapping[str, Any]]
    ) -> frozenset[str]:
        """Return what towers have that their embeddings leave out."""
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        found = unreached(model, inputs, lambda o: o[f"{self.other}_embeds"] + o["text_embeds"])
        return found - {"logit_scale", "logit_bias"}  # which the loss reads

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> PairProcessor:
        """Return the tokenizer, and what prepares the other tower's inputs."""
        other, tokenizer = self.load_other(source, config), load_tokenizer(source, config)
        return PairProcessor.of(config, other, tokenizer)

    @abstractmethod
    def load_other(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return what prepares the inputs of the tower beside the text tower."""

    @abstractmethod
    def prepare(self, processor: Any, *, training: bool) -> Callable[[Any], dict[str, Any]]:
        """Return the function from a value of the other role to that tower's inputs."""

    @abstractmethod
    def stack(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch what `prepare` returns; other keys of the examples are left out."""

    def encode(self, processor: PairProcessor, config: PretrainedConfig) -> PairEncoder:
        """Return what tokenizes captions, each of which makes a pair."""
        return PairEncoder(
            processor.tokenizer, self._prompts(processor.tokenizer, config), self.other
        )

    def _prompts(self, tokenizer: Any, config: PretrainedConfig) -> Prompts:
        return Prompts(
            tuple(getattr(config, "class_names", None) or ()),
            self._own.templates or (),
            longest(tokenizer, config, self._own.max_length),
        )

    def transform(self, processor: PairProcessor, *, training: bool) -> Transform:
        """Return a pair to its inputs, and `labels`: the identities of its two halves.

        In training a class's prompt is drawn from the templates.
        """
        prepare = self.prepare(processor.other, training=training)

        def tokens(row: Row) -> dict[str, Any]:
            if training and (prompts := row.get("prompts")):
                return {"input_ids": prompts[int(torch.randint(len(prompts), ()))]}
            return {"input_ids": row["input_ids"]}

        return Parts(
            {
                self.other: lambda row: prepare(row[self.other]),
                "text": tokens,
                "pair": lambda row: {"labels": [row[f"{self.other}_key"], row["text_key"]]},
            },
            random=self.drawn if training else (),
            originals={self.other},
        )

    def collator(self, processor: PairProcessor, config: PretrainedConfig) -> Collate:
        """Return what batches inputs: token ids (B, T), and labels (B, 2)."""
        pad = padding(processor.tokenizer, config)

        def collate(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            labels = torch.tensor([example["labels"] for example in inputs])
            return {**self.stack(inputs), **pad(inputs), "labels": labels}

        return collate

    def contrast(self, found: Embeddings, labels: Tensor, *, across: bool) -> Tensor:
        """Return the loss of a batch, as a sum over its 2 B items.

        Args:
            found: (B, D) embeddings of either tower.
            labels: (B, 2) identities.
            across: whether the batches of all processes are contrasted.
        """
        return contrastive_loss(
            self._own.loss,
            found.other,
            found.text,
            found.scale,
            found.bias,
            labels,
            across=across,
        )

    def loss(
        self, outputs: Any, labels: Tensor, items: Tensor | int | None = None, smoothing: float = 0
    ) -> Tensor:
        """Return the loss of this batch alone; training contrasts those of all processes.

        Args:
            outputs: the model's, with (B, B) logits.
            labels: (B, 2) identities of the pairs' halves.
            items: 2 a pair; None: those of this batch.
            smoothing: not had.
        """
        logits = getattr(outputs, f"logits_per_{self.other}")
        total = loss_of_logits(self._own.loss, logits, labels)
        count = (labels != IGNORED).sum() if items is None else items
        return total / torch.as_tensor(count).clamp(min=1)

    def reduce(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return both towers' embeddings, (B, D)."""
        return unit(outputs[f"{self.other}_embeds"]), unit(outputs["text_embeds"])

    def reference(self, model: Any, split: Split) -> Reference:
        """Return the model's scale and, of data with classes, what it embeds them as."""
        scale, bias = (None if x is None else x.detach() for x in scale_and_bias(model))
        assert scale is not None
        classes = None
        if self._own.templates is not None:
            tokenizer = split.processor.tokenizer
            prompts = self._prompts(tokenizer, model.config)
            batches = prompts.batches(tokenizer, model.config)
            found = embed_texts(model, batches, model.device)
            classes = prompts.by_class(found)
        return Reference(scale, bias, classes)

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score embeddings, (N, D) of either tower, over all of the split.

        Recall and median ranks each way; of data with classes, zero-shot accuracy. The loss is of
        all pairs at once, however large the batches were.
        """
        one, text = predictions
        scores = {"loss": self._loss_of_all(one, text, labels, split.reference)}
        if (found := self._classified(one, labels, split)) is not None:
            scores["zero_shot_accuracy"] = float(np.mean(found[0] == found[1]))
        return scores | retrieval_scores(one, text, labels, (self.other, "text"))

    def _loss_of_all(
        self, one: np.ndarray, text: np.ndarray, labels: np.ndarray, reference: Reference
    ) -> float:
        device = reference.scale.device
        total = contrastive_loss(
            self._own.loss,
            torch.from_numpy(one).to(device),
            torch.from_numpy(text).to(device),
            reference.scale,
            reference.bias,
            torch.from_numpy(labels).to(device),
        )
        return float(total) / (2 * len(labels))

    def scores_by_label(
        self, predictions: Any, labels: np.ndarray, split: Split
    ) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of examples of each class, if there are."""
        found = self._classified(predictions[0], labels, split)
        return [] if found is None else scores_by_class(*found, split.labels)

    def draw(self, folder: Path, predictions: Any, labels: np.ndarray, split: Split) -> list[Path]:
        """Draw the confusion matrix, where there are classes."""
        found = self._classified(predictions[0], labels, split)
        return [] if found is None else [draw_confusion(folder, *found, split.labels)]

    def _classified(
        self, one: np.ndarray, labels: np.ndarray, split: Split
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return classes, and those whose embeddings are nearest; None: there are no classes."""
        if (classes := split.reference.classes) is None:
            return None
        _, first = np.unique(labels[:, 0], return_index=True)  # captions repeat an image
        right = np.asarray(split.rows["label"])[np.asarray(split.encoded["row"])[first]]
        return right, (one[first] @ classes.cpu().numpy().T).argmax(axis=1)

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[Any], dict[str, Any]]:
        """Return what scores a record's candidates, or else the classes that were learned."""
        source = ModelConfig(name=str(folder), trust_remote_code=trust_remote_code)
        model = cast(Any, AutoModel).from_pretrained(folder, trust_remote_code=trust_remote_code)
        model.eval()
        processor = self.load_processor(source, model.config)
        known = self._prompts(processor.tokenizer, model.config)
        prepare = self.prepare(processor.other, training=False)

        @lru_cache(maxsize=32)
        def embedded(prompts: Prompts) -> Tensor:
            batches = prompts.batches(processor.tokenizer, model.config)
            return prompts.by_class(embed_texts(model, batches, model.device))

        @torch.no_grad()
        def answer(value: Mapping[str, Any]) -> dict[str, Any]:
            prompts = known.naming(value.get("candidates") or ())
            if not prompts.classes:
                raise InputError(
                    f"{folder}: has no classes of its own; give records "
                    f'{{"{self.other}": ..., "candidates": [...]}} as JSON Lines'
                )
            given = self.stack([prepare(value[self.other])])
            inputs = {name.removeprefix(f"{self.other}_"): one for name, one in given.items()}
            one = unit(getattr(model, f"get_{self.other}_features")(**inputs))
            scale, bias = scale_and_bias(model)
            logits = (one @ embedded(prompts).T)[0] * scale
            scores = logits.softmax(0) if bias is None else (logits + bias).sigmoid()
            ranked = sorted(zip(scores.tolist(), prompts.classes, strict=True), reverse=True)
            return {"scores": [{"label": name, "score": score} for score, name in ranked]}

        return answer
