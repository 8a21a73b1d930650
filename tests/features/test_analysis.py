"""A cut lies below all that learns, is proved on the model itself, and is refused otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hfft.features.analysis import find_cut
from hfft.features.boundaries import highest_cut
from hfft.features.cut import Cut, NoCutError, trimmed
from hfft.features.replay import replayed
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups
from tests.families import batchnorm_resnet, bert

from . import odd_models as odd
from .cases import Batch, assert_replays, batch_of, freeze, frozen, make, perturb, with_features


def rows(size: int, seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, 4, generator=made), "labels": torch.arange(size) % 3}


def one_by_one(model: Any, cut: Cut, batch: Batch) -> Batch:
    """Features that were computed with no other example beside."""
    size = len(batch["labels"])
    parts = [
        with_features(model, cut, {name: value[n : n + 1] for name, value in batch.items()})
        for n in range(size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def gradients(model: Any, batch: Batch) -> list[Tensor | None]:
    learning = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch)["loss"]
    return [loss, *torch.autograd.grad(loss, learning, allow_unused=True)]


def assert_right(model: Any, cut: Cut) -> None:
    """Whatever the batch, and whatever was learned since."""
    for seed in range(1, 4):
        batch = rows(5, seed)
        stored = one_by_one(model, cut, batch)
        perturb(model)
        whole = gradients(model, batch)
        with replayed(model, cut):
            replay = gradients(model, stored)
        torch.testing.assert_close(replay, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        odd.FrozenWeightAbove,
        odd.InPlace,
        odd.ArgumentInPlace,
        odd.LearningCalledTwice,
        odd.FrozenCalledAgainAbove,
        odd.Nested,
        odd.KeptOnItself,
        odd.MaskedNaN,
    ],
)
def test_odd_code_is_cut_rightly(kind: Any) -> None:
    model = kind()
    assert_right(model, find_cut(model, rows(2, 0)))


@pytest.mark.parametrize(
    "kind",
    [
        odd.LearningWeightBeside,
        odd.LearningWeightBelow,
        odd.DetachedBelow,
        odd.NoGradBelow,
        odd.Counting,
        odd.RandomInTheBody,
        odd.AcrossTheBatch,
    ],
)
def test_odd_code_is_refused_or_cut_rightly(kind: Any) -> None:
    model = kind()
    try:
        cut = find_cut(model, rows(2, 0))
    except NoCutError:
        return
    assert kind is not odd.RandomInTheBody
    assert_right(model, cut)


def test_left_padding_under_absolute_positions_is_refused() -> None:
    model = frozen("gpt2-classes", 4)  # it counts positions from the first padding on
    with kept_in_eval(model), pytest.raises(NoCutError):
        find_cut(model, batch_of("gpt2-classes", side="left"))


def test_a_short_text_padded_on_the_left_does_not_stand_in_the_way() -> None:
    model = frozen("gpt2-classes", 1)
    batch = trimmed(batch_of("gpt2-classes", (16, 3), "left"), 8)
    with kept_in_eval(model):
        assert find_cut(model, batch).slots


# Nothing to cut


@pytest.mark.parametrize(
    "names", [[], ["bert.encoder.layer.1.output.dense.weight"], ["classifier"]]
)
def test_nothing_frozen_at_the_input_is_refused(names: list[str]) -> None:
    model = bert()
    freeze(model, [n for n, _ in model.named_parameters() if n.startswith(tuple(names or ["-"]))])
    with pytest.raises(NoCutError) as caught:
        find_cut(model, batch_of("bert"))
    assert str(caught.value) in (
        "nothing frozen comes before what learns",
        "what learns needs more of what is frozen than can be stored",
    )


def test_frozen_blocks_above_learning_embeddings_are_refused() -> None:
    model = bert()
    groups = find_layer_groups(model)
    freeze(model, groups.frozen("backbone") - groups.frozen(1))
    with pytest.raises(NoCutError, match="nothing frozen comes before what learns"):
        find_cut(model, batch_of("bert"))


def test_highest_cut_of_no_boundary_is_refused() -> None:
    with pytest.raises(NoCutError, match="nothing is frozen"):
        highest_cut(bert(), batch_of("bert"), [])


def test_highest_cut_tells_what_stands_in_the_way_at_the_first() -> None:
    model = frozen("bert", 2)
    names = frozenset({"bert.encoder.layer.1.output.dense.weight"})
    groups = find_layer_groups(model)
    with kept_in_eval(model):
        cut, chosen, why = highest_cut(model, batch_of("bert"), [names, groups.frozen(1)])
    assert chosen == groups.frozen(1)
    assert cut.place == "before bert.encoder"
    assert "what is frozen" in why or "nothing frozen" in why
    with pytest.raises(NoCutError):
        highest_cut(model, batch_of("bert"), [names])


# What a cut depends on, and what it leaves behind


@pytest.mark.parametrize("family", ["timm-resnet", "bert", "clip"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = frozen(family, 2)
    model.train()
    with kept_in_eval(model):
        modes = {path: module.training for path, module in model.named_modules()}
        learning = {name: p.requires_grad for name, p in model.named_parameters()}
        state = {name: value.clone() for name, value in model.state_dict().items()}
        code = {path: dict(module.__dict__) for path, module in model.named_modules()}
        rng = torch.get_rng_state()
        groups = find_layer_groups(model)
        find_cut(model, batch_of(family))
        highest_cut(model, batch_of(family), [groups.frozen(n) for n in (3, 2, 1)])
        assert torch.equal(torch.get_rng_state(), rng)
        assert {path: module.training for path, module in model.named_modules()} == modes
        assert {name: p.requires_grad for name, p in model.named_parameters()} == learning
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        for path, module in model.named_modules():
            assert module.__dict__.keys() == code[path].keys()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_frozen_is_refused_and_the_statistics_stay() -> None:
    model = batchnorm_resnet()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    with pytest.raises(NoCutError, match="nothing frozen"):
        find_cut(model, batch_of("timm-resnet"))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama-classes", "vit", "timm-resnet"])
def test_a_cut_is_the_same_whatever_the_batch(family: str) -> None:
    model = frozen(family, 2)
    with kept_in_eval(model):
        cuts = [
            find_cut(model, batch_of(family, lengths, seed=seed))
            for lengths, seed in (((6, 4), 0), ((9, 3, 7), 1), ((4, 8, 8, 8), 2))
        ]
    assert cuts[0] == cuts[1] == cuts[2]


def test_a_batch_as_large_as_a_text_is_long_is_no_matter() -> None:
    model = frozen("bert", 2)
    with kept_in_eval(model):
        cut = find_cut(model, batch_of("bert", (4, 3, 4, 2)))  # (B, T) = (4, 4)
        other = find_cut(model, batch_of("bert", (16, 5)))  # T is the width too
    assert cut == other
    assert cut.slots[0].varies
    assert_replays(model, cut, batch_of("bert", (9, 3, 7), seed=1))


def test_two_examples_alike_are_cut_like_any() -> None:
    model = frozen("bert", 2)
    batch = {name: value[[0, 0]] for name, value in batch_of("bert").items()}
    with kept_in_eval(model):
        assert find_cut(model, batch) == find_cut(model, batch_of("bert"))


def test_cuts_of_all_boundaries_save_more_the_higher_they_lie() -> None:
    model = make("bert")
    groups = find_layer_groups(model)
    saved = []
    for depth in range(1, groups.depth + 1):
        freeze(model, groups.frozen(depth))
        with kept_in_eval(model):
            saved.append(find_cut(model, batch_of("bert")).flops)
    assert saved == sorted(saved)
    assert saved[0] < saved[-1]
