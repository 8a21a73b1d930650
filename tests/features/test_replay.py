"""A cut model on stored tensors computes what the whole one does, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hfft.features.analysis import find_cut
from hfft.features.boundaries import highest_cut
from hfft.features.cut import Cut, NoCutError
from hfft.features.replay import capture, replayed
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups
from tests.families import FAMILIES, bert, clip, vit

from .cases import (
    answers,
    assert_replays,
    batch_of,
    cut_model,
    freeze,
    frozen,
    make,
    same,
    trained,
    with_features,
)

TEXTS = [name for name, family in FAMILIES.items() if "words" in family.inputs]
# Dropout on the embeddings stays on in an encoder or decoder that learns in part, so that what its
# frozen blocks make is not the same in every epoch.
CUT_LOWER = {("t5", 2), ("t5", 4), ("bart", 2), ("bart", 4)}
# Its head is tied to the embeddings: nothing learns where all groups are frozen.
ALL_FROZEN = {("gpt2-words", 4), ("t5", 5), ("bart", 5)}


def boundaries() -> list[Any]:
    """Every boundary; in the fast tier, the highest one and that of two groups."""
    found = []
    for name, family in FAMILIES.items():
        highest = max(family.depth.values())
        for depth in range(1, highest + 1):
            if (name, depth) in CUT_LOWER | ALL_FROZEN:
                continue
            large = name == "timm-efficientnet" and depth < highest
            marks = [pytest.mark.slow] if large or depth not in (2, highest) else []
            found.append(pytest.param(name, depth, id=f"{name}-{depth}", marks=marks))
    return found


def cut_of(model: Any, batch: Any) -> Cut:
    with kept_in_eval(model):
        return find_cut(model, batch)


@pytest.mark.parametrize(("family", "depth"), boundaries())
def test_replay_equals_the_whole_model_at_every_boundary(family: str, depth: int) -> None:
    model = frozen(family, depth)
    cut = cut_of(model, batch_of(family))
    assert_replays(model, cut, batch_of(family, (9, 3, 7), seed=1))  # other sizes, other padding
    assert_replays(model, cut, batch_of(family, (5, 5, 5, 5, 5), seed=2))


@pytest.mark.parametrize("family", TEXTS)
def test_left_padding_is_replayed_rightly_or_refused(family: str) -> None:
    refused = set()
    for depth in range(1, max(FAMILIES[family].depth.values()) + 1):
        if (family, depth) in CUT_LOWER | ALL_FROZEN:
            continue
        model = frozen(family, depth)
        try:
            cut = cut_of(model, batch_of(family, side="left"))
        except NoCutError:
            refused.add(depth)
            continue
        assert_replays(model, cut, batch_of(family, (9, 3, 7), "left", seed=1))
    if family.startswith(("llama", "clip")):  # relative positions; the first padding is no token
        assert not refused


@pytest.mark.parametrize(("family", "depth"), sorted(CUT_LOWER))
def test_what_cannot_be_cut_here_is_cut_lower(family: str, depth: int) -> None:
    model = frozen(family, depth)
    groups = find_layer_groups(model)
    below = [groups.frozen(n) for n in range(depth, 0, -1)]
    with kept_in_eval(model):
        cut, names, why = highest_cut(model, batch_of(family), below)
    assert (names < below[0]) == bool(why)
    assert_replays(model, cut, batch_of(family, (9, 3, 7), seed=1))


# Learning parameters below or beside the cut

PATTERNS: dict[str, tuple[str, Any]] = {
    "class token": ("vit", lambda name: "cls_token" in name),
    "positions": ("vit", lambda name: "position" in name),
    "biases of a ViT": ("vit", lambda name: name.endswith("bias")),
    "biases of a BERT": ("bert", lambda name: name.endswith("bias")),
    "norms of a BERT": ("bert", lambda name: "LayerNorm" in name),
    "norms of a ResNet": ("timm-resnet", lambda name: "bn" in name),
    "positions of a GPT-2": ("gpt2-classes", lambda name: "wpe" in name),
    "relative positions": ("deberta", lambda name: "rel_embeddings" in name),
    "a block amid frozen ones": ("bert", lambda name: "layer.1." in name),
    "temperature alone": ("clip", lambda name: "logit_scale" in name),
    "one tower": ("clip", lambda name: name.startswith("vision_model.encoder.layers.1")),
    "other tower": ("clip", lambda name: name.startswith("text_model")),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_stored_depends_on_what_learns(pattern: str) -> None:
    family, learns = PATTERNS[pattern]
    model = make(family)
    head = set(find_layer_groups(model).head.parameters)
    names = [name for name, _ in model.named_parameters()]
    freeze(model, [n for n in names if not learns(n) and (family == "clip" or n not in head)])
    try:
        cut = cut_of(model, batch_of(family))
    except NoCutError:
        # every block reads the ones, and the others lie at the input
        assert pattern in ("relative positions", "biases of a ViT")
        return
    assert_replays(model, cut, batch_of(family, (9, 3, 7), seed=1))


def test_adapters_enter_above_the_cut() -> None:
    model = bert()
    layers = [f"bert.encoder.layer.{n}.attention.self.query" for n in (1, 2)]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=layers, lora_dropout=0.2), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("classifier"))
    cut = cut_of(model, batch_of("bert"))
    assert all(".layer.2." not in slot.call.module for slot in cut.slots)
    assert {"bert.embeddings", "bert.encoder.layer.0"} <= {call.module for call in cut.skipped}
    assert_replays(model, cut, batch_of("bert", (9, 3, 7), seed=1))


def test_dropout_between_body_and_head_goes_on() -> None:
    model = frozen("bert", 4)
    model.dropout.p = 0.5
    cut = cut_of(model, batch_of("bert"))
    assert [(slot.call.module, slot.argument, slot.leaf) for slot in cut.slots] == [
        ("bert", None, 1)  # the pooled output, before dropout and not the classifier's input
    ]
    batch = batch_of("bert", (5,) * 4)
    stored = with_features(model, cut, batch)
    with cut_model(model, cut):
        losses = [trained(model, stored, seed)[0] for seed in (1, 2, 1)]
    assert losses[0] == losses[2] != losses[1]
    assert_replays(model, cut, batch)


# Around the model


class Seen(nn.Module):
    """A hook's own record."""

    def __init__(self) -> None:
        super().__init__()
        self.finite: list[bool] = []

    def forward(self, _module: nn.Module, args: Any) -> None:
        self.finite.append(bool(torch.isfinite(args[0]).all()))


def test_forward_and_hooks_are_left_as_they_were() -> None:
    model = frozen("bert", 2)
    cut = cut_of(model, batch_of("bert"))
    seen = Seen()
    learning = model.bert.encoder.layer[1]
    handle = learning.register_forward_pre_hook(seen.forward)
    own = model.bert.encoder.forward
    model.bert.encoder.layer[0].forward = kept = model.bert.encoder.layer[0].forward
    before = {path: dict(m.__dict__) for path, m in model.named_modules()}
    hooks = {path: list(m._forward_pre_hooks.values()) for path, m in model.named_modules()}
    batch = batch_of("bert")
    stored = with_features(model, cut, batch)
    whole = answers(model.eval(), batch)[0]
    with replayed(model, cut):
        assert answers(model.eval(), stored)[0] == whole
    assert seen.finite == [True] * 3  # other hooks see the stored tensors
    with pytest.raises(RuntimeError, match="stop"), replayed(model, cut):
        raise RuntimeError("stop")
    assert model.bert.encoder.forward == own
    assert model.bert.encoder.layer[0].forward is kept
    assert before.keys() == dict(model.named_modules()).keys()
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
        assert list(module._forward_pre_hooks.values()) == hooks[path]
    handle.remove()
    assert answers(model.eval(), batch)[0] == whole


def test_capture_leaves_the_model_alone_also_where_it_fails() -> None:
    model = frozen("bert", 2).eval()
    cut = cut_of(model, batch_of("bert"))
    before = {path: set(m.__dict__) for path, m in model.named_modules()}
    model.eval()
    capture(model, [cut], batch_of("bert"))
    with pytest.raises(IndexError):
        capture(model, [cut], batch_of("bert") | {"input_ids": torch.full((2, 6), 99)})
    assert {path: set(m.__dict__) for path, m in model.named_modules()} == before


def test_several_cuts_are_captured_in_one_pass() -> None:
    model = make("bert")
    groups, batch = find_layer_groups(model), batch_of("bert")
    cuts = [cut_of(freeze(model, groups.frozen(depth)), batch) for depth in (4, 1, 2)]
    model.eval()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.bert.encoder.layer[0].register_forward_hook(count)
    together = capture(model, cuts, batch)
    assert runs == 1
    for cut, features in zip(cuts, together, strict=True):
        [[alone]] = capture(model, [cut], batch)
        assert torch.equal(alone, features[0])


def test_a_pass_ends_where_all_is_taken() -> None:
    model = frozen("bert", 2).eval()
    cut = cut_of(model, batch_of("bert"))
    ran = []
    for n, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
    capture(model.eval(), [cut], batch_of("bert"))
    assert ran == [0]


@pytest.mark.parametrize("family", ["bert", "vit", "llama-words"])
def test_gradient_checkpointing_above_the_cut_gives_the_same_gradients(family: str) -> None:
    model = frozen(family, 2)
    cut = cut_of(model, batch_of(family))
    batch = batch_of(family, (9, 3, 7), seed=1)
    stored = with_features(model, cut, batch)
    with kept_in_eval(model):
        loss, whole = trained(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with cut_model(model, cut):
        assert trained(model, stored)[0] == loss
        assert same(trained(model, stored)[1], whole)
        assert same(trained(model, batch)[1], whole)


def test_only_what_lies_above_the_cut_runs() -> None:
    model = frozen("vit", 2)
    cut = cut_of(model, batch_of("vit"))
    stored = with_features(model, cut, batch_of("vit"))
    ran = []
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    with cut_model(model, cut):
        trained(model, stored)
    assert not [path for path in ran if ".layers.0." in path or "patch" in path]
    assert [path for path in ran if ".layers.1." in path]


def test_bfloat16_features_of_autocast_are_replayed_bit_for_bit() -> None:
    model = vit()
    freeze(model, find_layer_groups(model).frozen(2))
    batch = batch_of("vit", (1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        cut = cut_of(model, batch)
        assert_replays(model, cut, batch)


def test_either_tower_may_be_frozen_further() -> None:
    for text, vision in ((4, 1), (1, 3), (4, 0)):
        model = clip()
        towers = find_layer_groups(model).towers
        below = [*towers["text"][:text], *towers["vision"][:vision]]
        freeze(model, [name for group in below for name in group.parameters])
        cut = cut_of(model, batch_of("clip"))
        assert cut.inputs.keys() == ({"pixel_values"} if vision else set())
        words = {"input_ids"} | ({"attention_mask"} if text == 4 else set())
        assert cut.below == words | cut.inputs.keys()
        assert_replays(model, cut, batch_of("clip", (9, 3, 7), seed=1))
