"""What text tasks share: tokenizers checked, lengths limited, batches padded, texts read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        source: whose tokenizer.
        config: the model's; its missing `pad_token_id` is set.
        mask_token: whether the task needs one.

    Raises:
        InputError: there is no tokenizer, it lacks such a token, or it knows more tokens than the
            model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
        raise InputError(
            f"model: {source.name} has no tokenizer that can be loaded ({cause}); take a model of "
            f"texts, with its tokenizer.json"
        ) from error
    vocabulary = tokenizer.get_vocab()
    if not vocabulary.keys() - {*tokenizer.all_special_tokens}:  # made up, for lack of its files
        raise InputError(
            f"model: {source.name} has no tokenizer; save it there too, by "
            f"tokenizer.save_pretrained"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"model: {source.name}: its tokenizer has neither a padding token nor an "
                f"end-of-text token to pad with; set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if mask_token and tokenizer.mask_token_id is None:
        raise InputError(
            f"model: {source.name}: its tokenizer has no mask token, which this task predicts at; "
            f"take a model that was pretrained with one (BERT, RoBERTa, ModernBERT), or, for "
            f"GPT-like models, task: text-generation"
        )
    known = getattr(config.get_text_config(), "vocab_size", None)
    if not mask_token:  # facebook/bart-large-cnn has none, unlike its tokenizer
        vocabulary.pop(tokenizer.mask_token, None)
    tokens = max(vocabulary.values()) + 1
    if known is not None and tokens > known:
        raise InputError(
            f"model: {source.name}: its tokenizer has {tokens:,} tokens, the model {known:,}; they "
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
    """

    side: str
    values: Mapping[str, int]

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
        width = max(lengths)
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

    A line of standard input (`-`) or of a `.jsonl` file is a record if it begins with a brace, else
    a text, as is a line of any other file, and an argument that names no file.

    Args:
        given: texts, paths of files, or `-`.
        roles: the fields that a record must have.
        alone: the role that a plain text fills; None: records only.
        optional: fields that it may have.

    Yields:
        The place that a record is from, and the record.

    Raises:
        InputError: a file can't be read, a line is empty, or a record lacks a field.
    """
    for one in given:
        if one == "-":
            yield from _lines(sys.stdin, "standard input", roles, alone, optional)
            continue
        try:
            is_file = Path(one).is_file()
        except OSError:  # a text, too long for a name
            is_file = False
        if not is_file:
            yield one, _record(one, f'"{one[:40]}"', roles, alone, optional)
            continue
        try:
            with Path(one).open(encoding="utf-8") as lines:
                yield from _lines(lines, one, roles, alone, optional)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{one}: can't be read as text: {error}") from error


def _lines(
    lines: Iterable[str],
    place: str,
    roles: Sequence[str],
    alone: str | None,
    optional: Sequence[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for number, line in enumerate(lines, start=1):
        where = f"{place}, line {number}"
        if not line.strip():
            raise InputError(f"{where}: is empty; remove it, or give it a text")
        yield where, _record(line.rstrip("\r\n"), where, roles, alone, optional)
    if not number:
        raise InputError(f"{place}: holds no text")


def _record(
    text: str, place: str, roles: Sequence[str], alone: str | None, optional: Sequence[str]
) -> dict[str, Any]:
    wanted = ", ".join(f'"{role}": ...' for role in roles)
    if not text.lstrip().startswith("{"):
        if alone is None:
            raise InputError(f"{place}: expected JSON Lines of the form {{{wanted}}}")
        if not text.strip():
            raise InputError(f"{place}: is empty; give it a text")
        return {alone: text}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if alone is not None:
            return {alone: text}
        raise InputError(f"{place}: is no JSON: {error}") from error
    missing = [role for role in roles if not found.get(role)]
    if missing and alone is not None and len(roles) == 1 and not found.keys() & {*roles, *optional}:
        raise InputError(f"{place}: has no {missing[0]}; expected {{{wanted}}}")
    if missing:
        raise InputError(f"{place}: has no {', '.join(missing)}; expected {{{wanted}}}")
    known = {*roles, *optional}
    return {role: value for role, value in found.items() if role in known}
