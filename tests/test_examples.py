"""An example depends on seed, epoch and index alone, wherever and whenever it is made."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hfft.examples import ExampleDataset, Parts, seeded

ROWS: Any = [{"number": number} for number in range(12)]


def augment(row: Mapping[str, Any]) -> dict[str, Any]:
    """Draws from each of the three generators that augmentation may use."""
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    return {"number": row["number"], "drawn": torch.tensor(drawn, dtype=torch.float64)}


def dataset(seed: int = 0, epoch: int = 0) -> ExampleDataset:
    made = ExampleDataset(ROWS, augment, seed)
    made.set_epoch(epoch)
    return made


def drawn(examples: ExampleDataset, indices: range = range(12)) -> list[tuple[float, ...]]:
    return [tuple(examples[index]["drawn"].tolist()) for index in indices]


def loaded(loader: DataLoader[Any]) -> dict[int, tuple[float, ...]]:
    return {
        int(number): tuple(values.tolist())
        for batch in loader
        for number, values in zip(batch["number"], batch["drawn"], strict=True)
    }


def states() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)
    return random.getstate(), str(numpy), torch.get_rng_state().tolist()


def test_example_is_the_same_in_whatever_order_it_is_asked_for() -> None:
    forwards = drawn(dataset())
    assert drawn(dataset(), range(11, -1, -1)) == forwards[::-1]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert drawn(dataset()) == forwards


def test_example_is_the_same_when_an_epoch_is_revisited() -> None:
    examples = dataset()
    first = drawn(examples)
    examples.set_epoch(1)
    drawn(examples)
    examples.set_epoch(0)
    assert drawn(examples) == first


def test_epochs_seeds_and_examples_differ_in_every_generator() -> None:
    several = [drawn(dataset()), drawn(dataset(epoch=1)), drawn(dataset(seed=1))]
    for generator in range(3):
        values = {example[generator] for examples in several for example in examples}
        assert len(values) == 36


def test_generators_are_left_as_they_were() -> None:
    before = states()
    drawn(dataset())
    assert states() == before


def test_generators_are_left_as_they_were_when_a_transform_fails() -> None:
    def fail(row: Mapping[str, Any]) -> dict[str, Any]:
        raise RuntimeError(augment(row))

    before = states()
    with pytest.raises(RuntimeError):
        ExampleDataset(ROWS, fail)[0]
    assert states() == before


def test_workers_make_the_same_examples_as_the_process_itself() -> None:
    alone = loaded(DataLoader(dataset(), batch_size=3))
    assert loaded(DataLoader(dataset(), batch_size=2, num_workers=2)) == alone
    assert len(alone) == len(dataset()) == 12


def test_workers_that_outlive_an_epoch_see_the_next_one() -> None:
    examples = dataset()
    loader: DataLoader[Any] = DataLoader(
        examples, batch_size=4, num_workers=2, persistent_workers=True
    )
    for epoch in (0, 1, 0):
        examples.set_epoch(epoch)
        expected = dict(enumerate(drawn(dataset(epoch=epoch))))
        assert loaded(loader) == expected


def test_order_of_the_keys_counts() -> None:
    def one(*keys: int) -> float:
        with seeded(*keys):
            return random.random()

    assert one(0, 1, 2) == one(0, 1, 2)
    assert len({one(0, 1, 2), one(2, 1, 0), one(0, 2, 1), one(0, 1)}) == 4


# Parts of inputs


def half(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (row[name], float(torch.rand(())) if name == "image" else None)}


def pairs(views: int | None = None, random: tuple[str, ...] = ("image",)) -> ExampleDataset:
    rows = [{"image": n // 2, "text": n} for n in range(6)]
    names = ("image", "text")
    return ExampleDataset(rows, Parts({n: partial(half, n) for n in names}, random), views=views)


@pytest.mark.parametrize("views", [None, 3])
def test_a_part_is_drawn_alike_whether_the_others_are_made_or_not(views: int | None) -> None:
    whole = pairs(views)
    image, text = whole.only({"image"}), whole.only({"text"})
    drawn = set()
    for epoch in range(4):
        whole.set_epoch(epoch)  # of its parts too
        for n in range(len(whole)):
            assert {**image[n], **text[n]} == whole[n]
            drawn.add(whole[n]["image"])
    assert len(drawn) > len(whole)
    assert (image.views, text.views) == (views, None)


def test_other_parts_can_stand_in_for_every_example() -> None:
    whole = pairs(random=())
    for n, example in enumerate(map(whole.with_stand_ins({"text"}).__getitem__, range(6))):
        assert example["text"] == whole[n]["text"]
        assert example["image"][0] == 0


class Captions:
    """Six texts of three images, whose halves are counted as they are read."""

    def __init__(self) -> None:
        self.encoded = [{"text": n} for n in range(6)]
        self.originals = [{"image": n} for n in range(3)]
        self.places = np.array([0, 0, 1, 1, 2, 2])

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.originals[self.places[index]], **self.encoded[index]}


def captions(*random: str) -> ExampleDataset:
    parts = {name: partial(half, name) for name in ("image", "text")}
    return ExampleDataset(Captions(), Parts(parts, random, originals=("image",)))


def test_a_part_made_of_originals_is_made_once_of_each() -> None:
    whole = captions()
    images, texts = whole.only({"image"}), whole.only({"text"})
    assert (len(images), len(texts)) == (3, 6)
    assert len(whole.with_stand_ins({"image"})) == 3
    for n in range(6):
        assert images[images.place(n)]["image"][0] == whole[n]["image"][0]
        assert texts[texts.place(n)] == {"text": whole[n]["text"]}


def test_originals_that_are_changed_at_random_are_other_ones_for_each_of_their_texts() -> None:
    whole = captions("image")
    images = whole.only({"image"})
    assert len(images) == 6
    assert [images[images.place(n)]["image"] for n in range(6)] == [
        whole[n]["image"] for n in range(6)
    ]
