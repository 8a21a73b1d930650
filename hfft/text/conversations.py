"""Conversations as tokens, by a chat template, and which of these the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from hfft.errors import InputError

Messages = Sequence[Mapping[str, Any]]
"""A conversation: turns with a `role` and a `content`."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
# as transformers' apply_chat_template looks for it
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_flaw(messages: Messages, *, answered: bool) -> str:
    """Return what is wrong with a conversation, in a few words; "" for nothing.

    Args:
        messages: the conversation.
        answered: whether it is to hold the assistant's turns, or to ask for the next.
    """
    roles = [message.get("role") for message in messages]
    for number, (message, role) in enumerate(zip(messages, roles, strict=True)):
        if role not in _ROLES:
            return f"has a turn {number} of role {role!r}; roles are {', '.join(_ROLES)}"
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return f"has an empty turn {number} ({role})"
    if not answered:
        return "" if roles and roles[-1] != "assistant" else "has no turn that asks for an answer"
    if "assistant" not in roles:
        return "has no assistant turn"
    return "" if roles[0] != "assistant" else "begins with an assistant turn, which answers nothing"


def read_template(given: str) -> str:
    """Return a chat template: what was given, or the file of that name.

    Raises:
        InputError: there is no such file.
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"task.chat_template: {given[:60]!r} is neither Jinja nor a file that can be read"
        ) from error


def chat_template(tokenizer: Any) -> str:
    """Return a tokenizer's chat template.

    Raises:
        InputError: it has none.
    """
    try:
        return cast(str, tokenizer.get_chat_template())
    except ValueError as error:
        raise InputError(
            "model: its tokenizer has no chat template to write conversations by; set "
            "task.chat_template to one, or to a file of it, or take a model that was tuned on chats"
        ) from error


def apply_template(tokenizer: Any, messages: Messages, place: str, **options: Any) -> Any:
    """Return what `tokenizer.apply_chat_template` makes of a conversation.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        place: what an error begins with.
        options: of `apply_chat_template`.

    Raises:
        InputError: there is no template, or it can't write the conversation.
    """
    chat_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is code, and may fail as code does
        raise InputError(
            f"{place}: the chat template can't write this conversation: {error}; mend it, or set "
            f"task.chat_template"
        ) from error


@dataclass(frozen=True)
class Conversations:
    """Writes conversations by the tokenizer's chat template.

    The assistant's turns are what the template encloses in `{% generation %}`, or, where it marks
    nothing, what each adds to the text of the turns before it and of the prompt to answer them. A
    template that ends the last of them with no special token gets the end-of-text token there,
    else a model never learns to stop.

    Attributes:
        tokenizer: a fast one, with a chat template.
        everything: whether all turns count as the assistant's.
    """

    tokenizer: Any
    everything: bool = False

    def __call__(self, messages: Messages, place: str) -> tuple[list[int], list[bool]]:
        """Return a conversation's T tokens, and which of them the assistant says.

        Args:
            messages: the conversation, without a flaw.
            place: what an error begins with.

        Raises:
            InputError: the template can't write it, or doesn't tell the assistant's turns apart.
        """
        if self.everything or not _MARKS_ANSWERS.search(chat_template(self.tokenizer)):
            ids, said = self._unmarked(messages, place)
        else:
            found = apply_template(
                self.tokenizer, messages, place, return_assistant_tokens_mask=True
            )
            ids, said = found["input_ids"], [bool(one) for one in found["assistant_masks"]]
        if not any(said):
            raise InputError(
                f"{place}: the chat template leaves out what the assistant says; mend it, or set "
                f"task.chat_template"
            )
        if messages[-1]["role"] == "assistant" and not self._ends(ids):
            ids, said = [*ids, self.tokenizer.eos_token_id], [*said, True]
        return ids, said

    def _unmarked(self, messages: Messages, place: str) -> tuple[list[int], list[bool]]:
        """Tokenize what the template writes, and find the tokens of the assistant's characters."""
        text = self._written(messages, place)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = found["input_ids"]
        if self.everything:
            return ids, [True] * len(ids)
        is_said = np.zeros(len(text), dtype=np.int64)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                is_said[self._turn(messages, number, text, place)] = 1
        said_before = np.concatenate([[0], np.cumsum(is_said)])
        starts, ends = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        return ids, (said_before[ends] > said_before[starts]).tolist()

    def _turn(self, messages: Messages, number: int, text: str, place: str) -> slice:
        """Return the characters of an assistant's turn."""
        before = self._written(messages[:number], place, add_generation_prompt=True)
        after = self._written(messages[: number + 1], place)
        if not text.startswith(after):  # Phi-3's template ends a conversation, not each turn
            after = after.removesuffix(self.tokenizer.eos_token)
        if not (after.startswith(before) and text.startswith(after)):
            raise InputError(
                f"{place}: the chat template writes turns differently when others follow, so the "
                f"assistant's can't be told apart; set task.chat_template to one that encloses "
                f"them in {{% generation %}} and {{% endgeneration %}}, or task.loss_on: all"
            )
        # white space behind the mark that ends a turn is the template's, not the assistant's
        ended = after.rstrip()
        marks = tuple(str(token) for token in self._marks().values())
        return slice(len(before), len(ended) if ended.endswith(marks) else len(after))

    def _written(self, messages: Messages, place: str, **options: bool) -> str:
        return cast(str, apply_template(self.tokenizer, messages, place, tokenize=False, **options))

    def _ends(self, ids: Sequence[int]) -> bool:
        """Return whether nothing but white space follows the last special token."""
        marks = self._marks()
        last = max((place for place, token in enumerate(ids) if token in marks), default=-1)
        return not self.tokenizer.decode(ids[last + 1 :]).strip()

    def _marks(self) -> dict[int, Any]:
        """Return the special tokens, those of turns among them, by their number."""
        known = self.tokenizer.added_tokens_decoder
        return {number: token for number, token in known.items() if token.special}
