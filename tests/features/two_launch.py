"""Trains on whole and on stored examples, on the processes there are; a JSON file a process.

Args: the folder to write to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hfft.features import prepare as preparing
from hfft.features import store
from hfft.features.prepare import prepare
from hfft.hooks.freeze import kept_in_eval
from hfft.processes import leave_processes
from tests.features.training import (
    collate,
    difference,
    examples_of,
    new_model,
    run,
    setting,
    wanted,
)

folder = Path(sys.argv[1])
torch.set_num_threads(1)
processes = setting().processes
rank, world = processes.process_index, processes.num_processes
# So that there is something to share. Batches of the pass are as large as those of the training
# then: statistics that learn (BatchNorm's) make much of rounding.
preparing.rows_per_chunk = lambda count: 4


def trained(family: str, boundary: Any) -> dict[str, Any]:
    """Whole and stored; with more processes, of smaller batches, so that all see the same."""
    size: dict[str, Any] = {"still": True, "count": 12, "batch_size": 4 // world}
    if boundary == 3:  # two examples are too few for statistics that learn
        size |= {"count": 12 * world, "batch_size": 4}
    whole, one, _ = run(family, boundary, folder / "whole", stored=False, **size)
    stored, other, digest = run(family, boundary, folder / "stored", stored=True, **size)
    torch.save(other, folder / f"{family}-{world}-{rank}.pt")
    return {
        "whole": whole,
        "stored": stored,
        "difference": difference(one, other),
        "digest": digest,
    }


def shared() -> dict[str, Any]:
    """Which files each process writes."""
    written = []
    write = store.Entry.write

    def noted(entry: Any, chunk: int, rows: Any) -> None:
        written.append(chunk)
        write(entry, chunk, rows)

    store.Entry.write = noted
    try:
        return {**prepared("bert", 2, "shared"), "written": written}
    finally:
        store.Entry.write = write


def prepared(family: str, boundary: int, name: str) -> dict[str, Any]:
    model = new_model(family, boundary)
    changed = setting(fingerprints={"train": name})
    with kept_in_eval(model):
        made = prepare(model, wanted(model), [], {"train": examples_of(family, 23)}, changed)
    state = {
        "stored": made.cut is not None,
        "collate": made.collate is collate,
        "missing": [entry.missing() for entry in made.entries],
    }
    made.close()
    return state


def failing(where: str) -> dict[str, Any]:
    """The second process alone meets a full disk."""
    owner = {"write": store.Entry, "open": preparing}[where]
    name = {"write": "write", "open": "open_entry"}[where]
    right = getattr(owner, name)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError("no space left")

    if rank == 1:
        setattr(owner, name, full)
    try:
        return prepared("bert", 2, f"failing at {where}")
    finally:
        setattr(owner, name, right)


def differing() -> dict[str, Any]:
    """The second process has other frozen weights."""
    model = new_model("bert", 2)
    if rank == 1:
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[5] += 1
    with kept_in_eval(model):
        changed = setting(fingerprints={"train": "differing"})
        made = prepare(model, wanted(model), [], {"train": examples_of("bert")}, changed)
    return {"stored": made.cut is not None}


results: dict[str, Any] = {"world": world}
for family, boundary in (("bert", 2), ("timm-resnet", 3), ("timm-resnet", 5), ("clip", (1, 3))):
    results[f"{family} {boundary}"] = trained(family, boundary)
if world > 1:
    results["shared"] = shared()
    results["failing at open"] = failing("open")
    results["failing at write"] = failing("write")
    results["differing"] = differing()
    dist.barrier()
(folder / f"rank{rank}.json").write_text(json.dumps(results))
leave_processes()
