"""Columns of texts, captions, numbers, words, answers and chats, each brought into one form.

Every function returns the dataset with its column in that form, and the rows that can't be: row
to what is wrong with it. Whatever form the others were in, they are values of one type then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from reprlib import repr as short
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hfft.columns import described, replace_column
from hfft.errors import InputError

Formed = tuple[datasets.Dataset, dict[int, str]]
"""A dataset with a column in its form; row to what is wrong with it."""
_Form = Callable[[Any], tuple[Any, str]]
"""A value to the same in its form and "", or to None and what is wrong with it."""

_TEXT, _NUMBER = datasets.Value("string"), datasets.Value("float64")
_WORDS = _CAPTIONS = datasets.List(_TEXT)
_ANSWERS = {"text": datasets.List(_TEXT), "answer_start": datasets.List(datasets.Value("int64"))}
_MESSAGES = datasets.List({"role": _TEXT, "content": _TEXT})

_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's roles, by the names that chat templates know."""

_CALLS = ("tool_calls", "function_call")
"""What a message may say besides its text."""

_ROWS_AT_ONCE = 1000


def as_text_column(dataset: datasets.Dataset, column: str, *, blank: bool = False) -> Formed:
    """Turns what can be written as text into it.

    Args:
        dataset: any.
        column: its column to turn.
        blank: whether a row may be without text: null is "" then. Else such rows are flawed.

    Raises:
        InputError: the column holds something else.
    """
    feature = dataset.features[column]
    if not isinstance(feature, datasets.Value) or "binary" in feature.dtype:
        raise InputError(f"holds {described(feature)}, not text")
    if feature.dtype != "string":
        dataset = dataset.cast_column(column, _TEXT)
    texts = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    if blank:
        if texts.null_count:
            dataset = replace_column(dataset, column, texts.fill_null(""), _TEXT)
        return dataset, {}
    return dataset, dict.fromkeys(pc.indices_nonzero(_blank(texts)).to_pylist(), "is empty")


def as_captions_column(dataset: datasets.Dataset, column: str) -> Formed:
    """Turns a text an example, or a list of them, into `[text, ...]`; each needs one, none blank.

    Raises:
        InputError: the column holds something else.
    """
    feature = dataset.features[column]
    caption = _item(feature)
    if _is_untyped(caption):
        return _bring(dataset, column, _captions, _CAPTIONS)
    if not _is_text(caption):
        raise InputError(f"holds {described(feature)}, not a caption or a list of them an example")
    form = _TEXT if _is_text(feature) else _CAPTIONS
    if feature != form:
        dataset = dataset.cast_column(column, form)
    chunks = dataset.select_columns([column]).with_format("arrow")[:].column(0).chunks
    if form is _TEXT:
        chunks = [_alone(chunk) for chunk in chunks]
        dataset = replace_column(dataset, column, pa.chunked_array(chunks), _CAPTIONS)
    flaws: dict[int, str] = {}
    start = 0
    for chunk in chunks:
        rows = pc.list_parent_indices(chunk).filter(_blank(pc.list_flatten(chunk)))
        flaws |= {start + row: "has an empty caption" for row in rows.unique().to_pylist()}
        none = pc.fill_null(pc.equal(pc.list_value_length(chunk), 0), True)
        flaws |= {start + row: "has no caption" for row in pc.indices_nonzero(none).to_pylist()}
        start += len(chunk)
    return dataset, dict(sorted(flaws.items()))


def as_number_column(dataset: datasets.Dataset, column: str) -> Formed:
    """Turns numbers, even those written as text, into float64; all but finite ones are flawed.

    Raises:
        InputError: the column holds something else.
    """
    feature = dataset.features[column]
    numeric = isinstance(feature, datasets.Value) and (
        pa.types.is_integer(feature.pa_type)
        or pa.types.is_floating(feature.pa_type)
        or pa.types.is_decimal(feature.pa_type)
    )
    if not (numeric or _is_text(feature) or _is_untyped(feature)):
        raise InputError(f"holds {described(feature)}, not numbers")
    return _bring(dataset, column, _number, _NUMBER)


def as_words_column(dataset: datasets.Dataset, column: str) -> Formed:
    """Turns lists of texts into `[text, ...]`; those without any are flawed.

    Raises:
        InputError: the column holds something else.
    """
    feature = dataset.features[column]
    word = _item(feature)
    if not (_is_text(word) or _is_untyped(word)) or _is_text(feature):
        remedy = " (CSV holds no lists; JSON Lines and Parquet do)" if _is_text(feature) else ""
        raise InputError(f"holds {described(feature)}, not a list of words an example{remedy}")
    return _bring(dataset, column, _words, _WORDS)


def as_answers_column(dataset: datasets.Dataset, column: str) -> Formed:
    """Turns answers into `{"text": [...], "answer_start": [...]}`, both empty where there is none.

    Raises:
        InputError: the column holds something else.
    """
    feature = dataset.features[column]
    if not _holds(feature, _ANSWERS):
        raise InputError(
            f"holds {described(feature)}, not answers of the form "
            '{"text": ["..."], "answer_start": [0]}'
        )
    return _bring(dataset, column, _answers, _ANSWERS)


def as_messages_column(dataset: datasets.Dataset, column: str) -> Formed:
    """Turns chats, ShareGPT's too, into `[{"role", "content"}, ...]`; empty ones are flawed.

    Raises:
        InputError: the column holds something else.
    """
    feature = dataset.features[column]
    if not _holds(feature, ("role", "content")) and not _holds(feature, ("from", "value")):
        raise InputError(
            f"holds {described(feature)}, not messages of the form "
            '[{"role": "user", "content": "..."}, ...]'
        )
    return _bring(dataset, column, _messages, _MESSAGES)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in {"string", "large_string"}


def _is_untyped(feature: Any) -> bool:
    """Whether only the values can tell what they are: of mixed types, or none at all."""
    empty = isinstance(feature, datasets.Value) and feature.dtype == "null"
    return empty or isinstance(feature, datasets.Json)


def _blank(texts: Any) -> Any:
    """Whether each of the texts is null or has nothing in it, for an array of them."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)


def _alone(texts: Any) -> Any:
    """Each text as the only one of a list, null as none, for an array of them."""
    ends = np.arange(len(texts) + 1, dtype=np.int32)
    return pa.ListArray.from_arrays(ends, texts)


def _item(feature: Any) -> Any:
    """What a list is of; what isn't a list, itself."""
    is_list = isinstance(feature, datasets.List | datasets.LargeList)
    return feature.feature if is_list else feature


def _holds(feature: Any, keys: Collection[str]) -> bool:
    """Whether these are records with such keys, or lists of them."""
    record = _item(feature)
    return _is_untyped(record) or (isinstance(record, dict) and {*keys} <= record.keys())


def _bring(dataset: datasets.Dataset, column: str, form: _Form, feature: Any) -> Formed:
    """Brings each value into its form; copies nothing where all are in it."""
    flaws: dict[int, str] = {}
    same = dataset.features[column] == feature
    for row, value in enumerate(value for batch in _batches(dataset, column) for value in batch):
        formed, flaw = form(value)
        if flaw:
            flaws[row] = flaw
        else:
            same = same and formed == value
    if same:
        return dataset, flaws
    kind = datasets.Features({column: feature}).arrow_schema.field(column).type
    chunks = [pa.array([form(v)[0] for v in batch], kind) for batch in _batches(dataset, column)]
    return replace_column(dataset, column, pa.chunked_array(chunks, kind), feature), flaws


def _batches(dataset: datasets.Dataset, column: str) -> Iterator[list[Any]]:
    rows = dataset.with_format(None).select_columns([column])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield rows[start : start + _ROWS_AT_ONCE][column]


def _number(value: Any) -> tuple[float | None, str]:
    if value is None or not str(value).strip():
        return None, "is empty"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    return (number, "") if math.isfinite(number) else (None, f"is {short(value)}, no finite number")


def _words(value: Any) -> tuple[list[str] | None, str]:
    if not value:
        return None, "has no words"
    if not isinstance(value, list):
        return None, f"is {short(value)}, no list"
    odd = next((word for word in value if not isinstance(word, str)), "")
    return (value, "") if odd == "" else (None, f"has a word that is {short(odd)}, no text")


def _captions(value: Any) -> tuple[list[str] | None, str]:
    captions = [value] if isinstance(value, str) else value
    if not captions:
        return None, "has no caption"
    if not isinstance(captions, list):
        return None, f"is {short(value)}, no caption"
    odd = next((c for c in captions if not isinstance(c, str | None)), None)
    if odd is not None:
        return None, f"has a caption that is {short(odd)}, no text"
    blank = any(caption is None or not caption.strip() for caption in captions)
    return (None, "has an empty caption") if blank else (captions, "")


def _answers(value: Any) -> tuple[dict[str, list[Any]] | None, str]:
    try:
        records = _records(value, ("text", "answer_start"))
    except ValueError as error:
        return None, str(error)
    given = [(record.get("text"), record.get("answer_start")) for record in records]
    given = [answer for answer in given if answer != (None, None)]
    for text, start in given:
        if not isinstance(text, str) or not text.strip():
            return None, f"has an answer whose text is {short(text)}"
        if not isinstance(start, int) or start < 0:
            return None, f"has an answer whose answer_start is {short(start)}"
    return {"text": [text for text, _ in given], "answer_start": [start for _, start in given]}, ""


def _messages(value: Any) -> tuple[list[dict[str, str]] | None, str]:
    try:
        records = _records(value, ("role", "content", "from", "value", *_CALLS))
    except ValueError as error:
        return None, str(error)
    messages = []
    for number, record in enumerate(records, start=1):
        role, content = record.get("role"), record.get("content")
        if role is None:
            role, content = record.get("from"), record.get("value")
        if not isinstance(role, str) or not role.strip():
            return None, f"has no role in message {number}"
        if any(record.get(call) for call in _CALLS):
            return None, f"calls a tool in message {number}, where text alone can be learned"
        if not isinstance(content, str):
            return None, f"has no text in message {number}"
        messages.append({"role": _SPEAKERS.get(role, role), "content": content})
    return (messages, "") if messages else (None, "has no message")


def _records(value: Any, keys: Collection[str]) -> list[dict[str, Any]]:
    """Records, out of a list of them, a single one, or one of lists.

    Raises:
        ValueError: it is none of these, or its lists are of several lengths.
    """
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(record, dict) for record in value):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"is {short(value)}, no record")
    fields = {key: value[key] for key in keys if value.get(key) is not None}
    lists = [field for field in fields.values() if isinstance(field, list)]
    if not lists:
        return [fields]
    if len(lists) < len(fields) or len({len(field) for field in lists}) > 1:
        raise ValueError(f"has {' and '.join(fields)} of several lengths")
    return [dict(zip(fields, record, strict=True)) for record in zip(*lists, strict=True)]
