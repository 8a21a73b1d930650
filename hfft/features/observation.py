"""What a model computes as it is, and what it makes of a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hfft.features.calls import Call, Handler, Kind, answered
from hfft.features.cut import MASK, Absent, Autocast, Skipped, Slot, trimmed, with_padding
from hfft.features.flops import multiplications
from hfft.features.seen import (
    Seen,
    answers,
    arguments,
    copied,
    generators,
    has_nan,
    in_eval,
    near,
    other_weights,
    same,
)


@dataclass
class Found:
    """What came of a cut.

    Attributes:
        right: whether the model answers as it did whole.
        reason: why not.
        slots: what was stored.
        skipped: what was not run.
        below: the model's inputs that this would have read.
    """

    right: bool = False
    reason: str = ""
    slots: list[Slot] = field(default_factory=list)
    skipped: dict[Call, Skipped] = field(default_factory=dict)
    below: set[str] = field(default_factory=set)


_UNREACHED = "what learns needs more of what is frozen than can be stored"
_Place = tuple[Call, int | str | None]
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
"""What a model's code raises at inputs that it was not written for."""


class Observation:
    """What the uncut model computes, and what a cut one makes of it."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], autocast: Autocast) -> None:
        self.model, self.batch, self.autocast = model, dict(batch), autocast
        self.size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        mask = batch.get(MASK)
        self.mask = mask if mask is not None and mask.dim() == 2 else None
        self.order: list[Call] = []
        self.seen: dict[_Place, list[Seen]] = {}
        self.specs: dict[Call, TreeSpec] = {}
        self.kinds: dict[Call, Kind] = {}
        self.flops: dict[Call, float] = {}
        self.evaluated: set[Call] = set()
        self._start: list[Tensor] = []
        with multiplications(self.model, self._count):
            self.result = self._run(self.batch, self._record)
        self.shapes = self._shapes_of_a_shorter_batch()
        self.absent: dict[str, Absent] = {}

    def has_drawn(self, *kinds: Kind) -> bool:
        """Whether the model drew random numbers before what was seen of calls of some kinds."""
        return any(
            one.drawn
            for (call, _), leaves in self.seen.items()
            for one in leaves
            if self.kinds[call] in kinds
        )

    def compare_drawn(self) -> None:
        """Find out what of that is random: what comes out otherwise with another seed."""
        self._run(self.batch, self._again(self._mark_random), seed=1)

    def compare_alone(self) -> None:
        """Find what comes out otherwise for an example alone, unpadded, under other weights."""
        chosen = 0 if self.mask is None else int(self.mask.sum(1).argmin())
        alone = {
            name: v[chosen : chosen + 1] if isinstance(v, Tensor) and v.dim() else v
            for name, v in self.batch.items()
        }
        if self.mask is not None and (tokens := self.mask[chosen].bool()).any():
            alone |= {
                name: v[:, tokens]
                for name, v in alone.items()
                if isinstance(v, Tensor) and v.dim() == 2 and v.shape[1] == len(tokens)
            }
        # BatchNorm refuses to learn from one example
        with other_weights(self.model), in_eval(self.model):
            self._run(alone, self._again(partial(self._mark_dependent, chosen)))

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return next(v for v in self.batch.values() if isinstance(v, Tensor)).device

    def find_absent(self) -> None:
        """Find the inputs that only what is frozen reads, before anything else does.

        One is NaN at a time, and frozen modules answer what they did: where NaN arrives, the input
        itself is read.
        """
        images = {
            name: Absent(("batch", *value.shape[1:]), value.dtype)
            for name, value in self.batch.items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        }
        self.absent = {n: absent for n, absent in images.items() if not self._is_read(n, absent)}

    def _is_read(self, name: str, absent: Absent) -> bool:
        """Whether an input arrives at what learns, or at what the model answers."""
        arrived = False

        def answer(
            call: Call, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any
        ) -> Any:
            nonlocal arrived
            if kind == "frozen" and self._can_be_skipped(call):
                leaves = [copied(one.value) for one in self.seen[call, None]]
                return tree_unflatten(leaves, self.specs[call])
            arrived = arrived or (kind == "learning" and has_nan((args, kwargs)))
            return run(*args, **kwargs)

        given = self.batch | {name: absent.make(self.size, 0, self.device)}
        try:
            result = self._run(given, answer)
        except _FAILURES:
            return True
        return arrived or not all(map(same, result, self.result))

    def tensors(self, call: Call) -> list[int]:
        """Return which leaves of a call's output can be stored."""
        seen = self.seen[call, None]
        return [n for n in range(len(seen)) if self._slot((call, None), n) is not None]

    def cut(self, stored: frozenset[tuple[Call, int]]) -> Found:
        """Run the model with its frozen part answering NaN, but for what is stored of it."""
        found = Found()
        inputs = self.batch | {
            name: absent.make(self.size, 0, self.batch[name].device)
            for name, absent in self.absent.items()
        }

        def answer(
            call: Call, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any
        ) -> Any:
            if kind == "learning":
                args = tuple(self._enter(found, (call, n), a) for n, a in enumerate(args))
                kwargs = {k: self._enter(found, (call, k), a) for k, a in kwargs.items()}
                return run(*args, **kwargs)
            if not self._can_be_skipped(call) or (kind == "plain" and not has_nan((args, kwargs))):
                return run(*args, **kwargs)
            skipped = self._skipped(call)
            found.below |= _among(inputs, (args, kwargs))
            kept: dict[int, Tensor] = {}
            for leaf in self.tensors(call):
                if (call, leaf) in stored and (slot := self._slot((call, None), leaf)) is not None:
                    found.slots.append(slot)
                    kept[leaf] = self._as_stored((call, None), slot)
            found.skipped[call] = skipped
            return skipped.answer(kept, self.size, self._length(), self.device)

        try:
            result = self._run(inputs, answer)
        except _FAILURES as error:
            found.reason = f"it does not run without what is frozen ({error})"
            return found
        found.below |= self.absent.keys()
        found.right = len(result) == len(self.result) and all(
            same(new, old, self.mask) for new, old in zip(result, self.result, strict=True)
        )
        found.reason = _UNREACHED if not found.right else ""
        return found

    def _enter(self, found: Found, place: _Place, argument: Any) -> Any:
        """Replace the tensors of a learning call's argument that are missing, and can be stored."""
        leaves, spec = tree_flatten(argument)
        if place not in self.seen or len(leaves) != len(self.seen[place]):
            return argument
        for n, leaf in enumerate(leaves):
            if not has_nan(leaf) or has_nan(self.seen[place][n].value):
                continue
            if (slot := self._slot(place, n)) is not None:
                found.slots.append(slot)
                leaves[n] = self._as_stored(place, slot)
        return tree_unflatten(leaves, spec)

    def _as_stored(self, place: _Place, slot: Slot) -> Tensor:
        value: Tensor = self.seen[place][slot.leaf].value
        if slot.varies and self.mask is not None:
            return with_padding(value[self.mask.bool()], self.mask)
        return value.clone()

    def _slot(self, place: _Place, leaf: int) -> Slot | None:
        """Return the slot of a tensor; None where it can't be stored by example."""
        seen = self.seen[place][leaf]
        value = seen.value
        if not isinstance(value, Tensor) or not seen.can_be_stored:
            return None
        sizes = self._sizes(place, leaf)
        if not sizes or sizes[0] != "batch" or "length" in sizes[2:]:
            return None
        varies = "length" in sizes
        shape = tuple(value.shape[2:] if varies else value.shape[1:])
        turned = value.dim() == 4 and not value.is_contiguous()
        turned = turned and value.is_contiguous(memory_format=torch.channels_last)
        return Slot(*place, leaf, shape, value.dtype, varies, turned)

    def _can_be_skipped(self, call: Call) -> bool:
        """Whether a call depends on frozen weights alone, is not random, and on the example."""
        if self.kinds[call] == "learning":
            return False
        seen = self.seen[call, None]
        tensors = [n for n, one in enumerate(seen) if isinstance(one.value, Tensor)]
        return all(one.can_be_stored for one in seen) and any(
            self._sizes((call, None), n)[:1] == ("batch",) for n in tensors
        )

    def _skipped(self, call: Call) -> Skipped:
        leaves: list[Any] = []
        for n, one in enumerate(self.seen[call, None]):
            if isinstance(one.value, Tensor):
                leaves.append(Absent(self._sizes((call, None), n), one.value.dtype))
            else:  # a cache of keys and values is what nothing that learns may read
                plain = isinstance(one.value, bool | int | float | str)
                leaves.append(one.value if plain else None)
        return Skipped(tuple(leaves), self.specs[call])

    def _sizes(self, place: _Place, leaf: int) -> tuple[int | Literal["batch", "length"], ...]:
        """Return a tensor's shape, with the sizes that are the batch's or its length's by name."""
        shape = self.seen[place][leaf].value.shape
        shorter = self.shapes.get((*place, leaf), shape)
        if len(shorter) != len(shape):
            return ()
        sizes: list[int | Literal["batch", "length"]] = [
            "length" if a != b else int(a) for a, b in zip(shape, shorter, strict=True)
        ]
        if sizes and sizes[0] == self.size:
            sizes[0] = "batch"
        return tuple(sizes)

    def _length(self) -> int:
        return 0 if self.mask is None else self.mask.shape[1]

    def _record(
        self, call: Call, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any
    ) -> Any:
        self.order.append(call)
        self.kinds[call] = kind
        if kind == "learning":
            for name, argument in arguments(args, kwargs):
                self.seen[call, name] = self._noted(tree_flatten(argument)[0])
            return run(*args, **kwargs)
        output = run(*args, **kwargs)
        leaves, self.specs[call] = tree_flatten(output)
        self.seen[call, None] = self._noted(leaves)
        return output

    def _noted(self, leaves: list[Any]) -> list[Seen]:
        now = zip(self._start, generators(self.device), strict=True)
        drawn = not all(torch.equal(before, after) for before, after in now)
        return [
            Seen(copied(leaf), leaf.requires_grad, drawn=drawn)
            if isinstance(leaf, Tensor)
            else Seen(leaf)
            for leaf in leaves
        ]

    def _count(self, flops: float) -> None:
        if self.order:
            self.flops[self.order[-1]] = self.flops.get(self.order[-1], 0.0) + flops

    def _again(self, mark: Callable[[_Place, list[Any]], None]) -> Handler:
        """Return a handler that runs everything and hands on what it sees."""

        def look(
            call: Call, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any
        ) -> Any:
            if kind == "learning":
                for name, argument in arguments(args, kwargs):
                    mark((call, name), tree_flatten(argument)[0])
                return run(*args, **kwargs)
            output = run(*args, **kwargs)
            mark((call, None), tree_flatten(output)[0])
            return output

        return look

    def _mark_random(self, place: _Place, leaves: list[Any]) -> None:
        for one, other in zip(self.seen.get(place, ()), leaves, strict=False):
            if isinstance(one.value, Tensor) and one.drawn:
                one.drawn = not (isinstance(other, Tensor) and same(other, one.value))

    def _mark_dependent(self, example: int, place: _Place, leaves: list[Any]) -> None:
        self.evaluated.add(place[0])
        for leaf, (one, now) in enumerate(zip(self.seen.get(place, ()), leaves, strict=False)):
            if not isinstance(one.value, Tensor) or not one.can_be_stored:
                continue
            sizes = self._sizes(place, leaf)
            if sizes[:1] != ("batch",) or "length" in sizes[2:]:
                continue
            then = one.value[example]
            if "length" in sizes and self.mask is not None:
                then = then[self.mask[example].bool()]
            one.stable = isinstance(now, Tensor) and near(now[0], then)

    def _shapes_of_a_shorter_batch(self) -> dict[tuple[Call, int | str | None, int], torch.Size]:
        """Return every shape for texts that are one token shorter, by which lengths are known."""
        if self.mask is None or (length := self.mask.shape[1]) < 2:
            return {}
        shorter = trimmed(self.batch, length - 1)
        shapes: dict[tuple[Call, int | str | None, int], torch.Size] = {}

        def note(place: _Place, leaves: list[Any]) -> None:
            for n, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    shapes[(*place, n)] = leaf.shape

        self._run(shorter, self._again(note))
        return shapes

    def _run(self, batch: Mapping[str, Any], handler: Handler, seed: int = 0) -> list[Tensor]:
        """Run the model; return what it answers."""
        with torch.random.fork_rng(), torch.enable_grad(), self.autocast():
            torch.manual_seed(seed)
            self._start = generators(self.device)
            with answered(self.model, handler):
                output = self.model(**batch)
        return answers(output)


def _among(inputs: Mapping[str, Any], given: Any) -> set[str]:
    """Return which inputs are among a call's arguments, as they are or as views."""
    places = {x.untyped_storage().data_ptr() for x in tree_flatten(given)[0] if _has_memory(x)}
    return {
        n for n, x in inputs.items() if _has_memory(x) and x.untyped_storage().data_ptr() in places
    }


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta
