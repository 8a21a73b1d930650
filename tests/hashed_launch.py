"""As launch.py, and each process notes the hash of its whole model at the end of every stage.

accelerate launch ... tests/hashed_launch.py FOLDER CONFIG [key=value ...]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from hfft.cli import main
from hfft.optim import OptimizerState
from hfft.processes import leave_processes
from hfft.trainer import StageTrainer

folder = Path(sys.argv[1])
finish = StageTrainer.optimizer_state


def note(self: StageTrainer) -> OptimizerState:
    digest = hashlib.sha256()
    for name, tensor in sorted(self.model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    rank, world = dist.get_rank(), dist.get_world_size()
    with (folder / f"rank{rank}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"world": world, "hash": digest.hexdigest()}) + "\n")
    return finish(self)


StageTrainer.optimizer_state = note  # type: ignore[method-assign]
assert int(os.environ["WORLD_SIZE"]) > 1
status = main(["train", *sys.argv[2:]])
if status == 0:
    leave_processes()
sys.exit(status)
