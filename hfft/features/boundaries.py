"""The highest of several boundaries at which a model can be cut, tower by tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from hfft.features.analysis import find_cut
from hfft.features.cut import Cut, NoCutError, frozen_for_now


def highest_cut(
    model: nn.Module,
    batch: Mapping[str, Any],
    boundaries: Sequence[frozenset[str]],
) -> tuple[Cut, frozenset[str], str]:
    """Cut at the highest of several boundaries that the model can be cut at, as an estimate.

    Args:
        model: as for `find_cut`.
        batch: as for `find_cut`.
        boundaries: names of frozen parameters, from the highest boundary to the lowest.

    Returns:
        The cut, which of `boundaries` it lies at, and why at none above it.

    Raises:
        NoCutError: at none of them; the message is about the first.
    """
    why = ""
    for names in boundaries:
        try:
            with frozen_for_now(model, names):
                return find_cut(model, batch, thorough=False), names, why
        except NoCutError as error:
            why = why or str(error)
    raise NoCutError(why or "nothing is frozen")


def highest_cut_of_towers(
    model: nn.Module,
    batch: Mapping[str, Any],
    frozen: frozenset[str],
    towers: Sequence[Sequence[frozenset[str]]],
) -> tuple[Cut, frozenset[str], str]:
    """Cut above all that is frozen or, where that can't be, as high as can be in each tower.

    Args:
        model: as for `find_cut`.
        batch: as for `find_cut`.
        frozen: names of all frozen parameters.
        towers: of each tower, boundaries from the highest to the lowest.

    Returns:
        As `highest_cut`, with what is frozen in all towers.

    Raises:
        NoCutError: in none of them; the message is about all that is frozen.
    """
    try:
        return highest_cut(model, batch, [frozen])
    except NoCutError as error:
        why = str(error)
    found: Cut | None = None
    names = frozenset[str]()
    for boundaries in towers:
        with suppress(NoCutError):
            lower = [names | own for own in boundaries if names | own != frozen]
            found, names, _ = highest_cut(model, batch, lower)
    if found is None:
        raise NoCutError(why)
    return found, names, why
