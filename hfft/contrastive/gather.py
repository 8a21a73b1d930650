"""The batch of all processes, of which each has a part, and what has to move between them."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


class GlobalBatch:
    """This process's place in a batch; every process makes one and calls the same methods on it.

    Parts may differ in size, as in the last step of an epoch, and may be empty.

    Args:
        size: of this process's part.
        device: of the tensors that will move.
        across: whether the batch is that of all processes; else this process's part is all of it.

    Attributes:
        mine: the places of this process's items in the batch.
    """

    def __init__(self, size: int, device: torch.device, *, across: bool) -> None:
        self._sizes, rank = [size], 0
        if across and distributed.is_available() and distributed.is_initialized():
            rank = distributed.get_rank()
            sizes = torch.zeros(distributed.get_world_size(), dtype=torch.int64, device=device)
            sizes[rank] = size
            distributed.all_reduce(sizes)
            self._sizes = sizes.tolist()
        self._largest = max([1, *self._sizes])
        start = sum(self._sizes[:rank])
        self.mine = slice(start, start + size)

    @property
    def _alone(self) -> bool:
        return len(self._sizes) == 1

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole batch of which every process has a part: (n, ...) to (N, ...)."""
        if self._alone:
            return part
        parts = part.new_empty(len(self._sizes), self._largest, *part.shape[1:])
        distributed.all_gather(list(parts), self._padded(part))
        if min(self._sizes) == self._largest:
            return parts.flatten(0, 1)
        return torch.cat([p[:size] for p, size in zip(parts, self._sizes, strict=True)])

    def sum_part(self, whole: Tensor) -> Tensor:
        """Return this process's part of the sum of all processes' tensors: (N, ...) to (n, ...)."""
        if self._alone:
            return whole
        total = whole.new_empty(self._largest, *whole.shape[1:])
        parts = [self._padded(part) for part in torch.split(whole, self._sizes)]
        distributed.reduce_scatter(total, parts)
        return total[: self.mine.stop - self.mine.start]

    def logsumexp(self, exponents: Tensor) -> Tensor:
        """Return the logarithm of the sum over processes of the exponentials, elementwise."""
        if self._alone:
            return exponents
        top = exponents.clone()
        distributed.all_reduce(top, distributed.ReduceOp.MAX)
        total = (exponents - top).exp_()
        distributed.all_reduce(total)
        return total.log_().add_(top)

    def _padded(self, part: Tensor) -> Tensor:
        """Return a part as large as the largest: collectives want them of one size."""
        if len(part) == self._largest:
            return part.contiguous()
        padded = part.new_zeros(self._largest, *part.shape[1:])
        padded[: len(part)] = part
        return padded
