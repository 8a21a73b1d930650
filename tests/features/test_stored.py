"""An example comes back from its row as it was, and is batched as the task batches it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hfft.examples import ExampleDataset
from hfft.features.calls import Call
from hfft.features.cut import Absent, Cut, NoCutError, Slot, with_padding
from hfft.features.replay import FEATURE
from hfft.features.stored import Layout, StoredCollator, StoredExamples

from .training import collate

FIXED = Slot(Call("head", 0), 0, 0, (4,), torch.float32, varies=False)
VARYING = Slot(Call("layer", 0), "hidden", 0, (4,), torch.float32, varies=True)
EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7], "labels": 1, "weight": 0.5, "box": torch.rand(2, 2), "flag": True},
    {"input_ids": [8], "labels": 0, "weight": 1.5, "box": torch.rand(3, 2), "flag": False},
]


def cut(*slots: Slot, inputs: Any = None) -> Cut:
    return Cut(slots, {}, inputs or {}, {})


def layout_of(cut: Cut, example: dict[str, Any], dtype: torch.dtype | None) -> Layout:
    return Layout.of(cut, ExampleDataset([example], dict), dtype)


def features(example: dict[str, Any]) -> list[Tensor]:
    return [torch.randn(len(example["input_ids"]), 4), torch.randn(4)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    return type(one) is type(other) and one == other


def test_an_example_comes_back_as_the_transform_returned_it() -> None:
    layout = layout_of(cut(VARYING, FIXED), EXAMPLES[0], None)
    assert dict(layout.inputs) == {
        "input_ids": "list",
        "labels": "scalar",
        "weight": "scalar",
        "box": "tensor",
        "flag": "scalar",
    }
    for example in EXAMPLES:
        made = features(example)
        back = layout.example(layout.row(example, made))
        assert back.keys() == {*example, FEATURE.format(0), FEATURE.format(1)}
        assert all(same(back[name], value) for name, value in example.items())
        assert all(same(back[FEATURE.format(n)], one) for n, one in enumerate(made))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_are_stored_in_the_dtype_asked_for_and_enter_as_computed(
    dtype: torch.dtype,
) -> None:
    numbers = Slot(Call("x", 0), None, 0, (4,), torch.int64, varies=False)
    layout = layout_of(cut(FIXED, numbers), {"labels": 1}, dtype)
    assert [column.dtype for column in layout.columns] == [torch.int64, dtype, torch.int64]
    made = [torch.randn(4), torch.arange(4)]
    row = layout.row({"labels": 1}, made)
    assert row[FEATURE.format(0)].dtype == dtype
    back = layout.example(row)
    assert same(back[FEATURE.format(0)], made[0].to(dtype).float())
    assert same(back[FEATURE.format(1)], made[1])


def test_what_was_computed_in_bfloat16_is_stored_so() -> None:
    slot = Slot(Call("head", 0), 0, 0, (4,), torch.bfloat16, varies=False)
    layout = layout_of(cut(slot), {"labels": 1}, None)
    made = torch.randn(4).bfloat16()
    assert same(layout.example(layout.row({"labels": 1}, [made]))[FEATURE.format(0)], made)


def test_an_input_that_nothing_reads_takes_no_room_and_the_collator_still_sees_it() -> None:
    absent = {"pixel_values": Absent(("batch", 3, 8, 8), torch.float32)}
    examples = [{"pixel_values": torch.rand(3, 8, 8), "labels": n} for n in (1, 0)]
    layout = layout_of(cut(FIXED, inputs=absent), examples[0], None)
    assert [column.name for column in layout.columns] == ["input.labels", FEATURE.format(0)]
    row = layout.row(examples[0], [torch.ones(4)])
    assert row.keys() == {"input.labels", FEATURE.format(0)}
    back = layout.example(row)
    assert back["pixel_values"].is_meta
    assert back["pixel_values"].shape == (3, 8, 8)
    batch = StoredCollator(collate, layout)([back, back])
    assert batch.keys() == {"labels", FEATURE.format(0)}


def test_inputs_are_batched_as_the_task_batches_them() -> None:
    examples = [{n: e[n] for n in ("input_ids", "labels", "weight")} for e in EXAMPLES]
    layout = layout_of(cut(VARYING, FIXED), examples[0], None)
    made = [features(example) for example in examples]
    stored = [layout.example(layout.row(e, f)) for e, f in zip(examples, made, strict=True)]
    batch = StoredCollator(collate, layout)(stored)
    whole = collate(examples)
    assert list(batch) == [*whole, FEATURE.format(0), FEATURE.format(1)]
    assert all(same(batch[name], value) for name, value in whole.items())
    assert batch[FEATURE.format(0)].shape == (2, 3, 4)
    assert torch.equal(batch[FEATURE.format(0)][0], made[0][0])
    assert torch.equal(batch[FEATURE.format(0)][1, :1], made[1][0])
    assert not batch[FEATURE.format(0)][1, 1:].any()  # padding is not stored, and enters as zero
    assert torch.equal(batch[FEATURE.format(1)], torch.stack([one[1] for one in made]))


def test_whole_examples_are_left_to_the_task() -> None:
    layout = layout_of(cut(FIXED), {"labels": 1}, None)
    given: list[Any] = []

    def own(examples: Any) -> dict[str, Any]:
        given.append(examples)
        return {"done": True}

    examples = [{"labels": 1}, {"labels": 0}]
    assert StoredCollator(own, layout)(examples) == {"done": True}
    assert given == [examples]


def test_padding_stands_where_the_mask_says() -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    rows = torch.arange(6.0)[:, None]
    whole = with_padding(rows, mask)
    assert whole[..., 0].tolist() == [[0, 0, 0], [1, 2, 3], [0, 4, 5]]
    assert torch.equal(whole[mask.bool()], rows)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"labels": 1}, "not all the same inputs"),
        ({"labels": 1, "box": torch.rand(2, 2), "more": 1}, "not all the same inputs"),
        ({"labels": 1, "box": torch.rand(2, 3)}, "input.box has not the same shape"),
        ({"labels": [1, 2], "box": torch.rand(2, 2)}, "input.labels has not the same shape"),
    ],
)
def test_an_example_of_another_form_is_refused(example: dict[str, Any], message: str) -> None:
    layout = layout_of(cut(FIXED), {"labels": 1, "box": torch.rand(2, 2)}, None)
    with pytest.raises(NoCutError, match=message):
        layout.row(example, [torch.rand(4)])


def test_a_whole_number_among_fractions_comes_back_as_it_was_or_is_refused() -> None:
    layout = layout_of(cut(FIXED), {"labels": 1}, None)
    try:
        row = layout.row({"labels": 0.5}, [torch.rand(4)])
    except NoCutError:
        return
    assert layout.example(row)["labels"] == 0.5


@pytest.mark.parametrize("value", ["a text", None, [[1], [2, 3]], {"nested": 1}])
def test_what_is_no_tensor_is_refused_by_name(value: Any) -> None:
    with pytest.raises(NoCutError, match=r"words, .*can't be stored"):
        layout_of(cut(FIXED), {"labels": 1, "words": value}, None)


def test_features_of_another_shape_are_refused() -> None:
    layout = layout_of(cut(FIXED), {"labels": 1}, None)
    with pytest.raises(NoCutError, match="hfft_feature_0 has not the same shape"):
        layout.row({"labels": 1}, [torch.rand(5)])


def test_the_epoch_draws_the_view_whose_row_is_read() -> None:
    examples = ExampleDataset([{"n": n} for n in range(3)], lambda row: {"labels": row["n"]}, 7, 4)
    layout = layout_of(cut(FIXED), {"labels": 1}, None)
    rows: Any = [layout.row({"labels": n % 3}, [torch.full((4,), float(n))]) for n in range(3 * 4)]
    stored = StoredExamples(examples, rows, layout)
    assert len(stored) == 3
    drawn = set()
    for epoch in range(8):
        stored.set_epoch(epoch)
        for index in range(3):
            version = examples.drawn(index)
            drawn.add(version)
            found = stored[index]
            assert found["labels"] == index
            assert found[FEATURE.format(0)][0] == version * 3 + index
    assert drawn == {0, 1, 2, 3}
