"""As launch.py, and the loss of the second process alone is no number in the second step."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from transformers import Trainer

from hfft.cli import main

compute = Trainer.compute_loss


def losing(self: Trainer, *args: Any, **kwargs: Any) -> Any:
    loss = compute(self, *args, **kwargs)
    lost = dist.get_rank() == 1 and self.model.training and self.state.global_step == 1
    return loss * float("nan") if lost else loss


Trainer.compute_loss = losing  # type: ignore[method-assign]
sys.exit(main(["train", *sys.argv[1:]]))
