from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
from transformers import BertConfig, PretrainedConfig

from hfft import encoding
from hfft.encoding import Encoder, RowsBeside
from hfft.errors import InputError
from hfft.examples import Beside
from hfft.identities import identity
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


class Pairs(Letters):
    """A picture and captions, each of which makes an example of its own."""

    name = "pairs"
    columns: ClassVar = {
        "image": Column("image", ("image",)),
        "captions": Column("captions", ("captions",)),
    }

    def encode(self, processor: Any, config: PretrainedConfig) -> Encode:
        letters = super().encode(processor, config)

        def encoded(batch: Mapping[str, list[Any]]) -> Mapping[str, list[Any]]:
            pairs = zip(batch["index"], batch["image"], batch["captions"], strict=True)
            made = [(i, image, text) for i, image, texts in pairs for text in texts]
            rows, images, captions = map(list, zip(*made, strict=True))
            columns = dict(letters({"text": captions, "index": rows}))
            return {"row": columns.pop("index"), **columns, "image_key": images}

        return encoded


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


def test_encoding_follows_the_code_of_the_task_and_of_all_that_encodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Path] = []

    def note(path: Path) -> bytes:
        read.append(path)
        return b""

    monkeypatch.setattr(Path, "read_bytes", note)
    encoder()
    names = {f"{path.parent.name}/{path.name}" for path in read}
    here = Path(__file__)
    assert {f"{here.parent.name}/{here.name}", "hfft/texts.py", "text/inputs.py"} <= names
    assert "contrastive/prompts.py" in names


def test_several_processes_encode_as_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = rows_of(*(f"{'x' * (n % 9)} y{n}" for n in range(300)))
    alone = encoder()(rows, place="data.train", training=True, fingerprint="alone")
    monkeypatch.setattr(encoding, "_processes", lambda count: 2)
    shared = encoder()(rows, place="data.train", training=True, fingerprint="shared")
    assert alone.split.encoded["input_ids"] == shared.split.encoded["input_ids"]
    assert alone.split.encoded["index"] == shared.split.encoded["index"]


def pictures(*captions: list[str]) -> datasets.Dataset:
    images = [{"path": f"{n}.png", "bytes": bytes([n % 2]) * 9} for n in range(len(captions))]
    rows = {"image": images, "captions": list(captions)}
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "captions": datasets.List(datasets.Value("string")),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def pairs(**options: Any) -> Encoder:
    return Encoder(Pairs(Options(**options)), None, BertConfig())


def test_encoded_examples_find_what_they_were_made_of() -> None:
    rows = pictures(["a", "bbb"], ["cc"], ["dddd"]).select([2, 1, 0])
    examples = pairs()(rows, place="data.test", training=False)
    assert words(examples.split.encoded) == ["dddd", "bbb", "cc", "a"]
    assert examples.split.encoded["row"][:] == [0, 2, 1, 2]
    assert set(examples.split.encoded.column_names) == {"row", "input_ids", "image_key"}
    assert [len(examples), len(examples.split.rows)] == [4, 3]
    second = examples.rows[1]
    assert (words({"input_ids": [second["input_ids"]]}), second["row"]) == (["bbb"], 2)
    assert second["image"] == {"path": "0.png", "bytes": b"\0" * 9}
    assert second["captions"] == ["a", "bbb"]


def test_originals_stand_once_each_and_only_where_anything_was_made_of_them() -> None:
    examples = pairs()(pictures(["a", "bbb"], [], ["dddd"]), place="data.test", training=False)
    rows = examples.rows
    assert isinstance(rows, Beside)
    assert rows.originals[:]["captions"] == [["a", "bbb"], ["dddd"]]
    for n in range(len(rows)):
        original = rows.originals[int(rows.places[n])]
        assert {**original, **rows.encoded[n]} == rows[n]


def test_encode_is_told_which_image_it_is_and_not_its_bytes() -> None:
    examples = pairs()(pictures(["a"], ["b"], ["c", "d"]), place="data.train", training=True)
    first, second = identity(b"\0" * 9), identity(b"\1" * 9)
    assert examples.split.encoded["image_key"][:] == [first, second, first, first]
    assert isinstance(examples.rows, RowsBeside)


def test_several_processes_tell_images_apart_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pictures(*([f"c{n}"] for n in range(40)))
    alone = pairs()(rows, place="data.train", training=True, fingerprint="alone")
    monkeypatch.setattr(encoding, "_processes", lambda count: 2)
    shared = pairs()(rows, place="data.train", training=True, fingerprint="shared")
    assert alone.split.encoded["image_key"][:] == shared.split.encoded["image_key"][:]
    assert shared.rows[39] == alone.rows[39]


def test_captions_that_were_cut_or_came_to_nothing_are_counted_among_captions() -> None:
    rows = pictures(["abc", "abcdefgh", "abcdefghi"], ["abcdefgh"], [""])
    examples = pairs()(rows, place="data.train", training=True)
    assert examples.notes == (
        "data.train: 3 examples of 5 longer than the limit: truncated.",
        "data.train: 1 example of 5 left out: within task.max_length there is nothing to learn "
        "from.",
    )
    assert [examples.rows[n]["row"] for n in range(len(examples))] == [0, 0, 0, 1]
    with pytest.raises(InputError, match=r"3 examples of 5 longer"):
        pairs(strict=True)(rows, place="data.train", training=True)
