"""Words to tags: entities in BIO, BIOES or BILOU tags, or plain tags such as parts of speech."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForTokenClassification, PretrainedConfig

from hfft.registry import register
from hfft.task import Collate, Column, Encode, InputError, ModelConfig, Row, Split, Task, Transform
from hfft.text.inputs import IGNORED, Padding, TextOptions, load_tokenizer, longest, read_records
from hfft.text.language_scores import language_metrics, score_tokens
from hfft.text.tags import OUTSIDE, TAG_SCHEMES, TagScheme


class TokenOptions(TextOptions):
    """The task's own keys."""

    label_subwords: Literal["first", "all"] = Field(
        "first", description="which of the pieces that the tokenizer cuts a word into learn its tag"
    )
    scheme: Literal["auto", "bio", "bioes", "bilou", "none"] = Field(
        "auto",
        description="how tags mark entities: bio (IOB2), bioes, bilou; none: plain tags, such as "
        "parts of speech; auto: by their names",
    )


@register("token-classification")
class TokenClassification(Task):
    """The tag of each word, by cross-entropy over its first piece or all of its pieces.

    Scores are those of whole examples: words beyond the model's length, and words that the
    tokenizer has no piece for, count as predicted O. An entity counts as found where all of its
    words and its type are right and its tags well-formed, as seqeval's strict mode has it; plain
    tags are averaged over the tags seen.
    """

    columns: Mapping[str, Column] = {
        "words": Column("words", ("tokens", "words")),
        "tags": Column("tags", ("ner_tags", "tags", "pos_tags", "labels")),
    }
    Options = TokenOptions
    metric_names = ("f1", "precision", "recall", "accuracy")
    metric = "f1"
    auto_model = AutoModelForTokenClassification
    model_suffix = "ForTokenClassification"
    checked = True

    @property
    def _own(self) -> TokenOptions:
        """The options, of this task's type."""
        return cast(TokenOptions, self.options)

    @property
    def augments(self) -> bool:
        """Never."""
        return False

    def flaws(self, rows: Mapping[str, list[Any]]) -> list[str]:
        """Return where there are no words, or not as many tags."""
        return [_flaw(*row) for row in zip(rows["words"], rows["tags"], strict=True)]

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Name the tags."""
        self._scheme(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the model's tokenizer, which has to tell which word a piece is of."""
        tokenizer = load_tokenizer(source, config)
        if not tokenizer.is_fast:
            raise InputError(
                f"model: {source.name}: its {type(tokenizer).__name__} doesn't tell which word a "
                f"piece is of, as this task needs it; take a model with a tokenizer.json"
            )
        return tokenizer

    def encode(self, processor: Any, config: PretrainedConfig) -> Encode:
        """Return words to pieces, each with its word's place (`word_ids`; -1: none) and label."""
        limit = longest(processor, config, self._own.max_length)
        label_pieces = self._labelling(_names(config))

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            made = _cut(processor, rows["words"], limit)
            places = [_word_ids(pieces) for pieces in made]
            columns = {
                "index": rows["index"],
                "word_ids": places,
                "labels": [label_pieces(*pair) for pair in zip(places, rows["tags"], strict=True)],
                "truncated": [bool(pieces.overflowing) for pieces in made],
            }
            inputs = [_inputs(processor, pieces) for pieces in made]
            return columns | {name: [one[name] for one in inputs] for name in inputs[0]}

        return encode

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return encoded example to the model's inputs and `labels`, each of T numbers."""
        names = {"input_ids", "token_type_ids", "labels"}

        def inputs(row: Row) -> dict[str, Any]:
            return {name: value for name, value in row.items() if name in names}

        return inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Return what pads to (B, T), on the right, where it moves no piece from its place."""
        return replace(Padding.of(processor, labels=IGNORED), side="right")

    def reduce(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest tag of each piece, (B, T), and each example's loss, (B, 3)."""
        return outputs.logits.argmax(dim=-1), score_tokens(outputs.logits, labels)

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score entities, all together, or plain tags, on average; and count the right tags.

        The loss is the mean over all labels, whichever batches they came in.
        """
        tags, losses = predictions
        scores = self._scheme(split.labels).scores(*self._read(tags, split))
        return {"loss": language_metrics(losses)["loss"], **scores}

    def scores_by_label(
        self, predictions: Any, labels: np.ndarray, split: Split
    ) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of entities of each type, or of each tag."""
        tags, _ = predictions
        return self._scheme(split.labels).scores_by_label(*self._read(tags, split))

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, str | list[str]]]:
        """Yield texts, and from JSON Lines `text`, or `words` as they are cut."""
        for place, record in read_records(given, (), alone="text", optional=("text", "words")):
            value = record.get("words", record.get("text"))
            words = value if isinstance(value, list) else [value]
            if not words or not all(isinstance(word, str) for word in words):
                raise InputError(
                    f'{place}: expected {{"text": "..."}} or {{"words": ["...", ...]}}'
                )
            yield place, cast("str | list[str]", value)

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[str | list[str]], dict[str, Any]]:
        """Return text, or words, to its entities, or to its words where tags are plain.

        Texts are cut into words, and entities read, as for training and scores: pieces joined by
        transformers.pipeline would know neither BIOES nor words without a space between them.
        Longer ones than the model takes are read in several parts.
        """
        source = ModelConfig(name=str(folder), trust_remote_code=trust_remote_code)
        model = self.auto_model.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        tokenizer = self.load_processor(source, model.config)
        collate = self.collator(tokenizer, model.config)
        limit = longest(tokenizer, model.config, self._own.max_length)
        names = _names(model.config)
        scheme = self._scheme(names)

        def tag(words: list[str]) -> tuple[list[str], list[float]]:
            """Return each word's tag, and its probability at the first piece."""
            tags, scores = [OUTSIDE] * len(words), [0.0] * len(words)
            [whole] = _cut(tokenizer, [words], limit)
            for part in (*reversed(whole.overflowing), whole):  # a word is read where it begins
                inputs = collate([_inputs(tokenizer, part)])
                with torch.inference_mode():
                    logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits
                highest, numbers = logits[0].float().softmax(-1).max(-1)
                likeliest = [names[number] for number in numbers.tolist()]
                for word, first, own in self._word_tags(scheme, _word_ids(part), likeliest):
                    tags[word], scores[word] = own, float(highest[first])
            return tags, scores

        def answer(value: str | list[str]) -> dict[str, Any]:
            text = value if isinstance(value, str) else " ".join(value)
            spans = _words(tokenizer, text) if isinstance(value, str) else _joined(value)
            tags, scores = tag([text[start:end] for start, end in spans]) if spans else ([], [])
            found = []
            for label, first, end in scheme.entities(tags):
                start, stop = spans[first][0], spans[end - 1][1]
                place = {"text": text[start:stop], "start": start, "end": stop}
                found.append({"label": label, **place, "score": float(np.mean(scores[first:end]))})
            return {"entities": found}

        return answer

    def told(self, answer: Mapping[str, Any]) -> str:
        """Return `PER[John Smith] 0.99  LOC[Paris] 0.98`."""
        found = [f"{e['label']}[{e['text']}] {e['score']:.2f}" for e in answer["entities"]]
        return "  ".join(found) or "no entities"

    def _scheme(self, labels: Sequence[str]) -> TagScheme:
        """Return the scheme that is asked for, or the first that fits the tags."""
        asked = self._own.scheme
        if asked == "auto":
            return next(scheme for scheme in TAG_SCHEMES.values() if scheme.fits(labels))
        scheme = TAG_SCHEMES[asked]
        if not scheme.fits(labels):
            marks = ", ".join(f"{mark}-..." for mark in f"BI{scheme.last}{scheme.single}")
            raise InputError(
                f"task.scheme: {asked} needs tags such as O, {marks}; the data has "
                f"{', '.join(labels[:10])}; leave the scheme out, or set it to none"
            )
        return scheme

    def _labelling(self, names: Sequence[str]) -> Callable[[list[int], list[int]], list[int]]:
        """Return what labels pieces, given their words' places and all words' tags."""
        scheme = self._scheme(names)
        numbers = {name: number for number, name in enumerate(names)}

        def labels(word_ids: list[int], tags: list[int]) -> list[int]:
            found = []
            for word, run in groupby(word_ids):
                pieces = len(list(run))
                if word < 0:
                    found += [IGNORED] * pieces
                elif self._own.label_subwords == "first":
                    found += [tags[word]] + [IGNORED] * (pieces - 1)
                else:  # a tag that the data lacks is the word's own
                    spread = scheme.spread(names[tags[word]], pieces)
                    found += [numbers.get(name, tags[word]) for name in spread]
            return found

        return labels

    def _word_tags(
        self, scheme: TagScheme, word_ids: Sequence[int], tags: Sequence[str]
    ) -> Iterator[tuple[int, int, str]]:
        """Yield words, the place of their first piece, and their tag, of the pieces' tags."""
        for word, (first, last) in _places(word_ids).items():
            every = self._own.label_subwords == "all"
            yield word, first, scheme.gather(tags[first], tags[last]) if every else tags[first]

    def _read(self, tags: np.ndarray, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        """Return each example's tags, one a word, as they are and as they are predicted."""
        names, scheme = split.labels, self._scheme(split.labels)
        all_tags = list(split.rows["tags"])
        truth, guesses = [], []
        encoded = zip(split.encoded["index"], split.encoded["word_ids"], strict=True)
        for row, (index, word_ids) in zip(tags, encoded, strict=True):
            guess = [OUTSIDE] * len(all_tags[index])
            pieces = [names[number] for number in row[: len(word_ids)]]
            for word, _, tag in self._word_tags(scheme, word_ids, pieces):
                guess[word] = tag
            truth.append([names[tag] for tag in all_tags[index]])
            guesses.append(guess)
        return truth, guesses


def _flaw(words: Sequence[str], tags: Sequence[int]) -> str:
    if not words:
        return "has no words"
    return "" if len(words) == len(tags) else f"has {len(words)} words and {len(tags)} tags"


def _names(config: PretrainedConfig) -> list[str]:
    return [name for _, name in sorted((config.id2label or {}).items())]


def _cut(tokenizer: Any, words: Sequence[Sequence[str]], limit: int | None) -> Any:
    """Return each example's pieces as a `tokenizers.Encoding`, the rest `overflowing`."""
    # Byte-level tokenizers know a word within a text by the space before it, which lists of words
    # lack. Where the tokenizer doesn't add it (add_prefix_space of RoBERTa's does), we do.
    alone = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    whole = tokenizer("a a", add_special_tokens=False)["input_ids"]
    space = "" if alone == whole else " "
    return tokenizer(
        [[space + word for word in one] for one in words],
        is_split_into_words=True,
        truncation=limit is not None,
        max_length=limit,
    ).encodings


def _inputs(tokenizer: Any, pieces: Any) -> dict[str, list[int]]:
    made = {"input_ids": pieces.ids}
    if "token_type_ids" in tokenizer.model_input_names:
        made["token_type_ids"] = pieces.type_ids
    return made


def _word_ids(pieces: Any) -> list[int]:
    return [-1 if word is None else word for word in pieces.word_ids]


def _places(word_ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return the places of each word's first and last piece."""
    places: dict[int, tuple[int, int]] = {}
    for place, word in enumerate(word_ids):
        if word >= 0:
            places[word] = (places.get(word, (place,))[0], place)
    return places


def _words(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Return where the words of a text are: as its tokenizer has them, punctuation apart."""
    [pieces] = tokenizer([text], add_special_tokens=False, verbose=False).encodings
    spans = [
        (pieces.offsets[first][0], pieces.offsets[last][1])
        for first, last in _places(_word_ids(pieces)).values()
    ]
    found = []
    for start, end in spans:
        parts = re.finditer(r"\w+|[^\w\s]", text[start:end])
        found += [(start + part.start(), start + part.end()) for part in parts]
    return found


def _joined(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return where words are once they are joined by spaces."""
    starts = accumulate((len(word) + 1 for word in words), initial=0)
    return [(start, start + len(word)) for start, word in zip(starts, words, strict=False)]
