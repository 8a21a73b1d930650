from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from hfft.errors import InputError
from hfft.sections import ModelConfig
from hfft.text.inputs import load_tokenizer, longest, read_records
from tests.text_runs import SIZES, bert_folder, tokenizer


def loaded(folder: Path, **options: Any) -> Any:
    return load_tokenizer(ModelConfig(name=str(folder)), BertConfig(**SIZES), **options)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return folder


def test_model_without_the_files_of_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"model: .* has no tokenizer; save it there too"):
        loaded(folder)


def test_token_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = change(
        bert_folder(tmp_path), lambda content: content["model"]["vocab"].update(quite=500)
    )
    with pytest.raises(InputError, match=r"its tokenizer has 501 tokens, the model 23"):
        loaded(folder)


def test_mask_token_may_be_beyond_the_model_where_none_is_masked(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    own = tokenizer()
    own.mask_token = "<mask>"
    own.save_pretrained(folder)
    assert loaded(folder).mask_token_id == SIZES["vocab_size"]
    with pytest.raises(InputError, match="don't belong together"):
        loaded(folder, mask_token=True)


@pytest.mark.parametrize("asked", [1, 2])
def test_length_that_leaves_no_room_for_text_is_refused(asked: int) -> None:
    with pytest.raises(InputError, match=r"task\.max_length: . tokens leave no room .*2 special"):
        longest(tokenizer(), BertConfig(**SIZES), asked)
    assert longest(tokenizer(), BertConfig(**SIZES), 3) == 3


def read(*given: str) -> list[Any]:
    found = read_records(given, ("text",), alone="text", optional=("text_pair",))
    return [one for _, one in found]


def test_lines_are_read_without_their_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfa film\r\n{braces} are no record\r\n")
    assert read(str(file)) == [{"text": "a film"}, {"text": "{braces} are no record"}]


def test_field_of_null_is_as_good_as_none() -> None:
    assert read('{"text": "a", "text_pair": null, "id": 3}') == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b\n', r"a\.jsonl, line 2: is no JSON"),
        ("a.jsonl", '["a"]\n', r"a\.jsonl, line 1: expected JSON Lines"),
        ("a.jsonl", '{"text": 5}\n', r"line 1: its text is no text"),
        ("a.jsonl", '{"text": {"a": 1}}\n', r"line 1: its text is no text"),
        ("a.jsonl", '{"text": "a", "text_pair": [1]}\n', r"line 1: its text_pair is no text"),
        ("a.txt", '{"text": "b\n', r"a\.txt, line 1: is no JSON"),
        ("a.csv", "text\na\n", r"a\.csv: is a table"),
        ("a.txt", "", "holds no text"),
    ],
)
def test_what_is_no_text_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(str(tmp_path / name))


def test_name_of_a_file_that_is_not_there_is_no_text(tmp_path: Path) -> None:
    for name in ("missing.txt", str(tmp_path / "my texts.jsonl")):
        with pytest.raises(InputError, match="there is no such file"):
            read(name)
    with pytest.raises(InputError, match="is a folder"):
        read(str(tmp_path))
    assert read("I opened readme.txt", "and/or", "x" * 5000)[0] == {"text": "I opened readme.txt"}


def test_bytes_of_standard_input_that_are_no_text_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(InputError, match="standard input: can't be read as text"):
        read("-")
