"""What text tasks share: tokenizers checked, lengths limited, batches padded, texts read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from hfft.errors import InputError
from hfft.sections import ModelConfig, Section

IGNORED = -100
"""The label of what is no item of the loss: transformers' and torch's own number for it."""

_RECORDS = (".jsonl", ".json")
_TABLES = (".csv", ".tsv", ".parquet")
_FILES = (".txt", *_RECORDS, *_TABLES)
_LISTS = ("candidates", "messages", "words")  # what fields of records hold; the others hold texts

# Their positions begin after the padding token's number.
_OFFSET_POSITIONS = {
    "bridgetower_text_model",
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


class TextOptions(Section):
    """Keys that text tasks have in common."""

    max_length: int | None = Field(
        None, gt=0, description="tokens of an example; default: as many as the model takes"
    )
    overlong: Literal["truncate", "error"] = Field(
        "truncate", description="what longer examples do: lose their end, or stop the run"
    )


def load_tokenizer(
    source: ModelConfig, config: PretrainedConfig, *, mask_token: bool = False
) -> Any:
    """Return the source's tokenizer, with a padding token that the model's config knows too.

    Where it has none, as GPT-2's, its end-of-text token pads: padding is masked and is no label.

    Args:
        source: whose tokenizer; of two towers, that of the text tower.
        config: the model's; its missing `pad_token_id` is set.
        mask_token: whether the task needs one.

    Raises:
        InputError: there is no tokenizer, it lacks such a token, or it knows more tokens than the
            model.
    """
    source = source.tower("text")
    named = f"{source.place}: {source.name}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
        raise InputError(
            f"{named} has no tokenizer that can be loaded ({cause}); take a model of "
            f"texts, with its tokenizer.json"
        ) from error
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() - {*tokenizer.all_special_tokens}:  # made up, for lack of its files
        raise InputError(
            f"{named} has no tokenizer; save it there too, by tokenizer.save_pretrained"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{named}: its tokenizer has neither a padding token nor an "
                f"end-of-text token to pad with; set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if mask_token and tokenizer.mask_token_id is None:
        raise InputError(
            f"{named}: its tokenizer has no mask token, which this task predicts at; "
            f"take a model that was pretrained with one (BERT, RoBERTa, ModernBERT), or, for "
            f"GPT-like models, task: text-generation"
        )
    known = getattr(config.get_text_config(), "vocab_size", None)
    if not mask_token:  # facebook/bart-large-cnn has none, unlike its tokenizer
        vocabulary.pop(tokenizer.mask_token, None)
    tokens = max(vocabulary.values()) + 1
    if known is not None and tokens > known:
        raise InputError(
            f"{named}: its tokenizer has {tokens:,} tokens, the model {known:,}; they "
            f"don't belong together"
        )
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def longest(tokenizer: Any, config: PretrainedConfig, asked: int | None) -> int | None:
    """Return how many tokens an example may have; None where neither model nor user sets a limit.

    Raises:
        InputError: more are asked for than the model takes, or so few that no text is left.
    """
    own = config.get_text_config()
    positions = getattr(own, "max_position_embeddings", None) or None
    if positions is not None and own.model_type in _OFFSET_POSITIONS:
        positions -= (own.pad_token_id or 0) + 1
    if asked is not None:
        if positions is not None and asked > positions:
            raise InputError(
                f"task.max_length: {asked} tokens are more than the model takes ({positions})"
            )
        if asked <= (special := tokenizer.num_special_tokens_to_add()):
            raise InputError(
                f"task.max_length: {asked} tokens leave no room for text beside the {special} "
                f"special ones of each example; give more"
            )
        return asked
    # the tokenizer's is its author's advice, and some huge number where there is none
    advised = tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else None
    return min((limit for limit in (positions, advised) if limit is not None), default=None)


@dataclass(frozen=True)
class Padding:
    """Pads a batch's lists to its longest, on the side that the tokenizer pads.

    Attributes:
        side: "right" or "left".
        values: input name to what it is padded with; each such input is a list of T numbers.
            `attention_mask` is made where it is among them and the inputs have none.
        width: that all batches are padded to; None: the longest example's.
    """

    side: str
    values: Mapping[str, int]
    width: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, **others: int) -> Padding:
        """Pad the inputs that a tokenizer makes, and others by name."""
        values = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
        if "token_type_ids" in tokenizer.model_input_names:
            values["token_type_ids"] = tokenizer.pad_token_type_id
        return cls(tokenizer.padding_side, values | others)

    def __call__(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (B, T), T being the longest example's tokens."""
        lengths = [len(example["input_ids"]) for example in inputs]
        width = self.width or max(lengths)
        batch = {}
        for name, value in self.values.items():
            if name == "attention_mask" and name not in inputs[0]:
                rows: Iterable[Any] = ([1] * length for length in lengths)
            elif name not in inputs[0]:
                continue
            else:
                rows = (example[name] for example in inputs)
            padded = torch.full((len(inputs), width), value, dtype=torch.long)
            for number, row in enumerate(rows):
                place = slice(None, len(row)) if self.side == "right" else slice(-len(row), None)
                padded[number, place] = torch.as_tensor(row)
            batch[name] = padded
        return batch


def read_texts(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield texts to predict for: an argument itself, the lines of a file, or of standard input.

    Args:
        given: texts; paths of files, whose lines are texts, or records (`.jsonl`, `.json`) with a
            `text` each; `-` for lines of standard input.

    Yields:
        The place that a text is from, and the text.

    Raises:
        InputError: a file can't be read, or a line is empty.
    """
    for place, record in read_records(given, ("text",), alone="text"):
        yield place, record["text"]


def read_records(
    given: Sequence[str], roles: Sequence[str], *, alone: str | None, optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield records to predict for: JSON Lines, or plain texts where one role can stand alone.

    Every line of a `.jsonl` or `.json` file is a record. A line of standard input (`-`) or of any
    other file, and an argument that names no file, is one if it begins with a brace, else a text.

    Args:
        given: texts, paths of files, or `-`.
        roles: the fields that a record must have.
        alone: the role that a plain text fills; None: records only.
        optional: fields that it may have.

    Yields:
        The place that a record is from, and the record.

    Raises:
        InputError: a file isn't there or can't be read, a line is empty or broken, or a record
            lacks a field.
    """
    form = _Form(tuple(roles), alone, tuple(optional))
    for one in given:
        if one != "-" and not _is_file(one):
            yield one, form.record(one, f'"{one[:40]}"')
            continue
        place, suffix = ("standard input", "") if one == "-" else (one, Path(one).suffix.lower())
        if suffix in _TABLES:
            raise InputError(f"{one}: is a table; give texts, one a line, or JSON Lines")
        form_here = replace(form, alone=None) if suffix in _RECORDS else form
        try:
            with nullcontext(sys.stdin) if one == "-" else open(one, encoding="utf-8") as lines:
                yield from _lines(lines, place, form_here)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{place}: can't be read as text: {error}") from error


def _is_file(given: str) -> bool:
    """Return whether an argument names a file.

    Raises:
        InputError: it names a folder, or is the name of a file that isn't there, and no text.
    """
    path = Path(given)
    try:
        if path.is_dir():
            raise InputError(f"{given}: is a folder; name the files in it")
        if path.is_file():
            return True
    except OSError:  # a text, too long for a name
        return False
    in_folder = path.parent != Path() and path.parent.is_dir()
    if path.suffix.lower() in _FILES and (in_folder or len(given.split()) == 1):
        raise InputError(f"{given}: there is no such file; a text of that form goes to `-`")
    return False


def _lines(lines: Iterable[str], place: str, form: _Form) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for number, line in enumerate(lines, start=1):
        where = f"{place}, line {number}"
        text = line.removeprefix("\ufeff").rstrip("\r\n")
        if not text.strip():
            raise InputError(f"{where}: is empty; remove it, or give it a text")
        yield where, form.record(text, where)
    if not number:
        raise InputError(f"{place}: holds no text")


@dataclass(frozen=True)
class _Form:
    """What a record must hold; the fields are `read_records`' arguments."""

    roles: tuple[str, ...]
    alone: str | None
    optional: tuple[str, ...]

    def record(self, text: str, place: str) -> dict[str, Any]:
        """Return a line's record.

        Raises:
            InputError: it is none.
        """
        wanted = ", ".join(f'"{role}": ...' for role in self.roles or self.optional)
        if not text.lstrip().startswith("{"):
            if self.alone is None:
                raise InputError(f"{place}: expected JSON Lines of the form {{{wanted}}}")
            if not text.strip():
                raise InputError(f"{place}: is empty; give it a text")
            return {self.alone: text}
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            if self.alone is not None and not text.lstrip().startswith('{"'):
                return {self.alone: text}
            raise InputError(f"{place}: is no JSON: {error}") from error
        known = {*self.roles, *self.optional}
        record = {role: value for role, value in found.items() if role in known and value}
        if missing := [role for role in self.roles if role not in record]:
            raise InputError(f"{place}: has no {', '.join(missing)}; expected {{{wanted}}}")
        for role, value in record.items():
            kind, said = (list, "list") if role in _LISTS else (str, "text")
            if not isinstance(value, kind) or not str(value).strip():
                raise InputError(f"{place}: its {role} is no {said}; expected {{{wanted}}}")
        return record
