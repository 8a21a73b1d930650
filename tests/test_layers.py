"""Layer groups follow the order in which a model computes; frozen means that nothing moves."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from hfft.errors import InputError
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import LayerGroup, LayerGroups, find_layer_groups, frozen_modules

from .families import (
    FAMILIES,
    TOWERS,
    Family,
    batchnorm_resnet,
    bert,
    clap,
    clip,
    dual_encoder,
    dual_encoder_with_batchnorm,
    siglip,
    timm_model,
    vit,
)
from .text_models import sentence_encoder

_EVERY = {**FAMILIES, **TOWERS}
every_family = pytest.mark.parametrize("family", _EVERY.values(), ids=_EVERY)


class _Uses(TorchDispatchMode):
    """Notes in which order a model's parameters enter the computation, whoever calls for them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.order: dict[str, None] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self._names:
                self.order.setdefault(self._names[id(value)])
        return function(*args, **(kwargs or {}))


def order_of_use(family: Family, model: Any) -> list[str]:
    uses = _Uses(model)
    with torch.no_grad(), uses:
        model.eval()(**family.example())
    return list(uses.order)


class Plain(PreTrainedModel):
    """Without a list of blocks."""

    config_class = PreTrainedConfig
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.classifier = nn.Linear(4, 2)


def message(groups: LayerGroups, freeze: Any) -> str:
    with pytest.raises(InputError) as caught:
        groups.frozen(freeze)
    return str(caught.value)


# The groups


@every_family
def test_groups_cover_every_parameter_once(family: Family) -> None:
    model = family.make()
    covered = [name for group in find_layer_groups(model) for name in group.parameters]
    assert sorted(covered) == sorted(name for name, _ in model.named_parameters())


@every_family
def test_groups_are_as_many_as_the_architecture_has(family: Family) -> None:
    groups = find_layer_groups(family.make())
    assert {name: len(body) for name, body in groups.towers.items()} == family.depth
    assert len(groups.head.parameters) == family.head
    assert groups.ordered


@every_family
def test_groups_stand_in_the_order_of_execution(family: Family) -> None:
    model = family.make()
    groups = find_layer_groups(model)
    used = order_of_use(family, model)
    assert len(used) > 0.9 * len(list(model.parameters()))
    for body in groups.towers.values():
        place = {name: i for i, group in enumerate(body) for name in group.parameters}
        steps = [(name, place[name]) for name in used if name in place]
        backwards = [(a, b) for (a, i), (b, j) in pairwise(steps) if j < i]
        assert backwards == []


@every_family
def test_head_is_computed_last(family: Family) -> None:
    model = family.make()
    groups = find_layer_groups(model)
    used = order_of_use(family, model)
    head = [place for place, name in enumerate(used) if name in groups.head.parameters]
    if len(groups.towers) == 1:
        assert head == list(range(len(used) - len(head), len(used)))
    else:  # each tower's projection comes after that tower
        assert head
        for place in head:
            tower = used[place].partition("_projection")[0].replace("visual", "vision")
            own = [n for group in groups.towers.get(tower, groups) for n in group.parameters]
            below = [used.index(n) for n in own if n in used and used.index(n) not in head]
            assert place > max(below)


def test_pooling_heads_inside_a_tower_belong_to_its_last_block() -> None:
    towers = find_layer_groups(siglip()).towers
    assert {"text_model.head.weight", "text_model.final_layer_norm.weight"} < set(
        towers["text"][-1].parameters
    )
    assert {"vision_model.head.probe", "vision_model.head.mlp.fc2.bias"} < set(
        towers["vision"][-1].parameters
    )
    pooler = find_layer_groups(dual_encoder()).towers["text"][-1].parameters
    assert "text_model.pooler.dense.weight" in pooler


def test_norm_of_the_input_belongs_to_the_embeddings_though_it_stands_last() -> None:
    first, *_ = find_layer_groups(clap()).towers["audio"]
    assert "audio_model.audio_encoder.batch_norm.weight" in first.parameters


def test_groups_are_named_by_their_modules() -> None:
    assert [group.name for group in find_layer_groups(bert())] == [
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "bert.encoder.layer.2",
        "head",
    ]
    names = [group.name for group in find_layer_groups(batchnorm_resnet())]
    assert names == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def test_final_norm_and_pooler_belong_to_the_last_block() -> None:
    (*_, last) = find_layer_groups(bert()).towers["backbone"]
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} < set(last.parameters)
    (*_, last) = find_layer_groups(vit()).towers["backbone"]
    assert {"vit.layernorm.weight", "vit.layernorm.bias"} < set(last.parameters)


def test_relative_positions_that_every_block_uses_belong_to_the_embeddings() -> None:
    first, *_ = find_layer_groups(FAMILIES["deberta"].make())
    assert {"deberta.encoder.rel_embeddings.weight", "deberta.encoder.LayerNorm.weight"} < set(
        first.parameters
    )


def test_timm_models_without_a_matcher_of_stages_have_their_lists_of_blocks() -> None:
    with torch.device("meta"):
        models = [timm_model("pit_ti_224"), timm_model("rdnet_tiny"), timm_model("poolformer_s12")]
    depths = []
    for model in models:
        groups = find_layer_groups(model)
        covered = [name for group in groups for name in group.parameters]
        assert sorted(covered) == sorted(name for name, _ in model.named_parameters())
        assert {n.split(".")[1] for n in groups.head.parameters} == {"head"}
        depths.append(groups.depth)
    assert depths == [4, 8, 5]


def test_timm_model_without_blocks_has_no_order_and_a_head() -> None:
    model = batchnorm_resnet()
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)]
    model.timm_model = nn.Sequential(*layers)
    model.timm_model.pretrained_cfg = {"classifier": "3"}
    groups = find_layer_groups(model)
    assert groups.head.parameters == ("timm_model.3.bias", "timm_model.3.weight")
    assert groups.frozen("backbone") == {"timm_model.0.weight", "timm_model.0.bias"}
    assert "needs an order of layers, and none can be found in resnet10t" in message(groups, 1)


def test_blocks_that_run_after_all_others_are_in_the_last_group() -> None:
    sizes = {"depth": 3, "embed_dim": 16, "num_heads": 2}
    model = timm_model("cait_xxs24_224", **sizes)
    (*_, last) = find_layer_groups(model).towers["backbone"]
    late = {n for n, _ in model.named_parameters() if ".blocks_token_only." in n}
    assert late < set(last.parameters)


def test_head_beside_the_head_is_head_too() -> None:
    with torch.device("meta"):
        groups = find_layer_groups(timm_model("volo_d1_224"))
    assert {name.split(".")[1] for name in groups.head.parameters} == {"head", "aux_head"}


def test_groups_are_found_without_memory_for_weights() -> None:
    with torch.device("meta"):
        assert find_layer_groups(bert()).depth == 4


def test_distance_counts_down_to_the_head_in_each_tower() -> None:
    distance = find_layer_groups(clip(3, 2)).distance_to_head()
    assert distance["logit_scale"] == 0
    assert distance["text_model.final_layer_norm.weight"] == 1
    assert distance["vision_model.post_layernorm.weight"] == 1
    assert distance["text_model.embeddings.token_embedding.weight"] == 4
    assert distance["vision_model.embeddings.patch_embedding.weight"] == 3


# Models within models


class Wrapper(nn.Module):
    """Holds transformers models, as scripts do, with a head of its own."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleDict(models)
        self.dense = nn.Linear(16, 4)


def covered(groups: LayerGroups) -> list[str]:
    return sorted(name for group in groups for name in group.parameters)


@every_family
def test_groups_inside_a_wrapper_are_those_of_the_model_under_longer_names(family: Family) -> None:
    model = family.make()
    alone, wrapped = find_layer_groups(model), find_layer_groups(Wrapper(one=model))
    prefix = "inside.one."
    assert [
        [prefix + name for name in group.parameters]
        for groups in alone.towers.values()
        for group in groups
    ] == [list(group.parameters) for groups in wrapped.towers.values() for group in groups]
    assert set(wrapped.head.parameters) == {
        *(prefix + name for name in alone.head.parameters),
        "dense.weight",
        "dense.bias",
    }
    assert wrapped.ordered


def test_sentence_transformer_has_its_encoders_groups_and_a_dense_head(tmp_path: Path) -> None:
    model = sentence_encoder(tmp_path)
    groups = find_layer_groups(model)
    assert [group.name for group in groups] == [
        "0.model.embeddings",
        *(f"0.model.encoder.layer.{number}" for number in range(3)),
        "head",
    ]
    assert "0.model.pooler.dense.weight" in groups.towers["backbone"][-1].parameters
    assert groups.head.parameters == ("2.linear.weight", "2.linear.bias")
    assert covered(groups) == sorted(name for name, _ in model.named_parameters())


def test_adapters_belong_to_the_blocks_they_adapt() -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    model = get_peft_model(bert(), config)
    groups = find_layer_groups(model)
    *_, last, head = groups
    layer = "base_model.model.bert.encoder.layer.2"
    assert last.name == layer
    assert {
        f"{layer}.attention.self.{part}.{name}.weight"
        for part in ("query", "value")
        for name in ("lora_A.default", "lora_B.default", "base_layer")
    } < set(last.parameters)
    assert {name.split(".")[2] for name in head.parameters} == {"classifier"}
    assert groups.depth == 4
    assert covered(groups) == sorted(name for name, _ in model.named_parameters())


def test_each_of_several_models_inside_is_a_tower() -> None:
    model = Wrapper(words=bert(), images=vit())
    groups = find_layer_groups(model)
    assert list(groups.towers) == ["inside.words", "inside.images"]
    assert covered(groups) == sorted(name for name, _ in model.named_parameters())
    assert {n for n in groups.frozen(1) if ".images." in n} == {
        f"inside.images.{name}" for name in find_layer_groups(model.inside["images"]).frozen(1)
    }


def test_model_that_stands_in_two_places_is_grouped_once() -> None:
    shared = bert()
    model = Wrapper(query=shared, document=shared)
    groups = find_layer_groups(model)
    assert list(groups.towers) == ["backbone"]
    assert covered(groups) == sorted(name for name, _ in model.named_parameters())


def test_bare_timm_model_has_the_groups_it_has_in_transformers() -> None:
    wrapped = batchnorm_resnet()
    groups, bare = find_layer_groups(wrapped), find_layer_groups(wrapped.timm_model)
    assert [list(group.parameters) for group in groups] == [
        [f"timm_model.{name}" for name in group.parameters] for group in bare
    ]


def test_module_without_a_pretrained_model_is_ordered_by_its_lists_or_not_at_all() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = find_layer_groups(plain)
    assert (groups.ordered, groups.depth, groups.head.parameters) == (False, 1, ())
    assert "needs an order of layers, and none can be found in Sequential" in message(groups, 1)
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    parts = OrderedDict(stem=nn.Linear(4, 4), blocks=blocks, head=nn.Linear(4, 2))
    assert [group.name for group in find_layer_groups(nn.Sequential(parts))] == [
        "embeddings",
        "blocks.0",
        "blocks.1",
        "head",
    ]


# What a freeze covers


GROUPS = LayerGroups(
    towers={
        "text": tuple(LayerGroup(f"text.{n}", (f"text.{n}.w", f"text.{n}.b")) for n in range(3)),
        "vision": tuple(LayerGroup(f"vision.{n}", (f"vision.{n}.w",)) for n in range(2)),
    },
    head=LayerGroup("head", ("scale",)),
    model_name="Two",
)


def test_none_covers_nothing_and_backbone_all_but_the_head() -> None:
    assert GROUPS.frozen("none") == set()
    every = {name for group in GROUPS for name in group.parameters}
    assert GROUPS.frozen("backbone") == every - {"scale"}


def test_number_covers_the_lowest_groups_of_every_tower() -> None:
    assert GROUPS.frozen(0) == set()
    assert GROUPS.frozen(1) == {"text.0.w", "text.0.b", "vision.0.w"}
    assert GROUPS.frozen(3) == GROUPS.frozen("backbone")


@pytest.mark.parametrize("number", [-1, 4])
def test_number_beyond_the_groups_says_how_many_there_are(number: int) -> None:
    assert f"freeze: {number} is not a number from 0 to 3" in message(GROUPS, number)


@pytest.mark.parametrize(
    ("freeze", "towers", "frozen"),
    [
        ("none", {"vision": "backbone"}, {"vision.0.w", "vision.1.w"}),
        ("none", {"vision": 1}, {"vision.0.w"}),
        ("backbone", {"text": "none"}, {"vision.0.w", "vision.1.w"}),
        ("backbone", {"text": 1, "vision": 0}, {"text.0.w", "text.0.b"}),
        (1, {"vision": "backbone"}, {"text.0.w", "text.0.b", "vision.0.w", "vision.1.w"}),
        (["text", "head"], {"text": 1}, {"text.0.w", "text.0.b", "scale"}),
    ],
)
def test_a_towers_own_freeze_takes_the_place_of_the_models(
    freeze: Any, towers: Any, frozen: set[str]
) -> None:
    assert GROUPS.frozen(freeze, towers) == frozen


def test_number_beyond_a_towers_groups_says_how_many_it_has() -> None:
    with pytest.raises(InputError) as caught:
        GROUPS.frozen("none", {"vision": 3})
    assert "towers.vision.freeze: 3 is not a number from 0 to 2, the groups of tower vision" in str(
        caught.value
    )


def test_unknown_tower_names_the_nearest_or_those_there_are() -> None:
    with pytest.raises(InputError, match=r"towers\.visoin: Two has no such tower; did you mean"):
        GROUPS.frozen("none", {"visoin": "backbone"})
    with pytest.raises(InputError, match=r"towers\.vision: .* has no such tower; there are: back"):
        find_layer_groups(bert()).frozen("none", {"vision": "backbone"})


def test_pattern_names_parameters_modules_and_groups() -> None:
    assert GROUPS.frozen(["text.1.w"]) == {"text.1.w"}
    assert GROUPS.frozen(["*.b"]) == {"text.0.b", "text.1.b", "text.2.b"}
    assert GROUPS.frozen(["vision"]) == {"vision.0.w", "vision.1.w"}
    assert GROUPS.frozen(["head", "text.2"]) == {"scale", "text.2.w", "text.2.b"}


def test_pattern_of_a_module_leaves_names_alone_that_only_begin_like_it() -> None:
    groups = find_layer_groups(bert(num_hidden_layers=11))
    frozen = groups.frozen(["bert.encoder.layer.1"])
    assert {name.split(".")[3] for name in frozen} == {"1"}


def test_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    said = message(GROUPS, ["text.*", "vison.1"])
    assert "'vison.1' matches no parameter of Two" in said
    assert "did you mean 'vision.1'?" in said


def test_model_without_an_order_says_what_works_instead() -> None:
    groups = find_layer_groups(Plain())
    said = message(groups, 1)
    assert said.startswith("freeze: 1 needs an order of layers")
    assert "none can be found in Plain" in said
    assert "freeze: backbone, or a list of parameter name patterns" in said


def test_model_without_an_order_can_be_frozen_by_backbone_and_patterns() -> None:
    groups = find_layer_groups(Plain())
    body = {"body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"}
    assert groups.frozen("backbone") == body
    assert groups.frozen(["body.0"]) == {"body.0.weight", "body.0.bias"}
    assert groups.frozen("none") == set()


# Frozen means frozen


def freeze(model: Any, what: Any, towers: Any = MappingProxyType({})) -> frozenset[str]:
    frozen = find_layer_groups(model).frozen(what, towers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def train(model: Any, example: dict[str, torch.Tensor], steps: int = 3) -> None:
    """As the Trainer does: `model.train()` before every step."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.1)
    with kept_in_eval(model):
        for _ in range(steps):
            model.train()
            model(**example)[0].float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    now = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


@pytest.mark.parametrize(
    ("name", "what"),
    [(name, 1) for name in _EVERY]
    + [(name, "backbone") for name, family in _EVERY.items() if family.head],
)
def test_training_moves_what_learns_and_nothing_else(name: str, what: int | str) -> None:
    torch.manual_seed(0)
    family = _EVERY[name]
    model = family.make()
    frozen = freeze(model, what)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, family.example())
    went = moved(model, before)
    assert went.isdisjoint(frozen)
    for group in find_layer_groups(model):
        learning = set(group.parameters) - frozen
        assert bool(learning & went) == bool(learning), group.name


@pytest.mark.parametrize("groups", [1, 3, "backbone"])
def test_batchnorm_statistics_stand_still_exactly_where_it_is_frozen(groups: int | str) -> None:
    torch.manual_seed(0)
    model = batchnorm_resnet()
    bodies = find_layer_groups(model).towers["backbone"]
    frozen_count = len(bodies) if groups == "backbone" else int(groups)
    freeze(model, groups)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, FAMILIES["timm-resnet"].example())
    went = {name for name in moved(model, before) if "running_" in name}
    for number, group in enumerate(bodies):
        norms = {n.rpartition(".")[0] for n in group.parameters}
        statistics = {f"{norm}.running_mean" for norm in norms} & before.keys()
        assert statistics
        assert statistics & went == (set() if number < frozen_count else statistics)


def logits(model: Any, example: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        model.train()
        return model(**example)[0]


def test_frozen_dropout_is_off_and_the_heads_stays_on() -> None:
    model = bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    example = FAMILIES["bert"].example()
    freeze(model, "backbone")
    with kept_in_eval(model):
        assert torch.equal(logits(model.bert, example), logits(model.bert, example))
        assert not torch.equal(logits(model, example), logits(model, example))


def test_dropout_of_blocks_that_learn_stays_on() -> None:
    model = bert(hidden_dropout_prob=0.5)
    example = FAMILIES["bert"].example()
    freeze(model, 2)
    with kept_in_eval(model):
        logits(model, example)
        assert not model.bert.embeddings.dropout.training
        assert not model.bert.encoder.layer[0].output.dropout.training
        assert model.bert.encoder.layer[1].output.dropout.training


def test_modules_follow_train_again_afterwards() -> None:
    model = bert()
    freeze(model, "backbone")
    with kept_in_eval(model):
        pass
    model.train()
    assert all(module.training for module in model.modules())


def test_nothing_frozen_holds_no_module_and_all_frozen_the_whole_model() -> None:
    model = bert()
    assert frozen_modules(model) == []
    model.requires_grad_(False)
    assert frozen_modules(model) == [model]


def test_only_the_outermost_frozen_modules_are_held() -> None:
    model = bert()
    freeze(model, 2)
    held = frozen_modules(model)
    assert held == [model.bert.encoder.layer[0], model.bert.embeddings]


def test_module_that_learns_in_part_is_not_held_whole() -> None:
    model = vit()
    freeze(model, ["vit.layers.0.layernorm_before"])
    assert frozen_modules(model) == [model.vit.layers[0].layernorm_before]


# A locked tower


@pytest.mark.parametrize(
    ("name", "tower"),
    [(name, tower) for name, family in TOWERS.items() for tower in family.depth],
)
def test_a_locked_tower_has_no_graph_and_no_dropout_and_nothing_in_it_moves(
    name: str, tower: str
) -> None:
    torch.manual_seed(0)
    family = TOWERS[name]
    model = with_dropout(family.make())
    frozen = freeze(model, "none", {tower: "backbone"})
    hidden: list[torch.Tensor] = []
    model.get_submodule(f"{tower}_model").register_forward_hook(
        lambda *call: hidden.append(call[2].last_hidden_state)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, family.example())
    assert len(hidden) == 3
    assert all(torch.equal(one, hidden[0]) and not one.requires_grad for one in hidden)
    went = moved(model, before)
    assert not [name for name in went if name.startswith(f"{tower}_model.")]
    for group in find_layer_groups(model):
        learning = set(group.parameters) - frozen
        assert bool(learning & went) == bool(learning), group.name


def with_dropout(model: Any) -> Any:
    """Attention's own rates stand on its module, others in a Dropout."""
    for module in model.modules():
        for rate in ("dropout", "attention_dropout", "p"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.3)
    return model


@pytest.mark.parametrize("locked", [True, False])
def test_statistics_of_a_locked_timm_tower_stand_still(locked: bool) -> None:
    torch.manual_seed(0)
    model = dual_encoder_with_batchnorm()
    freeze(model, "none", {"vision" if locked else "text": "backbone"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, TOWERS["dual-encoder-timm"].example())
    statistics = {name for name in before if "running_" in name}
    assert statistics
    assert statistics & moved(model, before) == (set() if locked else statistics)
