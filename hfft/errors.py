"""The one kind of error that is the user's to mend."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(Exception):
    """The user's input is wrong: exit status 2, these messages, no traceback.

    Each message names the thing, the place and the remedy; all that were found are reported
    at once.
    """

    def __init__(self, messages: str | Iterable[str]) -> None:
        self.messages = [messages] if isinstance(messages, str) else list(messages)
        super().__init__("\n".join(self.messages))


class RunFailedError(Exception):
    """The run or the push broke off through no fault of the config: exit status 1, this message."""
