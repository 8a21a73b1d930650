from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
from transformers import BertConfig, PretrainedConfig

from hfft import encoding
from hfft.encoding import Encoder
from hfft.errors import InputError
from hfft.task import Collate, Column, Encode, ModelConfig, Row, Section, Split, Task, Transform
from hfft.tasks.fill_mask import FillMask
from tests.text_runs import tokenizer

CALLS: list[int] = []


class Options(Section):
    limit: int = 6
    strict: bool = False
    rows: int | None = None


class Letters(Task):
    """A text's letters as token ids; spaces part it into several examples."""

    name = "letters"
    Options = Options
    columns: ClassVar = {"text": Column("text", ("text",))}
    metric_names = ()
    metric = "none"

    @property
    def truncates(self) -> bool:
        return not self.options.strict  # type: ignore[attr-defined]

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        return None

    def encode(self, processor: Any, config: PretrainedConfig) -> Encode:
        limit = self.options.limit  # type: ignore[attr-defined]

        def encoded(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            CALLS.append(len(batch["text"]))
            parts = [
                (index, part)
                for index, text in zip(batch["index"], batch["text"], strict=True)
                for part in text.split(" ")
            ]
            return {
                "index": [index for index, _ in parts],
                "input_ids": [list(map(ord, part[:limit])) for _, part in parts],
                "truncated": [len(part) > limit for _, part in parts],
            }

        return encoded

    def pack(self, lengths: np.ndarray, config: PretrainedConfig) -> list[np.ndarray] | None:
        rows = self.options.rows  # type: ignore[attr-defined]
        return None if rows is None else np.array_split(np.arange(len(lengths)), rows)

    def transform(self, processor: Any, *, training: bool) -> Transform:
        def inputs(row: Row) -> dict[str, Any]:
            return dict(row)

        return inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        raise NotImplementedError

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        return {}

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, Any]]:
        return iter(())


def encoder(labels: Sequence[str] = (), **options: Any) -> Encoder:
    return Encoder(Letters(Options(**options)), None, BertConfig(), labels)


def rows_of(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


def words(examples: Any) -> list[str]:
    return ["".join(map(chr, ids)) for ids in examples["input_ids"]]


def test_training_data_keep_their_order_and_evaluation_data_come_longest_first() -> None:
    rows = rows_of("bb", "a dddd", "ccc")
    training = encoder()(rows, place="data.train", training=True)
    assert words(training.split.encoded) == ["bb", "a", "dddd", "ccc"]
    assert training.lengths is not None
    assert training.lengths.tolist() == [2, 1, 4, 3]
    held_out = encoder()(rows, place="data.validation", training=False)
    assert words(held_out.rows) == ["dddd", "ccc", "bb", "a"]
    assert held_out.split.encoded["index"] == [1, 2, 0, 1]
    assert held_out.split.rows["text"] == ["bb", "a dddd", "ccc"]
    assert training.notes == held_out.notes == ()


def test_what_was_cut_is_counted_or_stops_the_run() -> None:
    rows = rows_of("abc", "abcdefgh", "defghijk")
    examples = encoder()(rows, place="data.test", training=False)
    assert examples.notes == ("data.test: 2 examples of 3 longer than the limit: truncated.",)
    assert words(examples.rows) == ["abcdef", "defghi", "abc"]
    assert "truncated" not in examples.rows.column_names
    with pytest.raises(InputError, match=r"data.test: 2 examples of 3 longer.*overlong: truncate"):
        encoder(strict=True)(rows, place="data.test", training=False)


def test_examples_that_come_to_nothing_are_left_out_and_counted() -> None:
    examples = encoder()(rows_of("ab", "c ", "d"), place="data.train", training=True)
    assert words(examples.rows) == ["ab", "c", "d"]
    [note] = examples.notes
    assert "1 example of 4 left out" in note
    with pytest.raises(InputError, match=r"data.train: nothing to learn from"):
        encoder()(rows_of(" ", ""), place="data.train", training=True)


def test_what_was_cut_is_counted_by_example_whatever_comes_of_each() -> None:
    examples = encoder()(rows_of("a b c", "abcdefgh d"), place="data.train", training=True)
    assert examples.notes == ("data.train: 1 example of 2 longer than the limit: truncated.",)


def test_tokenizer_is_left_as_it_was() -> None:
    task = FillMask(FillMask.Options(max_length=8))
    words = tokenizer()
    Encoder(task, words, BertConfig())(rows_of("a film " * 9), place="data.train", training=True)
    assert words.backend_tokenizer.truncation is None


def test_packed_rows_hold_the_examples_and_know_their_tokens() -> None:
    examples = encoder(rows=2)(rows_of("aa", "b", "cccc"), place="data.train", training=True)
    assert len(examples) == 2
    assert examples.lengths is not None
    assert examples.lengths.tolist() == [3, 4]
    assert words({"input_ids": [e["input_ids"] for e in examples.rows[0]["packed"]]}) == ["aa", "b"]
    assert set(examples.rows[1]["packed"][0]) == {"index", "input_ids"}
    held_out = encoder(rows=2)(rows_of("aa", "b", "cccc"), place="data.test", training=False)
    assert len(held_out) == 3


def test_encoding_is_kept_and_follows_all_that_decides_it() -> None:
    rows = rows_of(*("abc" for _ in range(5)))

    def calls(made: Encoder, fingerprint: str = "one") -> int:
        CALLS.clear()
        made(rows, place="data.train", training=True, fingerprint=fingerprint)
        return len(CALLS)

    assert calls(encoder()) == 1
    assert calls(encoder()) == 0
    assert calls(encoder(limit=2)) == 1
    assert calls(encoder(labels=["a", "b"])) == 1
    assert calls(encoder(), fingerprint="other") == 1
    assert calls(encoder()) == 0


def test_several_processes_encode_as_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = rows_of(*(f"{'x' * (n % 9)} y{n}" for n in range(300)))
    alone = encoder()(rows, place="data.train", training=True, fingerprint="alone")
    monkeypatch.setattr(encoding, "_processes", lambda count: 2)
    shared = encoder()(rows, place="data.train", training=True, fingerprint="shared")
    assert alone.split.encoded["input_ids"] == shared.split.encoded["input_ids"]
    assert alone.split.encoded["index"] == shared.split.encoded["index"]
