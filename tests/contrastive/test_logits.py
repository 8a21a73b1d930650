from __future__ import annotations

import pytest
import torch

from hfft.contrastive.logits import loss_of_logits
from hfft.contrastive.losses import Kind, contrastive_loss
from hfft.text.inputs import IGNORED

from .test_losses import EXACT, KINDS, REPEATS, given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_out", [0, 2])
def test_loss_of_logits_is_that_of_embeddings(kind: Kind, left_out: int) -> None:
    this = given(kind, 16, REPEATS)
    this.keys[:left_out] = IGNORED
    logits = this.scale * this.first @ this.second.T
    logits = logits if this.bias is None else logits + this.bias
    numbers = (this.first, this.second, this.scale, this.bias)
    expected = contrastive_loss(kind, *numbers, this.keys)
    # it computes in float32
    torch.testing.assert_close(
        loss_of_logits(kind, logits, this.keys), expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_the_same_is_no_negative(kind: Kind) -> None:
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    apart = torch.tensor([[0, 10], [1, 11], [2, 12]])
    alike = torch.tensor([[0, 10], [1, 10], [2, 12]])
    changed = logits.clone()
    changed[0, 1] = changed[1, 0] = 50.0
    assert loss_of_logits(kind, logits, alike) < loss_of_logits(kind, logits, apart)
    torch.testing.assert_close(
        loss_of_logits(kind, changed, alike), loss_of_logits(kind, logits, alike), **EXACT
    )
