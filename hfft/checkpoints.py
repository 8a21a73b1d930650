"""What a killed run goes on from: sealed checkpoints inside a stage, and finished stages.

    checkpoints/TRIAL/NN-STAGE/checkpoint-STEP/   the Trainer's own, good only once SEALED
    checkpoints/TRIAL/NN-STAGE/finished/          weights, optimizer state by name, result
    checkpoints/TRIAL/result.json                 the trial's scores

Whatever is written under its final name is whole: folders are renamed into place, and a checkpoint
of the Trainer's counts only with its seal, which lists every file and its size.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfft.optim import OptimizerState
from hfft.weights_file import load_weights_of, save_weights

_SEAL = "SEALED"


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


class SealCallback(TrainerCallback):
    """Seal each checkpoint once every process has written its share.

    Args:
        spent: seconds that earlier processes put into the stage.
    """

    def __init__(self, spent: float = 0.0) -> None:
        self._since = time.monotonic() - spent

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the seal; weights that are no numbers get none."""
        if args.world_size > 1:
            dist.barrier()
        if args.should_save and model is not None and _is_finite(model):
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            write_json(folder / _SEAL, {"seconds": time.monotonic() - self._since, "files": sizes})


class StageCheckpoints:
    """The checkpoints of one stage.

    Args:
        folder: this stage's own folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished = folder / "finished"

    def whole(self) -> list[Path]:
        """Return the sealed checkpoints, the newest last."""
        found = [path for path in self.folder.glob("checkpoint-*") if _is_whole(path)]
        return sorted(found, key=step_of)

    def newest(self) -> Path | None:
        """Return the newest sealed checkpoint, or None."""
        return next(reversed(self.whole()), None)

    def discard_partial(self) -> None:
        """Remove what a killed run left half-written."""
        for path in self.folder.glob("checkpoint-*"):
            if not _is_whole(path):
                shutil.rmtree(path)

    def result(self) -> dict[str, Any] | None:
        """Return what the finished stage came to, or None if it isn't finished."""
        path = self.finished / "result.json"
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def finish(
        self,
        model: nn.Module,
        optimizer: OptimizerState,
        result: dict[str, Any],
        untouched: Collection[str] = (),
        *,
        keep_checkpoints: bool = False,
    ) -> None:
        """Keep what the next stage starts from; drop this stage's own checkpoints.

        Args:
            model: as the stage left it.
            optimizer: its state, by parameter name.
            result: what the stage came to.
            untouched: names of the parameters that are as the trial started with them.
            keep_checkpoints: leave them for a soup.
        """
        partial = self.folder / "finished.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_weights(model, partial / "model.safetensors", leave_out=untouched)
        torch.save(optimizer, partial / "optimizer.pt")
        write_json(partial / "result.json", result)
        partial.rename(self.finished)
        for path in () if keep_checkpoints else self.folder.glob("checkpoint-*"):
            shutil.rmtree(path)

    def restore(self, model: nn.Module) -> OptimizerState:
        """Load the finished stage's weights into the trial's model; return the optimizer state."""
        load_weights_of(model, self.finished / "model.safetensors")
        state: OptimizerState = torch.load(
            self.finished / "optimizer.pt", map_location="cpu", weights_only=True
        )
        return state

    def forget_weights(self) -> None:
        """Free the disk once the next stage has finished; the result stays."""
        for name in ("model.safetensors", "optimizer.pt"):
            (self.finished / name).unlink(missing_ok=True)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def seconds_of(checkpoint: Path) -> float:
    """Return the seconds its stage had taken when a checkpoint was sealed."""
    return float(json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))["seconds"])


def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False
