"""The contrastive losses of CLIP and SigLIP, in memory that grows with the batch, not its square.

With first and second embeddings f_i, s_j of N pairs, and logits z_ij = scale * f_i . s_j + bias:

    softmax (CLIP, Radford et al. 2021)    sum_i (r_i - z_ii) + (c_i - z_ii),
                                           r_i = log sum_j exp z_ij, c_j = log sum_i exp z_ij
    sigmoid (SigLIP, Zhai et al. 2023)     2 sum_ij log(1 + exp(-y_ij z_ij)), y_ii = 1, else -1

The derivatives by z are closed: exp(z_ij - r_i) + exp(z_ij - c_j) - 2 I_ij for softmax and
2 (sigmoid(z_ij) - I_ij) for sigmoid, where I is the identity. So logits are made a few rows at a
time and the gradient right with them, in the forward pass; backward only multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hfft.contrastive.gather import GlobalBatch
from hfft.text.inputs import IGNORED

Kind = Literal["softmax", "sigmoid"]


def contrastive_loss(
    kind: Kind,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    *,
    across: bool = False,
    rows: int = 256,
) -> Tensor:
    """Return the loss of every pair against every other, summed over this process's items.

    A pair is two items, first to second and second to first: divided by the 2N items of all
    processes, the sum is CLIP's loss or SigLIP's. It is computed in float32, or in float64 where
    an embedding is, under autocast too. Differentiable once.

    Across processes every process must call it, with gradients for the same tensors. Gradients of
    embeddings are those of the sum over all processes; those of scale and bias are this process's
    share, to be summed. With N pairs in all, a process receives N * D numbers of `second` in its
    own dtype and N * 16 bytes of keys; sums 8 * N bytes for softmax; and, where `second` learns,
    sums N * D float32 numbers of its gradient, of which it receives its own. `first` stays where
    it is. All of it happens in the forward pass.

    Args:
        kind: of loss.
        first: (n, D) embeddings of length 1, of any float dtype.
        second: (n, D) embeddings of length 1 of what belongs to each.
        scale: what similarities are multiplied by; one number.
        bias: what is added to them; one number. No more than a constant to softmax.
        keys: (n, 2) what tells the first and the second of each pair from others. Pairs of which
            either is the same are no negatives of one another. Pairs with an IGNORED key count
            nothing.
        across: whether the batch is that of all processes of torch.distributed; n may differ.
        rows: of logits in memory at a time; rows * N numbers, two or three times.
    """
    counts = (keys != IGNORED).all(1)
    if not counts.all():
        first, second, keys = first[counts], second[counts], keys[counts]
    given = first, second, scale.reshape(()), None if bias is None else bias.reshape(())
    with torch.autocast(first.device.type, enabled=False):
        pairs = _Pairs(*given, keys, across=across, rows=rows)
        return cast(Tensor, _Loss.apply(kind, *given, pairs, torch.is_grad_enabled()))


class _Loss(torch.autograd.Function):
    """The loss, whose gradient comes with it."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: Kind,
        first: Tensor,
        second: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        pairs: _Pairs,
        learns: bool,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[1:5]
        if not (learns and any(wanted)):
            return _LOSSES[kind](pairs, None)
        gradient = _Gradient(pairs, wanted)
        loss = _LOSSES[kind](pairs, gradient)
        ctx.save_for_backward(*gradient.finish())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        by_input = (None if saved is None else saved * output for saved in ctx.saved_tensors)
        return None, *by_input, None, None


class _Pairs:
    """This process's n pairs against the N of the whole batch.

    Attributes:
        batch: the place of the n among the N.
        first: (n, D).
        second: (N, D).
        scale: of the logits.
        bias: of the logits.
    """

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        keys: Tensor,
        *,
        across: bool,
        rows: int,
    ) -> None:
        dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
        self.batch = GlobalBatch(len(first), first.device, across=across)
        self.first = first.detach().to(dtype)
        self.second = self.batch.gather(second.detach()).to(dtype).contiguous()
        self.scale = scale.detach().to(dtype)
        self.bias = torch.zeros_like(self.scale) if bias is None else bias.detach().to(dtype)
        self._block = self.second.new_empty(min(rows, len(first)), len(self.second))
        keys = self.batch.gather(keys)
        repeats = any(len(of_one.unique()) < len(keys) for of_one in keys.T)
        self._keys = keys if repeats else None

    def chunks(self) -> list[slice]:
        """Return the rows, as many at a time as there is room for."""
        n = len(self.first)
        starts = range(0, n, len(self._block) or 1)
        return [slice(at, min(at + starts.step, n)) for at in starts]

    def logits(self, chunk: slice) -> Tensor:
        """Return the logits of some rows, (rows, N), in the same memory each time."""
        block = self._block[: chunk.stop - chunk.start]
        torch.addmm(self.bias, self.first[chunk] * self.scale, self.second.T, out=block)
        if self._keys is not None:
            first, second = self._keys.T
            mine = self.batch.mine
            same = first[mine][chunk, None] == first
            same |= second[mine][chunk, None] == second
            self.own(same, chunk).fill_(False)
            block.masked_fill_(same, -torch.inf)
        return block

    def let_go(self) -> None:
        """Free what logits are made of and in, once all have been."""
        del self.second, self._block

    def own(self, block: Tensor, chunk: slice) -> Tensor:
        """Return a view on what of some rows, (rows, N), is of their own pairs, (rows,)."""
        return block.diagonal(self.batch.mine.start + chunk.start)


class _Gradient:
    """The gradient of a loss, added up from its derivatives by the logits.

    Args:
        pairs: that the loss is of.
        wanted: whether first, second, scale and bias each learn.
    """

    def __init__(self, pairs: _Pairs, wanted: Sequence[bool]) -> None:
        first, second, scale, bias = self._wanted = tuple(wanted)
        self._pairs = pairs
        # either leads to that of the scale
        needs_first = first or (scale and not second)
        self._first = torch.empty_like(pairs.first) if needs_first else None
        self._second = torch.zeros_like(pairs.second) if second else None
        self._bias = torch.zeros_like(pairs.bias) if bias else None

    def add(self, chunk: slice, slopes: Tensor) -> None:
        """Add what comes of some rows, given the loss's derivatives by their logits, (rows, N)."""
        if self._first is not None:
            torch.mm(slopes, self._pairs.second, out=self._first[chunk])
        if self._second is not None:
            self._second.addmm_(slopes.T, self._pairs.first[chunk])
        if self._bias is not None:
            self._bias += slopes.sum()

    def finish(self) -> tuple[Tensor | None, ...]:
        """Return it by first, second, scale and bias; None for what doesn't learn."""
        pairs, (first, _, scale, _) = self._pairs, self._wanted
        by_scale = None
        if self._first is not None:
            by_scale = (self._first * pairs.first).sum() if scale else None
            self._first *= pairs.scale
        if self._second is not None:
            if scale and by_scale is None:
                by_scale = (self._second * pairs.second).sum()
            pairs.let_go()  # moving takes room
            self._second = pairs.batch.sum_part(self._second.mul_(pairs.scale))
        return self._first if first else None, self._second, by_scale, self._bias


def _softmax(pairs: _Pairs, gradient: _Gradient | None) -> Tensor:
    """Return CLIP's loss: a cross-entropy over each row and one over each column."""
    first, second = pairs.first, pairs.second
    by_row, own = first.new_empty(len(first)), first.new_empty(len(first))
    by_column = second.new_full((len(second),), -torch.inf)
    chunks = pairs.chunks()
    for chunk in chunks:
        logits = pairs.logits(chunk)
        own[chunk] = pairs.own(logits, chunk)
        torch.logsumexp(logits, 1, out=by_row[chunk])
        torch.logaddexp(by_column, logits.logsumexp(0), out=by_column)
    by_column = pairs.batch.logsumexp(by_column)
    if gradient:
        for chunk in reversed(chunks):
            if chunk != chunks[-1]:  # whose logits are still there
                logits = pairs.logits(chunk)
            in_column = (logits - by_column).exp_()
            slopes = logits.sub_(by_row[chunk, None]).exp_().add_(in_column)
            pairs.own(slopes, chunk).sub_(2)
            gradient.add(chunk, slopes)
    return (by_row - own).sum() + (by_column[pairs.batch.mine] - own).sum()


def _sigmoid(pairs: _Pairs, gradient: _Gradient | None) -> Tensor:
    """Return SigLIP's loss: a binary cross-entropy of each pair."""
    loss = pairs.first.new_zeros(())
    for chunk in pairs.chunks():
        logits = pairs.logits(chunk)
        loss -= pairs.own(logits, chunk).sum()  # log(1 + exp(-z)) = log(1 + exp(z)) - z
        loss -= functional.logsigmoid(-logits).sum()
        if gradient:
            slopes = logits.sigmoid_()
            pairs.own(slopes, chunk).sub_(1)
            gradient.add(chunk, slopes.mul_(2))
    return 2 * loss


_LOSSES: dict[Kind, Callable[[_Pairs, _Gradient | None], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
}
