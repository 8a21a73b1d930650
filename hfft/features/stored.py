"""Examples whose frozen part was computed once: what the Trainer reads in their stead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hfft.examples import ExampleDataset
from hfft.features.cut import MASK, Cut, NoCutError, with_padding
from hfft.features.replay import FEATURE
from hfft.features.store import Column, StoredRows

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
_INPUT = "input."


@dataclass(frozen=True)
class Layout:
    """How an example's inputs, and what a cut takes out of the model, stand in a row.

    Attributes:
        cut: of the model.
        inputs: the inputs that are kept, and as what: `scalar`, `list` or `tensor`.
        absent: those that are not, as tensors without memory, which the collator still sees.
        columns: of the row.
    """

    cut: Cut
    inputs: Mapping[str, str]
    absent: Mapping[str, Tensor]
    columns: tuple[Column, ...]

    @classmethod
    def of(cls, cut: Cut, example: Mapping[str, Any], dtype: torch.dtype | None) -> Layout:
        """Derive the layout from an example as the task's transform returns it.

        Args:
            cut: of the model.
            example: any.
            dtype: of the stored tensors; None: as computed.

        Raises:
            NoCutError: it holds what can't be stored.
        """
        inputs, absent, columns = {}, {}, []
        for name, value in example.items():
            if name in cut.inputs and isinstance(value, Tensor):
                absent[name] = value.to("meta")
                continue
            kind, column = _column(name, value)
            inputs[name] = kind
            columns.append(column)
        for number, slot in enumerate(cut.slots):
            own = dtype if dtype is not None and slot.dtype.is_floating_point else slot.dtype
            columns.append(Column(FEATURE.format(number), own, slot.shape, slot.varies))
        return cls(cut, inputs, absent, tuple(columns))

    def bytes(self, length: float) -> float:
        """Return the size of a row, of an example with so many tokens."""
        return sum(
            math.prod(column.shape) * column.dtype.itemsize * (length if column.varies else 1)
            for column in self.columns
        )

    def row(self, example: Mapping[str, Any], features: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return an example's row.

        Raises:
            NoCutError: the example is of another form than the one the layout was made for.
        """
        columns = {column.name: column for column in self.columns}
        kept = {_INPUT + n: torch.as_tensor(v) for n, v in example.items() if n not in self.absent}
        row = kept | {FEATURE.format(n): feature for n, feature in enumerate(features)}
        if row.keys() != columns.keys():
            raise NoCutError("examples have not all the same inputs")
        for name, column in columns.items():
            if name in kept and row[name].dtype != column.dtype:
                raise NoCutError(f"{name} has not the same type in all examples")
            shape = row[name].shape[1:] if column.varies else row[name].shape
            if shape != column.shape:
                raise NoCutError(f"{name} has not the same shape in all examples")
            row[name] = row[name].to("cpu", column.dtype)
        return row

    def example(self, row: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return an example's inputs as the transform returned them, and its stored tensors."""
        found: dict[str, Any] = dict(self.absent)
        for name, kind in self.inputs.items():
            value = row[_INPUT + name]
            found[name] = value if kind == "tensor" else value.tolist()
        for number, slot in enumerate(self.cut.slots):
            name = FEATURE.format(number)
            found[name] = row[name].to(slot.dtype)
        return found


class StoredExamples(Dataset[dict[str, Any]]):
    """The examples of an ExampleDataset, with rows of an entry in place of what is costly.

    Args:
        examples: what the rows were made from.
        rows: version by version, all examples in order.
        layout: of the rows.
    """

    def __init__(self, examples: ExampleDataset, rows: StoredRows, layout: Layout) -> None:
        self.examples, self.rows, self.layout = examples, rows, layout

    def set_epoch(self, epoch: int) -> None:
        """Take the number of passes completed."""
        self.examples.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example's inputs and stored tensors."""
        version = self.examples.drawn(index) if self.examples.views else 0
        return self.layout.example(self.rows[version * len(self) + index])


class StoredCollator:
    """Batches stored examples as the task batches whole ones, and these too.

    Args:
        collate: the task's.
        layout: of the stored examples.
    """

    def __init__(self, collate: Collate, layout: Layout) -> None:
        self.collate, self.layout = collate, layout

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the model's inputs, stored tensors last."""
        names = [FEATURE.format(number) for number in range(len(self.layout.cut.slots))]
        if names[0] not in examples[0]:
            return self.collate(examples)
        inputs = [{n: v for n, v in one.items() if n not in names} for one in examples]
        batch = self.collate(inputs)
        for name in self.layout.absent:
            del batch[name]  # of no memory; the cut model knows its shape
        for name, slot in zip(names, self.layout.cut.slots, strict=True):
            rows = [example[name] for example in examples]
            if slot.varies:
                batch[name] = with_padding(torch.cat(rows), batch[MASK])
            elif slot.channels_last:
                batch[name] = torch.stack(rows).contiguous(memory_format=torch.channels_last)
            else:
                batch[name] = torch.stack(rows)
        return batch


def _column(name: str, value: Any) -> tuple[str, Column]:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NoCutError(f"{name}, {type(value).__name__}, can't be stored") from error
    kind = "tensor" if isinstance(value, Tensor) else "scalar" if tensor.dim() == 0 else "list"
    varies = tensor.dim() > 0
    shape = tuple(tensor.shape[1:]) if varies else ()
    return kind, Column(_INPUT + name, tensor.dtype, shape, varies)
