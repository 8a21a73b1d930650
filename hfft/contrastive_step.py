"""One training step over all pairs of the global batch, in as many pieces as memory asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from hfft.contrastive.embeddings import Embeddings
from hfft.contrastive_task import ContrastiveTask


@dataclass(frozen=True)
class ContrastiveStep:
    """Forward and backward of a batch of pairs, of which each process has a part.

    The loss needs every embedding at once, the towers don't: with a chunk the batch passes them
    piece by piece, first without a graph, for the embeddings; the loss is taken of these, and its
    gradient by them; then each piece passes again, with the random numbers of the first time, and
    is handed its embeddings' gradient (GradCache, Gao et al. 2021). The last piece keeps its graph
    from the first time. The result is the whole batch's gradient, in the memory of one piece.

    Attributes:
        task: whose loss.
        accelerator: of the Trainer.
        chunk: pairs in a piece; None: all of this process's.
    """

    task: ContrastiveTask
    accelerator: Accelerator
    chunk: int | None = None

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], items: Tensor | int) -> Tensor:
        """Add a batch's gradient to the model's.

        Args:
            model: as the Trainer has wrapped it.
            inputs: this process's part of the batch, with `labels`.
            items: of all processes, 2 a pair.

        Returns:
            This process's share of the loss, times the number of processes, as DDP averages.
        """
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        pieces = _pieces(rest, len(inputs["labels"]), self.chunk)
        step = self._whole if len(pieces) == 1 else self._in_pieces
        weight = self.accelerator.num_processes / torch.as_tensor(items)
        return step(model, pieces, inputs["labels"], weight)

    def _whole(
        self, model: nn.Module, pieces: Sequence[Any], labels: Tensor, weight: Tensor
    ) -> Tensor:
        found = self._embed(model, pieces[0])
        loss = self.task.contrast(found, labels, across=True) * weight.to(found.text)
        self.accelerator.backward(loss)
        return loss.detach()

    def _in_pieces(
        self, model: nn.Module, pieces: Sequence[Any], labels: Tensor, weight: Tensor
    ) -> Tensor:
        states: list[_Randomness] = []
        parts: list[Embeddings] = []
        with self._apart(model):
            with torch.no_grad():
                for piece in pieces[:-1]:
                    states.append(_Randomness.of(piece))
                    parts.append(self._embed(model, piece))
            kept = self._embed(model, pieces[-1])
        loss, gradients = self._gradients([*parts, kept], labels, weight)
        with self._apart(model):
            self.accelerator.backward(_product(kept, gradients[-1]))
        for number, (piece, state) in enumerate(zip(pieces[:-1], states, strict=True)):
            last = number == len(states) - 1  # whose backward is where processes meet
            with nullcontext() if last else self._apart(model), state.restored():
                found = self._embed(model, piece)
                self.accelerator.backward(_product(found, gradients[number]))
        return loss

    def _gradients(
        self, parts: Sequence[Embeddings], labels: Tensor, weight: Tensor
    ) -> tuple[Tensor, list[Embeddings]]:
        """Return the loss, and for each part its gradient; that of the scale is the first's."""
        leaves = Embeddings(
            other=_leaf([part.other for part in parts]),
            text=_leaf([part.text for part in parts]),
            scale=parts[-1].scale.detach().requires_grad_(),
            bias=None if parts[-1].bias is None else parts[-1].bias.detach().requires_grad_(),
        )
        loss = self.task.contrast(leaves, labels, across=True) * weight.to(leaves.text)
        loss.backward()  # type: ignore[no-untyped-call]
        sizes = [len(part.text) for part in parts]
        rows = zip(
            torch.split(_gradient(leaves.other), sizes),
            torch.split(_gradient(leaves.text), sizes),
            strict=True,
        )
        scale, bias = leaves.scale.grad, None if leaves.bias is None else leaves.bias.grad
        return loss.detach(), [
            Embeddings(other, text, cast(Tensor, scale) / len(parts), _part(bias, len(parts)))
            for other, text in rows
        ]

    def _embed(self, model: nn.Module, piece: Mapping[str, Any]) -> Embeddings:
        outputs = model(**piece)
        # a compiled model must not be taken out of its wrapper
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return Embeddings.of(outputs, bare, self.task.other)

    def _apart(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return the context in which backward does not average over processes."""
        return cast(AbstractContextManager[Any], self.accelerator.no_sync(model))


def _leaf(parts: Sequence[Tensor]) -> Tensor:
    """Return embeddings without their graph; the last, which has one, tells whether they learn."""
    return torch.cat([part.detach() for part in parts]).requires_grad_(parts[-1].requires_grad)


def _gradient(leaf: Tensor) -> Tensor:
    """Return a leaf's gradient; zeros for a tower that is locked."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _part(whole: Tensor | None, parts: int) -> Tensor | None:
    return None if whole is None else whole / parts


def _product(found: Embeddings, gradient: Embeddings) -> Tensor:
    """Return what has the given gradient by embeddings and scale."""
    total = (found.other * gradient.other).sum() + (found.text * gradient.text).sum()
    total = total + found.scale * gradient.scale
    if found.bias is not None and gradient.bias is not None:
        total = total + (found.bias * gradient.bias).sum()
    return total


def _pieces(inputs: Mapping[str, Any], size: int, chunk: int | None) -> list[dict[str, Any]]:
    """Cut a batch in pieces of so many pairs; the last may be smaller."""
    starts = range(0, size, chunk or size)
    return [
        {name: value[start : start + starts.step] for name, value in inputs.items()}
        for start in starts
    ]


@dataclass(frozen=True)
class _Randomness:
    """The generators' state before a piece passed, so that dropout is the same the next time."""

    cpu: Tensor
    devices: tuple[list[int], list[Tensor]]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> _Randomness:
        one = next(iter(inputs.values()))  # all are on one device
        return cls(torch.get_rng_state(), get_device_states(one))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Go back to it, and after that to where training was."""
        numbers, states = self.devices
        with torch.random.fork_rng(numbers):
            torch.set_rng_state(self.cpu)
            if numbers:
                set_device_states(numbers, states)
            yield
