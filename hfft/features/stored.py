"""Examples whose frozen part was computed once: what the Trainer reads in their stead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hfft.examples import Beside, ExampleDataset, parts_of
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
        parts: of the transform, those that make what is read below the cut.
        above: the inputs that the other parts make, in every epoch anew.
        inputs: the inputs that are kept, and as what: `scalar`, `list` or `tensor`.
        absent: those that are not, as tensors without memory, which the collator still sees.
        columns: of the row.
    """

    cut: Cut
    parts: frozenset[str]
    above: frozenset[str]
    inputs: Mapping[str, str]
    absent: Mapping[str, Tensor]
    columns: tuple[Column, ...]

    @classmethod
    def of(cls, cut: Cut, examples: ExampleDataset, dtype: torch.dtype | None) -> Layout:
        """Derive the layout from an example as the task's transform returns it.

        Args:
            cut: of the model.
            examples: any.
            dtype: of the stored tensors; None: as computed.

        Raises:
            NoCutError: it holds what can't be stored.
        """
        inputs, absent, columns = {}, {}, []
        made = {name: examples.only({name}).version(0, 0) for name in parts_of(examples.transform)}
        parts = parts_below(cut, made)
        above = frozenset(name for part in made.keys() - parts for name in made[part])
        kept = [one for part, own in made.items() if part in parts for one in own.items()]
        for name, value in kept:
            if name in cut.inputs and isinstance(value, Tensor):
                absent[name] = value.to("meta")
                continue
            kind, column = _column(name, value)
            inputs[name] = kind
            columns.append(column)
        for number, slot in enumerate(cut.slots):
            own = dtype if dtype is not None and slot.dtype.is_floating_point else slot.dtype
            columns.append(Column(FEATURE.format(number), own, slot.shape, slot.varies))
        return cls(cut, parts, above, inputs, absent, tuple(columns))

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
        left_out = self.absent.keys() | self.above
        kept = {_INPUT + n: torch.as_tensor(v) for n, v in example.items() if n not in left_out}
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


def parts_below(cut: Cut, made: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    """Return the parts of a transform that needn't run once what is cut off is stored.

    What is stored doesn't depend on the others, which may draw at random, or be labels.

    Args:
        cut: of the model.
        made: what each part makes of an example.
    """
    above = {name for name, one in made.items() if cut.below.isdisjoint(one)}
    return frozenset(made.keys() - above) or frozenset(made)


class StoredExamples(Dataset[dict[str, Any]]):
    """The examples of an ExampleDataset, with rows of an entry in place of what is costly.

    Args:
        examples: the examples.
        rows: of the parts that the layout names, version by version, all in the order of these.
        layout: of the rows.
    """

    def __init__(self, examples: ExampleDataset, rows: StoredRows, layout: Layout) -> None:
        self.examples, self.rows, self.layout = examples, rows, layout
        self._below = examples.only(layout.parts)
        names = parts_of(examples.transform).keys() - layout.parts
        self._above = examples.only(names) if names else None

    @property
    def is_quick(self) -> bool:
        """Whether nothing is left to be made of originals, such as images, in every epoch."""
        rows = self.examples.rows
        encoded = rows.encoded if isinstance(rows, Beside) else None
        return self._above is None or self._above.rows is encoded

    def set_epoch(self, epoch: int) -> None:
        """Take the number of passes completed."""
        self.examples.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example's inputs and stored tensors."""
        version = self._below.drawn(index) if self._below.views else 0
        place = version * len(self._below) + self._below.place(index)
        found = self.layout.example(self.rows[place])
        above = self._above
        return found if above is None else {**found, **above[above.place(index)]}


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
