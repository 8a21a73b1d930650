"""One tower's output is stored, and the other runs as ever, on its own half of the examples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hfft.examples import ExampleDataset, Parts
from hfft.features.analysis import find_cut
from hfft.features.boundaries import highest_cut_of_towers
from hfft.features.cut import Cut
from hfft.features.prepare import StageFeatures, plain, prepare
from hfft.features.replay import FEATURE
from hfft.features.stored import StoredExamples
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups
from tests.families import TOWERS
from tests.feature_runs import warnings_of_runs

from .cases import (
    assert_replays,
    batch_of,
    cut_model,
    freeze,
    make,
    trained,
    with_features,
)
from .training import collate, contrastive, difference, example, setting, train, wanted

LOCKED = [(name, tower) for name, family in TOWERS.items() for tower in family.depth]


def locked(family: str, towers: Mapping[str, Any], *, dropout: float = 0.0) -> Any:
    model = make(family)
    for module in model.modules():
        for rate in ("dropout", "attention_dropout", "p"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, dropout)
    return freeze(model, find_layer_groups(model).frozen("none", towers))


def cut_of(model: Any, family: str) -> Cut:
    with kept_in_eval(model):
        return find_cut(model, batch_of(family))


@pytest.mark.parametrize(("family", "tower"), LOCKED)
def test_a_locked_tower_is_replayed_bit_for_bit(family: str, tower: str) -> None:
    """With dropout in the other tower, which may run first."""
    model = locked(family, {tower: "backbone"}, dropout=0.3)
    cut = cut_of(model, family)
    assert [call.module for call in cut.skipped] == [f"{tower}_model"]
    assert ("input_ids" in cut.below) == (tower == "text")
    assert set(cut.inputs) == (set() if tower == "text" else cut.below)
    assert all(not slot.varies and len(slot.shape) == 1 for slot in cut.slots)
    assert_replays(model, cut, batch_of(family, (9, 3, 7), seed=1))


@pytest.mark.parametrize("family", ["clip", "dual-encoder", "dual-encoder-timm", "siglip"])
@pytest.mark.parametrize(
    "towers", [{"vision": 2}, {"text": 2}, {"vision": 2, "text": 1}, {"vision": 1, "text": 4}]
)
def test_towers_that_are_frozen_in_part_are_replayed_bit_for_bit(
    family: str, towers: dict[str, Any]
) -> None:
    model = locked(family, towers, dropout=0.3)
    cut = cut_of(model, family)
    assert {call.module.partition("_")[0] for call in cut.skipped} >= towers.keys()
    assert_replays(model, cut, batch_of(family, (9, 3, 7), seed=1))


def test_the_towers_of_a_locked_tower_are_named_where_the_model_is_cut() -> None:
    assert (
        cut_of(locked("clip", {"vision": "backbone"}), "clip").place == "before visual_projection"
    )
    both = locked("clip", {"vision": "backbone", "text": 2})
    place = "before visual_projection and before text_model.encoder.layers.1"
    assert cut_of(both, "clip").place == place


def test_only_the_other_tower_and_the_projections_run() -> None:
    model = locked("clip", {"vision": "backbone"})
    cut = cut_of(model, "clip")
    stored = with_features(model, cut, batch_of("clip"))
    assert "pixel_values" not in stored
    ran = []
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    with cut_model(model, cut):
        trained(model, stored)
    assert {path.partition(".")[0] for path in ran} == {
        "text_model",
        "text_projection",
        "visual_projection",
    }


def test_a_tower_called_by_itself_computes_what_it_is_given() -> None:
    """Classes are embedded between steps, by a tower whose stored tensors are at hand."""
    model = locked("clip", {"text": "backbone"})
    cut = cut_of(model, "clip")
    stored = with_features(model, cut, batch_of("clip"))
    other = {n: v for n, v in batch_of("clip", (5, 4), seed=3).items() if n != "pixel_values"}
    with torch.no_grad():
        whole = model.eval().get_text_features(**other).pooler_output
        with cut_model(model, cut):
            with torch.enable_grad():
                trained(model, stored)
            assert torch.equal(model.eval().get_text_features(**other).pooler_output, whole)


def test_where_one_tower_cant_be_cut_the_other_is() -> None:
    """A masked text whose last position is pooled depends on its padding."""
    model = locked("siglip", {"vision": "backbone", "text": 2})
    batch = {**batch_of("siglip"), "attention_mask": batch_of("clip")["attention_mask"]}
    groups = find_layer_groups(model)
    boundaries = [
        [groups.frozen("none", {tower: depth}) for depth in range(depth, 0, -1)]
        for tower, depth in (("text", 2), ("vision", 3))
    ]
    frozen = groups.frozen("none", {"vision": "backbone", "text": 2})
    with kept_in_eval(model):
        cut, names, why = highest_cut_of_towers(model, batch, frozen, boundaries)
        assert [call.module for call in cut.skipped] == ["vision_model"]
    assert names == groups.frozen("none", {"vision": "backbone"})
    assert "what learns needs more" in why


# Halves of examples


class Pairs:
    """Pairs of an image and a text, that note which half of which is made."""

    def __init__(self, *random: str, count: int = 8) -> None:
        self.random, self.count = random, count
        self.made: list[tuple[str, int]] = []

    def examples(self, views: int | None = None) -> ExampleDataset:
        parts = {kind: partial(self.half, kind) for kind in ("images", "words")}
        rows = [{"number": n} for n in range(self.count)]
        return ExampleDataset(rows, Parts(parts, self.random), views=views)

    def half(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        self.made.append((kind, row["number"]))
        found = example((kind, ""), row)
        if kind in self.random:
            draw = int(torch.randint(1, 10, ()))
            for name, value in found.items():
                found[name] = (
                    [(n + draw) % 27 + 3 for n in value] if kind == "words" else value / draw
                )
        return found


def prepared(towers: Mapping[str, Any], pairs: Pairs, views: int | None = None) -> Any:
    torch.manual_seed(0)
    model = contrastive()
    freeze(model, find_layer_groups(model).frozen("none", towers))
    with kept_in_eval(model):
        return prepare(model, wanted(model), [], {"train": pairs.examples(views)}, setting())


def test_images_of_a_locked_tower_are_prepared_once_and_texts_in_every_epoch() -> None:
    pairs = Pairs("words")
    stored = prepared({"vision": "backbone"}, pairs).datasets["train"]
    assert isinstance(stored, StoredExamples)
    pairs.made.clear()
    seen = []
    for epoch in range(3):
        stored.set_epoch(epoch)
        seen.append([stored[n]["input_ids"] for n in range(len(stored))])
        assert [stored[n]["input_ids"] for n in range(len(stored))] == seen[-1]
    assert seen[0] != seen[1] != seen[2]
    assert {kind for kind, _ in pairs.made} == {"words"}


def test_texts_of_a_locked_tower_are_stored_while_images_change_in_every_epoch() -> None:
    pairs = Pairs("images")
    features = prepared({"text": "backbone"}, pairs)
    stored = features.datasets["train"]
    assert isinstance(stored, StoredExamples)
    pairs.made.clear()
    batches = []
    for epoch in range(2):
        stored.set_epoch(epoch)
        batches.append(features.collate([stored[n] for n in range(4)]))
    one, other = batches
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert torch.equal(one[FEATURE.format(0)], other[FEATURE.format(0)])
    assert {kind for kind, _ in pairs.made} == {"images"}


@pytest.mark.parametrize(("towers", "random"), [("vision", "images"), ("text", "words")])
def test_a_random_half_of_a_locked_tower_is_refused_without_views(towers: str, random: str) -> None:
    features = prepared({towers: "backbone"}, Pairs(random))
    assert features.cut is None
    features = prepared({towers: "backbone"}, Pairs(random), views=2)
    assert features.cut is not None
    [entry] = features.entries
    assert len(entry.read()) == 16


def test_views_of_the_other_half_take_no_room() -> None:
    [entry] = prepared({"text": "backbone"}, Pairs("images"), views=3).entries
    assert len(entry.read()) == 8


def test_the_half_that_is_stored_decides_alone_what_is_found_again() -> None:
    first = prepared({"vision": "backbone"}, Pairs("words"))
    first.close()
    again = prepared({"vision": "backbone"}, Pairs("words"))
    assert again.report is not None
    assert again.report["reused"]


class Mixed(nn.Module):
    """Its frozen part reads both inputs, and what learns one of them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4).requires_grad_(False)
        self.mid = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"logits": self.mid(y) + self.mid(self.body(x + 2 * y))}


def test_what_depends_on_both_halves_is_not_stored_by_one_of_them() -> None:
    def number(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: torch.full((4,), float(row[name]))}

    halves = Parts({name: partial(number, name) for name in ("x", "y")})
    examples = ExampleDataset([{"x": n, "y": n * n} for n in range(6)], halves)
    model: Any = Mixed()
    with warnings_of_runs() as said:
        assert prepare(model, wanted(model), [], {"train": examples}, setting()).cut is None
    assert "reads inputs that are not the frozen tower's" in said[0]


class Captions:
    """Texts of images, three of each."""

    def __init__(self, images: int) -> None:
        self.originals = [{"number": n} for n in range(images)]
        self.encoded = [{"words": n} for n in range(3 * images)]
        self.places = np.arange(3 * images) // 3

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.originals[self.places[index]], **self.encoded[index]}


@pytest.mark.parametrize(("tower", "rows"), [("vision", 3), ("text", 9)])
def test_an_image_of_several_captions_is_stored_once(tower: str, rows: int) -> None:
    halves = {
        "images": partial(example, ("images", "")),
        "words": lambda row: example(("words", ""), {"number": row["words"]}),
    }
    whole = ExampleDataset(Captions(3), Parts(halves, originals=["images"]))
    torch.manual_seed(0)
    model = contrastive()
    freeze(model, find_layer_groups(model).frozen("none", {tower: "backbone"}))
    with kept_in_eval(model):
        features = prepare(model, wanted(model), [], {"train": whole}, setting())
    assert len(features.entries[0].read()) == rows
    stored: Any = features.datasets["train"]
    assert stored.is_quick == (tower == "vision")
    with torch.no_grad(), features.replayed(model):
        own = model.eval()(**features.collate([stored[n] for n in range(9)]))
        computed = model(**collate([whole[n] for n in range(9)]))
    assert torch.allclose(own.logits_per_text, computed.logits_per_text, rtol=1e-5)
    features.close()


def run(
    towers: Mapping[str, Any], pairs: Pairs, folder: Path, *, stored: bool, views: int | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = contrastive()
    freeze(model, find_layer_groups(model).frozen("none", towers))
    examples = {"train": pairs.examples(views)}
    features: StageFeatures = plain(examples, collate)
    if stored:
        with kept_in_eval(model):
            features = prepare(model, wanted(model), [], examples, setting())
        assert features.cut is not None
    losses = train(model, features, folder)
    features.close()
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("towers", "random", "views"),
    [
        ({"vision": "backbone"}, ("words",), None),
        ({"vision": "backbone"}, ("images", "words"), 2),
        ({"text": "backbone"}, ("images",), None),
        ({"text": "backbone"}, ("images", "words"), 2),
        ({"vision": "backbone", "text": 2}, ("images", "words"), 2),
    ],
)
def test_training_on_stored_halves_equals_training_on_whole_pairs(
    towers: dict[str, Any], random: tuple[str, ...], views: int | None, tmp_path: Path
) -> None:
    whole, one = run(towers, Pairs(*random), tmp_path / "whole", stored=False, views=views)
    stored, other = run(towers, Pairs(*random), tmp_path / "stored", stored=True, views=views)
    assert len(whole) == 4
    assert stored == pytest.approx(whole, rel=1e-6)
    assert difference(one, other) < 1e-6
