"""Question to the span of a text that answers it, or to none: BERT and the like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PretrainedConfig

from hfft.registry import register
from hfft.task import Collate, Column, InputError, ModelConfig, Row, Split, Task, Transform
from hfft.text.inputs import Padding, TextOptions, load_tokenizer, longest, read_records
from hfft.text.squad import best_spans, squad_scores

INPUTS = ("input_ids", "token_type_ids")
"""What of a window is the model's."""

USUAL_LENGTH = 384
"""Tokens of a window where none are asked for: as SQuAD's models have had since BERT."""

WINDOWS_AT_ONCE = 16
"""How many windows of a long context are predicted in a batch."""


class QuestionAnsweringOptions(TextOptions):
    """The task's own keys."""

    max_length: int | None = Field(
        None,
        gt=0,
        description=f"tokens of a window; default: {USUAL_LENGTH}, if the model takes so many",
    )
    overlong: Literal["truncate", "error"] = Field(
        "truncate",
        description="what questions do that leave no room to their context, which is never cut "
        "short itself: lose their end, or stop the run",
    )
    stride: int = Field(128, ge=0, description="tokens that a window shares with the next")
    max_answer_length: int = Field(30, gt=0, description="tokens that an answer may have")
    no_answer_threshold: float | None = Field(
        0.0,
        description="a question is left unanswered where that scores higher than the best answer "
        "by more than this; null: never. Data without an unanswerable question don't need it",
    )


@register("question-answering")
class QuestionAnswering(Task):
    """The start and the end of an answer, each by cross-entropy over a window's tokens."""

    columns: Mapping[str, Column] = {
        "question": Column("text", ("question",)),
        "context": Column("text", ("context", "passage", "paragraph")),
        "answers": Column("answers", ("answers",)),
    }
    Options = QuestionAnsweringOptions
    metric_names = (
        "exact_match",
        "f1",
        "has_answer_f1",
        "no_answer_accuracy",
        "best_f1",
        "best_f1_threshold",
    )
    metric = "f1"
    auto_model = AutoModelForQuestionAnswering
    model_suffix = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
    checked = True

    @property
    def _own(self) -> QuestionAnsweringOptions:
        """The options, of this task's type."""
        return cast(QuestionAnsweringOptions, self.options)

    @property
    def augments(self) -> bool:
        """Nothing is random."""
        return False

    def flaws(self, rows: Mapping[str, list[Any]]) -> list[str]:
        """Look for the answer that is learned, the first, in its context."""
        return [
            _flaw(context, answers)
            for context, answers in zip(rows["context"], rows["answers"], strict=True)
        ]

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Give the model two outputs a token: whether an answer starts, or ends, there."""
        config.num_labels = 2
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the source's tokenizer, which must know where its tokens stand in a text."""
        tokenizer = load_tokenizer(source, config)
        if not tokenizer.is_fast:
            raise InputError(
                f"model: {source.name}: its tokenizer doesn't tell where tokens stand in a text, "
                f"which answers are cut out by; take a model with a fast one (tokenizer.json)"
            )
        return tokenizer

    def encode(self, processor: Any, config: PretrainedConfig) -> Windows:
        """Return what cuts questions with their contexts into windows."""
        limit = longest(processor, config, self._own.max_length)
        if self._own.max_length is None:
            limit = min(limit or USUAL_LENGTH, USUAL_LENGTH)
        return Windows.of(processor, cast(int, limit), self._own.stride)

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return what leaves of a window the model's inputs, and `labels`: start and end."""
        return _inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Return what pads windows to (B, T) and stacks labels to (B, 2)."""
        # on the right whatever the tokenizer's habit: places of tokens are counted from the left
        pad = replace(Padding.of(processor), side="right")

        def collate(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            return {**pad(inputs), "labels": torch.tensor([one["labels"] for one in inputs])}

        return collate

    def loss(
        self, outputs: Any, labels: Tensor, items: Tensor | int | None = None, smoothing: float = 0
    ) -> Tensor:
        """Return the mean cross-entropy of starts and ends, labels of shape (B, 2)."""
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)  # (B, 2, T)
        return super().loss(SimpleNamespace(logits=logits), labels, items, smoothing)

    def reduce(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of starts and of ends, (B, T) both."""
        return outputs.start_logits, outputs.end_logits

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score the best span of each example's windows, as SQuAD does but as shares of 1."""
        golds = [answers["text"] for answers in split.rows["answers"]]
        windows = split.encoded.select_columns(["index", "starts", "ends", "null"])[:]
        starts, ends = predictions
        spans = best_spans(starts, ends, windows, len(golds), self._own.max_answer_length)
        places = zip(split.rows["context"], spans.start, spans.end, strict=True)
        texts = [context[start:end] for context, start, end in places]
        return squad_scores(texts, golds, spans.margin, self._own.no_answer_threshold)

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield questions with contexts: two texts, or JSON Lines of both."""
        if len(given) == 2 and all(map(_is_text, given)):
            yield given[0], {"question": given[0], "context": given[1]}
            return
        yield from read_records(given, ("question", "context"), alone=None)

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[Any], dict[str, Any]]:
        """Return what answers a question with its context, as evaluation does."""
        model = self.auto_model.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        source = ModelConfig(name=str(folder), trust_remote_code=trust_remote_code)
        tokenizer = self.load_processor(source, model.config)
        cut = self.encode(tokenizer, model.config)
        collate = self.collator(tokenizer, model.config)
        most, threshold = self._own.max_answer_length, self._own.no_answer_threshold

        @torch.inference_mode()
        def answer(value: Mapping[str, str]) -> dict[str, Any]:
            row = {**value, "answers": {"text": [], "answer_start": []}, "index": 0}
            windows = cut({role: [one] for role, one in row.items()})
            starts, ends = _logits(model, windows, collate)
            spans = best_spans(starts, ends, windows, 1, most)
            if threshold is not None and spans.margin[0] > threshold:
                return {"answer": "", "score": float(spans.no_chance[0]), "start": 0, "end": 0}
            start, end = int(spans.start[0]), int(spans.end[0])
            found = value["context"][start:end]
            return {"answer": found, "score": float(spans.chance[0]), "start": start, "end": end}

        return answer

    def told(self, answer: Mapping[str, Any]) -> str:
        """Return the answer with its probability."""
        return f"{answer['answer'] or '(no answer)'}  {answer['score']:.4f}"


@dataclass(frozen=True)
class Windows:
    """Cuts contexts into overlapping windows, each with its question before it.

    A question may take half of what the shared tokens leave, so that windows move on by no less
    than the other half; longer ones lose their end.

    Attributes:
        tokenizer: a fast one.
        length: tokens of a window at most, special ones and the question's among them.
        room: tokens that the special ones leave.
        stride: tokens of the context that neighbouring windows share.
    """

    tokenizer: Any
    length: int
    room: int
    stride: int

    @classmethod
    def of(cls, tokenizer: Any, length: int, stride: int) -> Windows:
        """Check the numbers against each other.

        Raises:
            InputError: there is no room left.
        """
        room = length - tokenizer.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise InputError(
                f"task.max_length: {length} tokens have no room for a question and its context; "
                f"take some hundred"
            )
        if stride > room - 2:
            raise InputError(
                f"task.stride: windows of {length} tokens (task.max_length) can't share {stride} "
                f"and still move on; take at most {room - 2}, better {room // 3}"
            )
        return cls(tokenizer, length, room, stride)

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return one or more windows for each example.

        Returns:
            The tokenizer's inputs; `labels`, the first and the last token of the first answer, or
            twice the null token where the window doesn't hold it whole; `index`, the example's;
            `starts` and `ends`, for each token the characters of the context, -1 elsewhere;
            `null`, the token that stands for "no answer"; `truncated`, of the question, said
            once.
        """
        questions, cut = self._questions(rows["question"])
        # as transformers' own script does for XLNet; a model that only looks back, whose tokenizer
        # may pad on the left too, must have read the question first
        backwards = self.tokenizer.padding_side == "left" and self.tokenizer.cls_token is not None
        pair = (rows["context"], questions) if backwards else (questions, rows["context"])
        encoded = self.tokenizer(
            *pair,
            truncation="only_first" if backwards else "only_second",
            max_length=self.length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        answers = [_place(*one) for one in zip(rows["context"], rows["answers"], strict=True)]
        windows: dict[str, list[Any]] = defaultdict(list)
        previous = None
        for number, example in enumerate(encoded["overflow_to_sample_mapping"]):
            ids = encoded["input_ids"][number]
            owner, context = encoded.sequence_ids(number), 0 if backwards else 1
            places = [
                place if one == context and place[0] < place[1] else (-1, -1)
                for one, place in zip(owner, encoded["offset_mapping"][number], strict=True)
            ]
            starts, ends = map(list, zip(*places, strict=True))
            null = self._null(ids)
            windows["labels"].append(_tokens(starts, ends, answers[example]) or [null, null])
            windows["index"].append(rows["index"][example])
            windows["starts"].append(starts)
            windows["ends"].append(ends)
            windows["null"].append(null)
            windows["truncated"].append(cut[example] and example != previous)
            previous = example
        return {**{name: encoded[name] for name in INPUTS if name in encoded}, **windows}

    def _questions(self, questions: Sequence[str]) -> tuple[list[str], list[bool]]:
        """Return questions without the tokens that are too many, and whether there were any."""
        most = (self.room - self.stride) // 2
        kept = [question.strip() for question in questions]
        encoded = self.tokenizer(kept, add_special_tokens=False, return_offsets_mapping=True)
        cut = [len(places) > most for places in encoded["offset_mapping"]]
        for number, places in enumerate(encoded["offset_mapping"]):
            if cut[number]:  # before the first token too many, which may be but a part of a letter
                kept[number] = kept[number][: places[most][0]]
        return kept, cut

    def _null(self, ids: Sequence[int]) -> int:
        """Return the place of the token that "no answer" points at."""
        for token in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id):
            if token in ids:
                return ids.index(token)
        return 0


def _inputs(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in (*INPUTS, "labels") if name in row}


def _flaw(context: str, answers: Mapping[str, list[Any]]) -> str:
    """Return what is wrong with an example's first answer; "" for nothing."""
    if not answers["text"] or _place(context, answers) is not None:
        return ""
    text, start = answers["text"][0], answers["answer_start"][0]
    times = context.count(text)
    if not times:
        return f'its answer "{text[:40]}" does not occur in the context'
    return f'its answer "{text[:40]}" occurs {times} times in the context, but not at {start}'


def _place(context: str, answers: Mapping[str, list[Any]]) -> tuple[int, int] | None:
    """Return the characters of the first answer: where it is said to be, else at its only place."""
    if not answers["text"]:
        return None
    text, start = answers["text"][0], answers["answer_start"][0]
    if not context.startswith(text, start):
        if context.count(text) != 1:
            return None
        start = context.index(text)
    inner = text.strip()  # spaces are no tokens
    start += text.index(inner)
    return start, start + len(inner)


def _tokens(
    starts: Sequence[int], ends: Sequence[int], answer: tuple[int, int] | None
) -> list[int] | None:
    """Return the first and the last token of an answer; None where a window lacks part of it.

    Args:
        starts: of each of T tokens, in characters of the context; -1 for other tokens.
        ends: as `starts`.
        answer: its characters.
    """
    if answer is None:
        return None
    begin, end = answer
    inside = [n for n, one in enumerate(starts) if one < end and ends[n] > begin]
    if not inside or starts[inside[0]] > begin or ends[inside[-1]] < end:
        return None
    return [inside[0], inside[-1]]


def _logits(
    model: Any, windows: Mapping[str, list[Any]], collate: Collate
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of starts and of ends, (N, T) both, predicted some windows at a time."""
    rows = (dict(zip(windows, row, strict=True)) for row in zip(*windows.values(), strict=True))
    batch = {name: one.to(model.device) for name, one in collate(list(map(_inputs, rows))).items()}
    del batch["labels"]
    parts = zip(*(one.split(WINDOWS_AT_ONCE) for one in batch.values()), strict=True)
    outputs = [model(**dict(zip(batch, part, strict=True))) for part in parts]
    starts = torch.cat([one.start_logits for one in outputs])
    ends = torch.cat([one.end_logits for one in outputs])
    return starts.float().cpu().numpy(), ends.float().cpu().numpy()


def _is_text(given: str) -> bool:
    """Return whether an argument is meant as a text: no file, nor the name of one, nor a record."""
    text = given.strip()
    named = text.startswith("{") or text.endswith((".jsonl", ".json"))
    return text not in ("", "-") and not named and not isfile(given)
