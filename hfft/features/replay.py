"""A cut model at work: the stored tensors taken out once, and put in ever after."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hfft.features.calls import Call, replace_forward, restore_forward
from hfft.features.cut import MASK, Cut, NoCutError, Slot

FEATURE = "hfft_feature_{}"
"""The names by which stored tensors stand among a batch's inputs, by the number of their slot."""


class _Enough(Exception):
    """All that was asked for is there; the rest of the model needn't run."""


@torch.no_grad()
def capture(
    model: nn.Module, cuts: Sequence[Cut], batch: Mapping[str, Tensor]
) -> list[list[Tensor]]:
    """Run a model as far as its cuts; return the tensors of each cut's slots, (B, ...) each.

    Args:
        model: in eval mode.
        cuts: of this model, at any boundaries.
        batch: its inputs, on its device.

    Raises:
        NoCutError: in evaluation the model does not come to all slots.
    """
    wanted = {(c, n): slot for c, cut in enumerate(cuts) for n, slot in enumerate(cut.slots)}
    taken: dict[tuple[int, int], Tensor] = {}
    counts: dict[str, int] = {}

    def take(path: str, argument: bool, values: Mapping[Any, Any], number: int) -> None:
        for key, slot in wanted.items():
            if slot.call == Call(path, number) and (slot.argument is not None) == argument:
                leaf = tree_flatten(values[slot.argument])[0][slot.leaf]
                taken[key] = leaf.clone()  # it may be written over in place
        if len(taken) == len(wanted):
            raise _Enough

    def watched(path: str, run: Any, *args: Any, **kwargs: Any) -> Any:
        number = counts.get(path, 0)
        counts[path] = number + 1
        take(path, True, {**dict(enumerate(args)), **kwargs}, number)
        output = run(*args, **kwargs)
        take(path, False, {None: output}, number)
        return output

    patched = []
    try:
        for path in dict.fromkeys(slot.call.module for slot in wanted.values()):
            module = model.get_submodule(path)
            own = replace_forward(module, partial(watched, path, module.forward))
            patched.append((module, own))
        model(**batch)
    except _Enough:
        pass
    finally:
        for module, own in patched:
            restore_forward(module, own)
    if lacking := wanted.keys() - taken.keys():
        raise NoCutError(f"{wanted[min(lacking)].call.module} is not run in evaluation")
    return [[taken[c, n] for n in range(len(cut.slots))] for c, cut in enumerate(cuts)]


@contextmanager
def replayed(model: nn.Module, cut: Cut) -> Iterator[None]:
    """Let a model take batches of stored tensors beside whole ones.

    A batch that holds `FEATURE` entries runs from the cut on; any other runs as ever. Wrap the
    model (DistributedDataParallel, mixed precision) inside this context.
    """
    replay = _Replay(cut)
    patched = []
    hooks = []
    try:
        root = functools.wraps(model.forward)(partial(replay.root, model.forward))
        own = replace_forward(model, root)
        patched.append((model, own))
        for path in dict.fromkeys(call.module for call in cut.skipped):
            module = model.get_submodule(path)
            own = replace_forward(module, partial(replay.skip, path, module.forward))
            patched.append((module, own))
        for path in dict.fromkeys(s.call.module for s in cut.slots if s.argument is not None):
            # before other hooks on it, which are to see the tensors and not their absence
            hook = model.get_submodule(path).register_forward_pre_hook(
                partial(replay.enter, path), prepend=True, with_kwargs=True
            )
            hooks.append(hook)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, own in reversed(patched):
            restore_forward(module, own)


class _Replay:
    """What the cut model's modules do, in the batch it is at.

    The batch's tensors stay until the next: recomputation in the backward pass (gradient
    checkpointing) calls modules again, with gradients. Without them, modules that are called from
    elsewhere than the model's forward (one tower, to embed what is not in the batch) are whole.
    """

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.active = self.inside = False
        self.stored: list[Tensor] = []
        self.sizes: tuple[int, int, torch.device] = (0, 0, torch.device("cpu"))
        self.counts: dict[tuple[str, str], int] = {}

    def root(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch with or without stored tensors."""
        names = [FEATURE.format(n) for n in range(len(self.cut.slots))]
        self.counts = {}
        self.active = names[0] in kwargs
        if not self.active:
            self.stored = []
            return run(*args, **kwargs)
        self.stored = [kwargs.pop(name) for name in names]
        mask, first = kwargs.get(MASK), self.stored[0]
        self.sizes = (len(first), 0 if mask is None else mask.shape[1], first.device)
        kwargs |= {name: absent.make(*self.sizes) for name, absent in self.cut.inputs.items()}
        self.inside = True
        try:
            return run(*args, **kwargs)
        finally:
            self.inside = False

    @property
    def is_at_work(self) -> bool:
        """Whether stored tensors are meant."""
        return self.active and (self.inside or torch.is_grad_enabled())

    def skip(self, path: str, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer in a skipped module's place."""
        if not self.is_at_work:
            return run(*args, **kwargs)
        call = self._call("skip", path)
        if call not in self.cut.skipped:
            return run(*args, **kwargs)
        return self.cut.skipped[call].answer(
            {slot.leaf: tensor for slot, tensor in self._slots(call, output=True)}, *self.sizes
        )

    def enter(
        self, path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put stored tensors among a learning module's arguments."""
        if not self.is_at_work:
            return None
        call = self._call("enter", path)
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for slot, tensor in self._slots(call, output=False):
            leaves, spec = tree_flatten(given[slot.argument])
            leaves[slot.leaf] = tensor
            given[slot.argument] = tree_unflatten(leaves, spec)
        return tuple(given[n] for n in range(len(args))), {k: given[k] for k in kwargs}

    def _call(self, what: str, path: str) -> Call:
        count = self.counts.get((what, path), 0)
        self.counts[what, path] = count + 1
        return Call(path, count % self.cut.calls[path])

    def _slots(self, call: Call, *, output: bool) -> Iterator[tuple[Slot, Tensor]]:
        for slot, tensor in zip(self.cut.slots, self.stored, strict=True):
            if slot.call == call and (slot.argument is None) == output:
                yield slot, tensor
