"""Rows are found again by all that they depend on, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from hfft.examples import ExampleDataset
from hfft.features.keys import digest, inputs_digest, model_config, weights_digest
from hfft.features.prepare import Setting, StageFeatures, prepare
from hfft.hooks.freeze import kept_in_eval
from tests.families import batchnorm_resnet

from .cases import freeze
from .training import collate, examples_of, new_model, setting, wanted


class Prepared:
    """What a stage is made of; a test changes one thing."""

    def __init__(self) -> None:
        self.model: Any = new_model("timm-resnet", 3)
        self.examples = examples_of("timm-resnet", 5)
        self.setting: Setting = setting()

    def key(self) -> str:
        with kept_in_eval(self.model):
            made: StageFeatures = prepare(
                self.model, wanted(self.model), [], {"train": self.examples}, self.setting
            )
        [entry] = made.entries
        made.close()
        return entry.folder.name


def set_(**changes: Any) -> Callable[[Prepared], None]:
    def made(one: Prepared) -> None:
        one.setting = setting(**changes)

    return made


def nudge(name: str) -> Callable[[Prepared], None]:
    def made(one: Prepared) -> None:
        one.model.state_dict()[name].view(-1)[0] += 1

    return made


def views(count: int, seed: int) -> Callable[[Prepared], None]:
    def made(one: Prepared) -> None:
        one.examples = ExampleDataset(one.examples.rows, one.examples.transform, seed, count)

    return made


def lower(one: Prepared) -> None:
    one.model = new_model("timm-resnet", 2)


def other_inputs(one: Prepared) -> None:
    transform = one.examples.transform
    one.examples = ExampleDataset(
        one.examples.rows,
        lambda row: transform(row) | {"pixel_values": transform(row)["pixel_values"] * 1.01},
    )


def other_code(one: Prepared) -> None:
    one.model.config.hidden_act = "gelu"


BELOW = "timm_model.layer1.0."
CHANGES: dict[str, Callable[[Prepared], None]] = {
    "a weight below": nudge(f"{BELOW}conv1.weight"),
    "a bias below": nudge(f"{BELOW}bn1.bias"),
    "a mean of BatchNorm below": nudge(f"{BELOW}bn1.running_mean"),
    "a variance of BatchNorm below": nudge(f"{BELOW}bn1.running_var"),
    "the first weight": nudge("timm_model.conv1.0.weight"),
    "the boundary": lower,
    "the preprocessing": set_(identity={"task": "made up", "size": 7}),
    "the preprocessing, by what it makes": other_inputs,
    "the data": set_(fingerprints={"train": "another"}),
    "the dtype": set_(dtype=torch.float16),
    "the precision": set_(
        autocast=("bfloat16", partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    ),
    "the views": views(3, 0),
    "the model's config": other_code,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_key_changes_with(change: str) -> None:
    one, other = Prepared(), Prepared()
    CHANGES[change](other)
    assert one.key() != other.key()


def test_a_key_changes_with_the_views_and_their_seed() -> None:
    keys = set()
    for count, seed in ((2, 0), (3, 0), (3, 1)):
        one = Prepared()
        views(count, seed)(one)
        keys.add(one.key())
    assert len(keys) == 3


def class_names(one: Prepared) -> None:
    one.model.config.id2label = {0: "a", 1: "b", 2: "c"}
    one.model.config.label2id = {"a": 0, "b": 1, "c": 2}


def head_of_another_shape(one: Prepared) -> None:
    one.model.timm_model.fc = nn.Linear(16, 7)
    one.model.num_labels = one.model.config.num_classes = one.model.config.num_labels = 7


STAYS: dict[str, Callable[[Prepared], None]] = {
    "nothing": lambda _: None,
    "the head's weights": nudge("timm_model.fc.weight"),
    "a layer above": nudge("timm_model.layer4.0.conv1.weight"),
    "statistics above": nudge("timm_model.layer4.0.bn1.running_mean"),
    "the class names": class_names,
    "the head's classes": head_of_another_shape,
    "the batch size": set_(batch_size=2),
    "where the model came from": lambda one: setattr(one.model.config, "_name_or_path", "/x"),
    "the description": set_(description={"model": "another name"}),
    "the limit": set_(limit=10**9),
    "the mode": lambda one: one.model.eval() and None,
    "the seed of no view": lambda one: setattr(one.examples, "seed", 5),
}


@pytest.mark.parametrize("change", STAYS)
def test_a_key_stays_with(change: str) -> None:
    one, other = Prepared(), Prepared()
    STAYS[change](other)
    assert one.key() == other.key()


def test_each_weight_below_counts() -> None:
    model = batchnorm_resnet()
    names = [n for n, _ in model.named_parameters() if ".layer1." in n]
    first = weights_digest(model, names, {})
    found = {first}
    for name in names:
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] += 1
        found.add(weights_digest(model, names, {}))
    assert len(found) == len(names) + 1


def test_weights_of_another_shape_dtype_or_name_are_others() -> None:
    def made(layer: nn.Module, **names: nn.Module) -> str:
        model = nn.ModuleDict({"a": layer, **names})
        return weights_digest(model, [n for n, _ in model.named_parameters() if n[0] == "a"], {})

    def zeros(a: int, b: int) -> nn.Module:
        layer = nn.Linear(a, b, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    keys = {made(zeros(2, 4)), made(zeros(4, 2)), made(zeros(2, 4).double())}
    assert len(keys) == 3
    assert made(zeros(2, 4)) == made(zeros(2, 4), b=nn.Linear(1, 1))


class Scaled(nn.Module):
    """A frozen layer behind statistics of the data that stand in a module of their own."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.norm.running_mean.fill_(mean)
        self.body = nn.Linear(4, 4)
        nn.init.eye_(self.body.weight)


def test_statistics_without_a_parameter_beside_count_too() -> None:
    one, other = (freeze(Scaled(mean), ["body.weight", "body.bias"]) for mean in (0.0, 5.0))
    nn.init.zeros_(one.body.bias)
    nn.init.zeros_(other.body.bias)
    names = ["body.weight", "body.bias"]
    assert weights_digest(one, names, {}) != weights_digest(other, names, {})


def test_inputs_are_told_apart_bit_by_bit() -> None:
    base = {"pixel_values": torch.zeros(3), "labels": 1}
    others: list[dict[str, Any]] = [
        base | {"pixel_values": torch.tensor([0.0, 0.0, 1e-38])},
        base | {"labels": 0},
        {"pixel_values": torch.zeros(3)},
    ]
    keys = {inputs_digest([one]) for one in (base, *others)}
    assert len(keys) == 4
    assert inputs_digest([base]) == inputs_digest([dict(reversed(base.items()))])


def test_a_digest_does_not_depend_on_the_order_of_names() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_config_says_how_attention_is_computed() -> None:
    config = new_model("vit", 1).config
    config._attn_implementation = "eager"
    eager = model_config(config)
    config._attn_implementation = "sdpa"
    assert model_config(config) != eager


def test_the_key_does_not_hinge_on_collate_or_context() -> None:
    one = Prepared()
    other = Prepared()
    other.setting = setting(collate=lambda rows: collate(rows), autocast=("float32", nullcontext))
    assert one.key() == other.key()
