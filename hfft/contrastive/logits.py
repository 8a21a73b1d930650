"""The contrastive losses by a batch's logits, where autograd is to go through the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hfft.contrastive.losses import Kind
from hfft.text.inputs import IGNORED


def loss_of_logits(kind: Kind, logits: Tensor, keys: Tensor) -> Tensor:
    """Return the loss of a batch alone, as `contrastive_loss` has it, summed over 2 N items.

    It makes several matrices as large as the logits.

    Args:
        kind: of loss.
        logits: (N, N), of which the diagonal belongs together.
        keys: (N, 2) as for `contrastive_loss`.
    """
    counts = (keys != IGNORED).all(dim=1)
    logits, keys = logits[counts][:, counts].float(), keys[counts]
    own = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    same = (keys[:, None] == keys).any(dim=-1) & ~own
    if kind == "sigmoid":
        signs = torch.where(own, 1.0, -1.0).to(logits)
        return -2 * functional.logsigmoid(signs * logits).masked_fill(same, 0).sum()
    logits = logits.masked_fill(same, -torch.inf)
    right = torch.arange(len(logits), device=logits.device)
    there, back = (
        functional.cross_entropy(one, right, reduction="sum") for one in (logits, logits.T)
    )
    return there + back
