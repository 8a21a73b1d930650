"""How a cut is found: the model is run, and what it computes looked at.

What is skipped answers NaN, so wherever NaN arrives at a module that learns, a tensor has to be
stored; and a cut is right only if the loss and all else that the model answers is then what the
whole model answered, bit for bit. Nothing is known of the model's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from hfft.features.calls import Call
from hfft.features.cut import Autocast, Cut, NoCutError
from hfft.features.observation import Found, Observation
from hfft.features.seen import left_as_it_was


def find_cut(
    model: nn.Module,
    batch: Mapping[str, Any],
    autocast: Autocast = nullcontext,
    *,
    thorough: bool = True,
) -> Cut:
    """Find and prove the highest cut below all that learns.

    Args:
        model: with `requires_grad` set and its frozen modules held in eval mode.
        batch: the inputs of at least two examples, on the model's device; texts of different
            lengths, since what depends on padding can't be stored.
        autocast: the precision to compute in.
        thorough: False for an estimate: whether what is stored of an example depends on other
            examples, on padding or on weights that learn is then not looked at.

    Raises:
        NoCutError: nothing frozen comes first, or the model's code stands in the way.
    """
    try:
        found, observed = _found(model, batch, autocast, thorough)
    except NoCutError:
        raise
    except Exception as error:  # whatever a model's code makes of inputs it was not written for
        raise NoCutError(f"the model can't be looked at ({error})") from error
    if not found.right:
        raise NoCutError(found.reason)
    if not found.slots or not found.skipped:
        raise NoCutError("nothing frozen comes before what learns")
    named = {slot.call.module for slot in found.slots} | {call.module for call in found.skipped}
    if thorough and (unseen := {slot.call for slot in found.slots} - observed.evaluated):
        raise NoCutError(f"{min(unseen).module} is not run in evaluation")
    calls = {path: sum(call.module == path for call in observed.order) for path in named}
    flops = sum(observed.flops.get(call, 0.0) for call in found.skipped) / observed.size
    below = frozenset(found.below)
    return Cut(tuple(found.slots), found.skipped, observed.absent, calls, below, flops)


def _found(
    model: nn.Module, batch: Mapping[str, Any], autocast: Autocast, thorough: bool
) -> tuple[Found, Observation]:
    with left_as_it_was(model):
        observed = Observation(model.train(), batch, autocast)
        if thorough:
            observed.compare_alone()
        if drawn := observed.has_drawn("frozen"):  # by another tower, which runs first
            observed.compare_drawn()
        found = _search(observed)
        if not found.right and not drawn and observed.has_drawn("learning", "plain"):
            observed.compare_drawn()
            found = _search(observed)
    return found, observed


def _search(observed: Observation) -> Found:
    """Find which tensors have to be stored, and no more of them than must be."""
    observed.find_absent()
    found = observed.cut(frozenset())
    stored = frozenset[tuple[Call, int]]()
    if not found.right:  # some reach what learns by another way than its arguments
        for call in reversed(found.skipped):
            stored |= {(call, leaf) for leaf in observed.tensors(call)}
            found = observed.cut(stored)
            if found.right:
                break
        for one in sorted(stored):
            if found.right and (fewer := observed.cut(stored - {one})).right:
                stored, found = stored - {one}, fewer
    return found
