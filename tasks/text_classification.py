"""Text, or a pair of texts, to one class, to several at once, or to a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PretrainedConfig, pipeline

from hfft.registry import register
from hfft.task import (
    Collate,
    Column,
    ModelConfig,
    Row,
    Section,
    Split,
    Task,
    Transform,
    draw_confusion,
    scores_by_class,
)
from hfft.text.inputs import IGNORED, Padding, TextOptions, load_tokenizer, longest, read_records
from hfft.text.pooling import own_pooling, with_pooling

ProblemType = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]  # transformers' own names


class Head(Section):
    """What the classifier sees of a text."""

    pooling: Literal["auto", "cls", "mean", "max", "last"] = Field(
        "auto",
        description="of the tokens' hidden states: the first, their mean, the greatest of each "
        "value, the last; auto: as the source was pretrained for sentences, else as transformers' "
        "own classifier of the model",
    )


class ClassificationOptions(TextOptions):
    """The task's own keys."""

    problem_type: ProblemType = Field(
        "single_label_classification",
        description="one class a text; several at once, or none; or a number",
    )
    head: Head = Field(default_factory=Head, description="what the classifier sees of a text")


def _single_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score logits of shape (N, classes) against classes of shape (N,)."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guesses = logits.argmax(axis=-1)
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, guesses)),
    }


def _multi_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score logits of shape (N, classes) against ones and zeros; accuracy: all classes right."""
    from sklearn.metrics import accuracy_score, f1_score

    guesses, labels = logits > 0, labels > 0
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0)),
        "micro_f1": float(f1_score(labels, guesses, average="micro", zero_division=0)),
    }


def _regression_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score logits of shape (N, 1) against numbers of shape (N,)."""
    guesses = logits[:, 0].astype(np.float64)
    return {
        "pearson": _correlation(guesses, labels),
        "spearman": _correlation(_ranks(guesses), _ranks(labels)),
        "mse": float(np.mean((guesses - labels) ** 2)),
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation; 0 where there is none, as with a constant."""
    if not np.ptp(one) or not np.ptp(other):
        return 0.0
    return float(np.nan_to_num(np.corrcoef(one, other)[0, 1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return each value's place in their order; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray = counts.cumsum() - (counts - 1) / 2
    return means[which]


@dataclass(frozen=True)
class _Problem:
    """What goes with a problem type.

    Attributes:
        role: of the labels' column.
        column: that column.
        metrics: their names; the first says whether fine-tuning helped.
        scores: every metric, from logits and labels.
        lower_is_better: those of the metrics of which less is better.
    """

    role: str
    column: Column
    metrics: tuple[str, ...]
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    lower_is_better: tuple[str, ...] = ()


_PROBLEMS: dict[ProblemType, _Problem] = {
    "single_label_classification": _Problem(
        "label",
        Column("label", ("label", "labels", "class", "target", "category", "sentiment", "intent")),
        ("accuracy", "macro_f1", "matthews"),
        _single_label_scores,
    ),
    "multi_label_classification": _Problem(
        "labels",
        Column("labels", ("labels", "label", "classes", "categories", "tags", "topics", "genres")),
        ("macro_f1", "micro_f1", "accuracy"),
        _multi_label_scores,
    ),
    "regression": _Problem(
        "label",
        Column("number", ("label", "score", "similarity_score", "target")),
        ("spearman", "pearson", "mse"),
        _regression_scores,
        lower_is_better=("mse",),
    ),
}

_TEXT = Column(
    "text",
    (
        *("text", "sentence", "sentence1", "text1", "premise", "question1", "review", "content"),
        *("body", "comment_text", "comment", "tweet", "document", "utterance", "headline", "query"),
    ),
)
_PAIR = Column(
    "text",
    ("text_pair", "sentence2", "text2", "hypothesis", "question2", "passage"),
    optional=True,
)


@register("text-classification")
class TextClassification(Task):
    """Text or a pair to classes, by (binary) cross-entropy, or to a number, by squared error."""

    Options = ClassificationOptions
    auto_model = AutoModelForSequenceClassification
    model_suffix = "ForSequenceClassification"
    checked = True

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        problem = _PROBLEMS[self._own.problem_type]
        self.columns = {"text": _TEXT, "text_pair": _PAIR, problem.role: problem.column}
        self.metric_names, self.metric = problem.metrics, problem.metrics[0]
        self.lower_is_better = problem.lower_is_better

    @classmethod
    def options_of(cls, config: PretrainedConfig) -> dict[str, Any]:
        """Return the kind of problem, which transformers' configs tell."""
        return {"problem_type": config.problem_type} if config.problem_type else {}

    @property
    def _own(self) -> ClassificationOptions:
        """The options, of this task's type."""
        return cast(ClassificationOptions, self.options)

    @property
    def augments(self) -> bool:
        """Nothing is random."""
        return False

    @property
    def smooths(self) -> bool:
        """Whether there are classes, not numbers."""
        return self._own.problem_type != "regression"

    def flaws(self, rows: Mapping[str, list[Any]]) -> list[str]:
        """Find numbers that can't be learned, since they mean "no label" to the engine."""
        if self._own.problem_type != "regression":
            return [""] * len(rows["text"])
        said = f"has the number {IGNORED}, which marks what has no label; rescale the numbers"
        return [said if number == IGNORED else "" for number in rows["label"]]

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Choose the pooling, and with it the class of the model; name what it tells apart."""
        config = with_pooling(config, self._own.head.pooling)
        config.problem_type = self._own.problem_type
        if self._own.problem_type == "regression":
            config.num_labels = 1  # leaves the name of a single output as it is
        else:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the source's tokenizer, made to pad where the classifier expects it."""
        tokenizer = load_tokenizer(source, config)
        if config.model_type != "xlnet":  # it reads the last position, whatever stands there
            tokenizer.padding_side = "right"  # leaves positions, and what comes before, alone
        if own_pooling(config) == "last":  # its classifier finds the end by this number
            for part in (config, config.get_text_config()):
                part.pad_token_id = tokenizer.pad_token_id
        return tokenizer

    def encode(self, processor: Any, config: PretrainedConfig) -> TextEncoder:
        """Return what tokenizes texts, or pairs as one sequence."""
        limit = longest(processor, config, self._own.max_length)
        role = _PROBLEMS[self._own.problem_type].role
        return TextEncoder(processor, limit, role)

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return encoded text to the model's inputs, and `labels`: as the data has them."""
        names = [name for name in processor.model_input_names if name != "attention_mask"]
        problem = self._own.problem_type
        role = _PROBLEMS[problem].role

        def inputs(row: Row) -> dict[str, Any]:
            labels = row[role]
            if problem == "multi_label_classification":
                labels = np.array(labels, dtype=np.int64)  # an empty list is of no type
            return {name: row[name] for name in names if name in row} | {"labels": labels}

        return inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Return what pads inputs to (B, T), with labels (B,), or of several classes (B, K)."""
        pad, problem = Padding.of(processor), self._own.problem_type
        classes = len(config.id2label or ())

        def stacked(found: Sequence[Any]) -> Tensor:
            if problem == "multi_label_classification":
                return _multi_hot(found, classes)
            return torch.tensor(found, dtype=torch.float if problem == "regression" else torch.long)

        def collate(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            return {**pad(inputs), "labels": stacked([example["labels"] for example in inputs])}

        return collate

    def loss(
        self, outputs: Any, labels: Tensor, items: Tensor | int | None = None, smoothing: float = 0
    ) -> Tensor:
        """Return the cross-entropy, of each class for itself where there may be several.

        Of numbers, the squared error.

        Args:
            outputs: the model's; logits of shape (B, classes).
            labels: classes (B,), ones and zeros (B, classes), or numbers (B,).
            items: labels that count in all micro-batches of all processes; None: in this batch.
            smoothing: of classes; 1 becomes 1 - smoothing / 2 where there may be several.
        """
        problem = self._own.problem_type
        if problem == "single_label_classification":
            return super().loss(outputs, labels, items, smoothing)
        kept = labels != IGNORED
        logits = outputs.logits.float().view(labels.shape)[kept]
        targets = labels[kept].float()
        if problem == "regression":
            total = functional.mse_loss(logits, targets, reduction="sum")
        else:
            targets = targets * (1 - smoothing) + smoothing / 2
            total = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return total / torch.as_tensor(kept.sum() if items is None else items).clamp(min=1)

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score logits of shape (N, classes), or (N, 1) for numbers."""
        return _PROBLEMS[self._own.problem_type].scores(predictions, labels)

    def scores_by_label(
        self, predictions: Any, labels: np.ndarray, split: Split
    ) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of examples of each class."""
        match self._own.problem_type:
            case "single_label_classification":
                return scores_by_class(labels, predictions.argmax(axis=-1), split.labels)
            case "multi_label_classification":
                return scores_by_class(labels > 0, predictions > 0, split.labels)
        return []

    def draw(self, folder: Path, predictions: Any, labels: np.ndarray, split: Split) -> list[Path]:
        """Draw the confusion matrix, where each text is of one class."""
        if self._own.problem_type != "single_label_classification":
            return []
        return [draw_confusion(folder, labels, predictions.argmax(axis=-1), split.labels)]

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield texts, or records of a `text` and, for pairs, a `text_pair`."""
        return read_records(given, ("text",), alone="text", optional=("text_pair",))

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[Any], dict[str, Any]]:
        """Return what answers a record with every class's score, or with a number."""
        run: Any = pipeline(
            "text-classification", model=str(folder), trust_remote_code=trust_remote_code
        )
        limit = longest(run.tokenizer, run.model.config, self._own.max_length)
        options = {"truncation": True, "max_length": limit} if limit is not None else {}

        def answer(value: Mapping[str, str]) -> dict[str, Any]:
            scores = run(dict(value), top_k=None, **options)
            if run.model.config.problem_type == "regression":
                return {"score": scores[0]["score"]}
            return {"scores": scores}

        return answer

    def told(self, answer: Mapping[str, Any]) -> str:
        """Return classes with their scores, the likeliest first, or the number."""
        return super().told(answer) if "scores" in answer else f"{answer['score']:.4f}"


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizes batches of texts or pairs; a class, since it is pickled.

    Attributes:
        tokenizer: the model's.
        limit: tokens that an example may have; None: any number.
        role: the column that is kept: the labels'.
    """

    tokenizer: Any
    limit: int | None
    role: str

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the tokenizer's columns, whether an example lost its end, and the labels."""
        columns = self._tokenized(rows)
        limit = self.limit
        lengths = [len(tokens) for tokens in columns["input_ids"]]
        overlong = [n for n, length in enumerate(lengths) if limit is not None and length > limit]
        truncated = [False] * len(lengths)
        if overlong:
            longer = {name: [values[n] for n in overlong] for name, values in rows.items()}
            cut = self._tokenized(longer, truncation="longest_first", max_length=limit)
            for place, number in enumerate(overlong):
                truncated[number] = True
                for name, values in columns.items():
                    values[number] = cut[name][place]
        return {**columns, "truncated": truncated, self.role: rows[self.role]}

    def _tokenized(self, rows: Mapping[str, list[Any]], **options: Any) -> dict[str, list[Any]]:
        found = self.tokenizer(
            rows["text"],
            rows.get("text_pair"),
            return_attention_mask=False,
            verbose=False,  # of texts longer than the model takes: they are told of by the engine
            **options,
        )
        return {name: list(values) for name, values in found.items()}


def _multi_hot(found: Sequence[Sequence[int]], classes: int) -> Tensor:
    """Return 1 for each class that an example is of, else 0: (B, classes), as floats."""
    labels = torch.zeros(len(found), classes)
    for row, own in zip(labels, found, strict=True):
        row[list(own)] = 1
    return labels
