"""What a task wants of its data, and which column of the data fills which role."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hfft.data_sources import did_you_mean
from hfft.errors import InputError
from hfft.labels import listing

Kind = Literal[
    "image",
    "audio",
    "label",
    "text",
    "captions",
    "number",
    "labels",
    "words",
    "tags",
    "answers",
    "messages",
]
"""What a column can be asked to hold."""


@dataclass(frozen=True)
class Column:
    """A column that a task needs.

    Attributes:
        kind: what it has to hold.
        names: what it is usually called; tried in order, case aside.
        optional: whether the data may do without it.
        blank: whether an example may do without text in it: null is "" then.
        seconds: of a sound, that are read; longer ones are counted. None: all of it is.
    """

    kind: Kind
    names: tuple[str, ...]
    optional: bool = False
    blank: bool = False
    seconds: float | None = None


def _all(found: Collection[str]) -> Collection[str]:
    return found


@dataclass(frozen=True)
class Needs:
    """What a task wants of its data.

    Attributes:
        columns: role to the column that fills it.
        roles: returns which serve of the roles that the data has a column for; raises InputError
            where they don't suffice.
        flaws: returns, for each example of a batch, what is wrong with it in a few words, or "".
            The batch is role to values, with `index`, their rows; labels are as the data has them.
    """

    columns: Mapping[str, Column]
    roles: Callable[[Collection[str]], Collection[str]] = _all
    flaws: Callable[[Mapping[str, list[Any]]], list[str]] | None = None


def unknown_roles(needs: Needs, chosen: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the config's columns, whatever the data has: roles there aren't."""
    for role in chosen.keys() - needs.columns.keys():
        near = did_you_mean(role, needs.columns)
        yield f"data.columns.{role}: the task has no such column{near}"


def match_roles(
    needs: Needs, chosen: Mapping[str, str], there: Sequence[str], place: str
) -> dict[str, str]:
    """Finds the column of each role: the chosen one, else the first of a usual name that is free.

    Args:
        needs: what the task wants.
        chosen: role to column, as the config maps them.
        there: the columns there are.
        place: where, for messages.

    Returns:
        Role to column, for the roles that serve.

    Raises:
        InputError: a column is missing, or two roles want the same.
    """
    folded = {name.strip().casefold(): name for name in reversed(there)}
    mapped = {role: chosen[role] for role in needs.columns if chosen.get(role)}
    found: dict[str, str] = {}
    problems: list[str] = []
    for role, column in needs.columns.items():
        usual = [folded[name.casefold()] for name in column.names if name.casefold() in folded]
        wanted = mapped.get(role)
        names = [wanted] if wanted else usual
        others = {name: other for other, name in (mapped | found).items() if other != role}
        free = [name for name in names if name in there and name not in others]
        taken = [name for name in names if name in others]
        if free:
            found[role] = free[0]
        elif column.optional and not wanted:
            continue
        elif taken:
            said = f'"{taken[0]}" of {place} can\'t serve twice; it is its {others[taken[0]]}'
            problems.append(f"data.columns.{role}: {said}")
        else:
            lacks = f'"{wanted}"' if wanted else f"column for it ({', '.join(column.names)})"
            near = did_you_mean(wanted or column.names[0], there)
            problems.append(
                f"data.columns.{role}: {place} has no {lacks}{near}; its columns are "
                f"{listing(there)}. Map the right one: `data.columns.{role}: NAME`"
            )
    if problems:
        raise InputError(problems)
    serving = _serving(needs, found, mapped, place)
    return {role: name for role, name in found.items() if role in serving}


def _serving(
    needs: Needs, found: Mapping[str, str], mapped: Collection[str], place: str
) -> Collection[str]:
    """The roles that serve; if need be, without those that merely have a usual name."""
    asked = [role for role in found if role in mapped or not needs.columns[role].optional]
    problems: list[str] = []
    for roles in ([*found], asked) if mapped else ([*found],):
        try:
            serving = needs.roles(roles)
        except InputError as error:
            problems = [f"{place}: {message}" for message in error.messages]
            continue
        idle = [role for role in mapped if role not in serving]
        if not idle:
            return serving
        problems = [f"data.columns.{role}: {place} is read without this column" for role in idle]
    raise InputError(problems)
