"""The one pass: all examples through the frozen part, on all processes, into the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hfft.examples import ExampleDataset
from hfft.features.cut import MASK, Autocast, NoCutError, model_inputs
from hfft.features.replay import capture
from hfft.features.store import Entry
from hfft.features.stored import Collate, Layout


@dataclass(frozen=True)
class Target:
    """An entry to fill, and what its rows are made of."""

    entry: Entry
    layout: Layout


def rows_per_chunk(examples: int) -> int:
    """Return how many rows go into a file: what a kill costs, and what processes share out."""
    return min(256, 32 * max(1, -(-examples // 32_000)))


def fill(
    model: nn.Module,
    targets: Sequence[tuple[Target, Sequence[int]]],
    examples: ExampleDataset,
    collate: Collate,
    *,
    batch_size: int,
    autocast: Autocast,
    processes: PartialState,
    workers: int = 0,
) -> None:
    """Write what is missing of some entries, this process its share of it.

    A batch never reaches over the end of a file, so rows do not depend on how many processes there
    are, nor on where an earlier pass was cut short.

    Args:
        model: in eval mode, on its device.
        targets: entries of the same examples, and of as many versions, at several boundaries, each
            with the files it lacks, which all processes must see alike; one pass serves all that
            lack the same.
        examples: whose versions (see ExampleDataset.views) stand one after the other.
        collate: the task's.
        batch_size: examples that run together, at most.
        autocast: the precision to compute in.
        processes: that share the work.
        workers: processes that decode ahead.

    Raises:
        NoCutError: an example is unlike the others.
        OSError: the disk is full, or failed.
    """
    together: dict[tuple[tuple[int, ...], range], list[Target]] = {}
    for target, missing in targets:
        if missing:
            first = target.entry.rows(0)
            together.setdefault((tuple(missing), first), []).append(target)
    for (missing, _), some in together.items():
        own = missing[processes.process_index :: processes.num_processes]
        pieces = [
            list(rows[start : start + batch_size])
            for rows in map(some[0].entry.rows, own)
            for start in range(0, len(rows), batch_size)
        ]
        loader: DataLoader[Any] = DataLoader(
            _Versions(examples),  # type: ignore[arg-type]
            batch_sampler=pieces,
            num_workers=min(workers, len(pieces)),
            collate_fn=_packed,
        )
        loaded = iter(loader)
        for chunk in own:
            rows = some[0].entry.rows(chunk)
            gathered: list[Mapping[str, Any]] = []
            while len(gathered) < len(rows):
                gathered += _unpacked(next(loaded))
            _write(model, some, chunk, gathered, collate, batch_size, autocast, processes.device)


def _packed(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack what can be: a worker hands on every tensor by a file descriptor of its own."""
    packed: dict[str, Any] = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        alike = all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)
        packed[name] = torch.stack(values) if alike else values
    return packed


def _unpacked(packed: Mapping[str, Any]) -> list[dict[str, Any]]:
    count = len(next(iter(packed.values())))
    return [{name: values[n] for name, values in packed.items()} for n in range(count)]


def _write(
    model: nn.Module,
    targets: Sequence[Target],
    chunk: int,
    examples: Sequence[Mapping[str, Any]],
    collate: Collate,
    batch_size: int,
    autocast: Autocast,
    device: torch.device,
) -> None:
    order = sorted(range(len(examples)), key=lambda n: _length(examples[n]))  # less padding
    written: list[list[dict[str, Tensor]]] = [[{}] * len(examples) for _ in targets]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = model_inputs(collate([examples[n] for n in chosen]))
        batch = idling(on_device(batch, device), [target.layout for target in targets])
        _check(targets, batch)
        with autocast():
            captured = capture(model, [target.layout.cut for target in targets], batch)
        for target, rows, features in zip(targets, written, captured, strict=True):
            for n, row in zip(chosen, _split(target, features, batch), strict=True):
                rows[n] = target.layout.row(examples[n], row)
    for target, rows in zip(targets, written, strict=True):
        target.entry.write(chunk, rows)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors; what else a collator adds stays as it is."""
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}


def idling(batch: Mapping[str, Any], layouts: Sequence[Layout]) -> dict[str, Any]:
    """Return a batch with one image alone for a tower of which nothing is stored."""
    above = frozenset.intersection(*(layout.above for layout in layouts))
    return {n: v[:1] if n in above and v.is_floating_point() else v for n, v in batch.items()}


def _split(
    target: Target, features: Sequence[Tensor], batch: Mapping[str, Tensor]
) -> Iterator[list[Tensor]]:
    """Return each example's part of a batch's tensors, without padding."""
    slots = target.layout.cut.slots
    for n in range(len(features[0])):
        yield [
            feature[n][batch[MASK][n].bool()] if slot.varies else feature[n]
            for slot, feature in zip(slots, features, strict=True)
        ]


def _check(targets: Sequence[Target], batch: Mapping[str, Tensor]) -> None:
    for target in targets:
        for name, absent in target.layout.cut.inputs.items():
            if tuple(batch[name].shape[1:]) != absent.shape[1:]:
                raise NoCutError(f"{name} has not the same shape in all examples")


def _length(example: Mapping[str, Any]) -> int:
    """Return how many tokens an example has; all images are alike."""
    ids = example.get("input_ids")
    return 0 if ids is None else len(ids)


class _Versions:
    """All versions of all examples, one after the other."""

    def __init__(self, examples: ExampleDataset) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples) * (self.examples.views or 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        version, row = divmod(index, len(self.examples))
        return self.examples.version(row, version)
