"""The calls of a model's modules, seen and answered from outside, without knowing its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import nn

Kind = Literal["frozen", "learning", "plain"]
"""What a call's module holds: frozen parameters only, learning ones, or no parameters at all."""


class Call(NamedTuple):
    """The n-th call of a module in one forward pass of the model, from 0."""

    module: str
    number: int


Handler = Callable[[Call, Kind, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any]
"""Answers a call: (call, kind, its arguments, its keywords, what would run it) to its output."""


@contextmanager
def answered(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Let `handler` answer the outermost calls of modules of one kind, for one forward pass.

    A module that holds frozen and learning parameters is not asked for itself, its children are,
    down to a layer (with a learning bias, say), which counts as learning. What runs inside a call
    that is answered is left alone.
    """
    inside = False
    counts: dict[str, int] = {}

    def answer(path: str, kind: Kind, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return run(*args, **kwargs)
        call = Call(path, counts.get(path, 0))
        counts[path] = call.number + 1
        inside = True
        try:
            return handler(call, kind, args, kwargs, run)
        finally:
            inside = False

    patched = []
    try:
        for path, module in model.named_modules():
            kind = kind_of(module)
            if path and kind is not None:
                own = replace_forward(module, partial(answer, path, kind, module.forward))
                patched.append((module, own))
        yield
    finally:
        for module, own in patched:
            restore_forward(module, own)


def kind_of(module: nn.Module) -> Kind | None:
    """Return what a module holds; None for a mixture, which its children tell apart."""
    learning = {parameter.requires_grad for parameter in module.parameters()}
    if not learning:
        # a running statistic or a table is no example's own
        return None if next(module.buffers(), None) is not None else "plain"
    if len(learning) == 1:
        return "learning" if learning.pop() else "frozen"
    return None if next(module.children(), None) is not None else "learning"


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Any:
    """Let a module run `forward`; return what `restore_forward` needs."""
    own = module.__dict__.get("forward")
    module.forward = forward
    return own


def restore_forward(module: nn.Module, own: Any) -> None:
    """Undo `replace_forward`: back to what stood on the instance, or to its class's method."""
    if own is None:
        del module.forward
    else:
        module.forward = own
