"""How tags mark entities, and how tags are scored: by entity, or each for itself if plain."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from seqeval.metrics import classification_report as entity_report
from seqeval.scheme import BILOU, IOB2, IOBES, Tokens
from sklearn.metrics import accuracy_score
from sklearn.metrics import classification_report as tag_report

Tags = Sequence[list[str]]
"""Examples' tags, one a word."""

OUTSIDE = "O"
"""The tag of a word in no entity."""


@dataclass(frozen=True)
class TagScheme:
    """How tags mark entities: B- begins one, I- goes on with it. Plain tags mark none.

    Attributes:
        tokens: seqeval's reading of such tags; None: they are plain.
        last: what marks the last of an entity's words, if anything does.
        single: what marks an entity of one word, if it isn't B.
    """

    tokens: Any = None
    last: str = ""
    single: str = ""

    def fits(self, labels: Sequence[str]) -> bool:
        """Return whether all labels are of this scheme, and one of them tells it from others."""
        own = f"{self.last}{self.single}" or "B"
        every = all(re.fullmatch(rf"O|[BI{own}](-.+)?", label) for label in labels)
        return self.tokens is None or (every and any(label[0] in own for label in labels))

    def spread(self, tag: str, pieces: int) -> list[str]:
        """Return the tags of a word's pieces, as if each were a word of its entity."""
        if self.tokens is None or tag == OUTSIDE or pieces == 1:
            return [tag] * pieces
        mark, kind = tag[0], tag[1:]
        begin = "B" if mark in ("B", self.single) else "I"
        end = self.last if mark in (self.last, self.single) else "I"
        return [begin + kind, *["I" + kind] * (pieces - 2), end + kind]

    def gather(self, first: str, last: str) -> str:
        """Return a word's tag, of its first and its last piece's: `spread`, undone."""
        if self.tokens is None or first == OUTSIDE:
            return first
        begins, ends = first[0] in ("B", self.single), last[0] in (self.last, self.single)
        mark = (self.single if begins else self.last) if ends else ("B" if begins else "I")
        return mark + first[1:]

    def entities(self, tags: list[str]) -> list[tuple[str, int, int]]:
        """Return each entity's type, first word, and the word after; each tag but O, if plain."""
        if self.tokens is None:
            return [(tag, at, at + 1) for at, tag in enumerate(tags) if tag != OUTSIDE]
        return [(one.tag, one.start, one.end) for one in Tokens(tags, self.tokens).entities]

    def scores(self, truth: Tags, guesses: Tags) -> dict[str, float]:
        """Score entities, all together, or plain tags, on average; and count the right tags."""
        overall = self._report(truth, guesses)["micro avg" if self.tokens else "macro avg"]
        return {
            "f1": float(overall["f1-score"]),
            "precision": float(overall["precision"]),
            "recall": float(overall["recall"]),
            "accuracy": float(accuracy_score(_flat(truth), _flat(guesses))),
        }

    def scores_by_label(self, truth: Tags, guesses: Tags) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of entities of each type, or of each tag."""
        return [
            {
                "label": name,
                "precision": float(scores["precision"]),
                "recall": float(scores["recall"]),
                "f1": float(scores["f1-score"]),
                "examples": int(scores["support"]),
            }
            for name, scores in list(self._report(truth, guesses).items())[:-3]  # averages
        ]

    def _report(self, truth: Tags, guesses: Tags) -> Any:
        """Return seqeval's scores by type, or sklearn's by tag; then, of either, three averages."""
        if self.tokens is None:
            true, guessed = _flat(truth), _flat(guesses)
            seen = sorted({*true, *guessed} - {OUTSIDE} | {*true})  # O may be no tag, but a gap
            return tag_report(true, guessed, labels=seen, output_dict=True, zero_division=0)
        with warnings.catch_warnings():  # of means over no types, where there is no entity at all
            warnings.simplefilter("ignore", RuntimeWarning)
            return entity_report(
                list(truth),
                list(guesses),
                mode="strict",
                scheme=self.tokens,
                output_dict=True,
                zero_division=0,
            )


TAG_SCHEMES = {
    "bio": TagScheme(IOB2),
    "bioes": TagScheme(IOBES, "E", "S"),
    "bilou": TagScheme(BILOU, "L", "U"),
    "none": TagScheme(),  # fits all, hence the last
}


def _flat(tags: Tags) -> list[str]:
    return list(chain.from_iterable(tags))
