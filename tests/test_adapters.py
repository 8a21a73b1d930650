"""Adapters go in, learn, come out as plain weights, and can be listed on the way."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hfft.adapters import Injected, adapted_weights, inject, merge, save_adapter, unmoved
from hfft.errors import InputError, RunFailedError
from hfft.hooks.freeze import kept_in_eval
from hfft.layers import find_layer_groups
from hfft.optim import learning_rates

from .families import FAMILIES, batchnorm_resnet, bert, vit

RANDOM = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}  # B is not zero


def head(model: Any) -> tuple[str, ...]:
    return find_layer_groups(model).head.parameters


def adapt(model: Any, **options: Any) -> Injected:
    return inject(model, {**RANDOM, **options}, head(model), seed=0)


def output(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        out = model(**FAMILIES[family].example())
    logits = getattr(out, "logits", None)
    found: torch.Tensor = out[0] if logits is None else logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_keeps_the_order_of_groups_and_merges_into_the_same_function(family: str) -> None:
    model = FAMILIES[family].make().eval()
    before = find_layer_groups(model)
    plain = output(model, family)
    planned = adapt(copy.deepcopy(model).to("meta"))  # as `hfft plan` does
    made = adapt(model)
    assert planned == made
    groups = find_layer_groups(model)
    assert [group.name for group in groups] == [group.name for group in before]
    assert groups.head == before.head
    names = {name for group in groups for name in group.parameters}
    assert names == {name for name, _ in model.named_parameters()}
    assert all(name.rpartition(".")[0].endswith(".default") for name in made.learning)
    adapted = output(model, family)
    assert not torch.equal(adapted, plain)
    listed = adapted_weights(model)
    assert tuple(one.path for one in listed) == made.layers
    sums = {one.path: one.weight + one.product() for one in listed}
    merge(model)
    for path, weight in sums.items():
        assert torch.allclose(model.get_submodule(path).weight, weight, atol=1e-6)
    assert find_layer_groups(model) == before
    assert output(model, family) == pytest.approx(adapted, abs=2e-5)
    assert adapted_weights(model) == []


@pytest.mark.parametrize("family", ["bert", "timm-resnet", "gpt2-words"])
def test_what_an_adapter_learns_gets_a_gradient(family: str) -> None:
    model = FAMILIES[family].make()
    made = adapt(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in made.learning)
    model(**FAMILIES[family].example())[0].sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learnt == made.learning


def test_layers_are_listed_with_their_matrices_whatever_their_kind() -> None:
    model = bert()
    adapt(model, target_modules=["word_embeddings", "query"], use_rslora=True)
    embedding, *queries = adapted_weights(model)
    assert embedding.transposed
    assert (embedding.a.shape, embedding.b.shape) == ((2, 30), (16, 2))
    assert not any(one.transposed for one in queries)
    assert {one.scale for one in queries} == {4 / 2**0.5}
    conv1d = FAMILIES["gpt2-words"].make()
    adapt(conv1d)
    assert all(one.transposed and one.weight.shape == (16, 48) for one in adapted_weights(conv1d))
    resnet = batchnorm_resnet()
    adapt(resnet, target_modules=["layer1.0.conv1"])
    [one] = adapted_weights(resnet)
    assert one.a.flatten(1).shape == (2, one.weight[0].numel())
    assert one.a is resnet.get_submodule(one.path).lora_A.default.weight
    assert not one.weight.requires_grad


def test_adapters_that_peft_put_in_itself_are_listed_too() -> None:
    model: Any = get_peft_model(bert(), LoraConfig(r=4, lora_alpha=8))
    listed = adapted_weights(model)
    assert [one.scale for one in listed] == [2.0] * 6
    assert listed[0].path == "base_model.model.bert.encoder.layer.0.attention.self.query"
    with model.disable_adapter():
        assert adapted_weights(model) == []
    model.add_adapter("other", LoraConfig(r=2))
    assert len(adapted_weights(model)) == 6
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="2 adapters are active"):
        adapted_weights(model)


def test_what_is_not_a_plain_product_is_refused_in_the_list() -> None:
    dora = bert()
    adapt(dora, use_dora=True)
    with pytest.raises(InputError, match=r"query: holds DoRA.*W0 \+ s B A"):
        adapted_weights(dora)
    merged: Any = get_peft_model(bert(), LoraConfig(r=4))
    merged.merge_adapter()
    with pytest.raises(InputError, match="holds a merged adapter"):
        adapted_weights(merged)


def test_listing_does_not_import_peft() -> None:
    code = (
        "import sys, torch, hfft.adapters as a\n"
        "assert a.adapted_weights(torch.nn.Linear(1, 1)) == []\n"
        "assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {"use_dora": True}),
        ("timm-resnet", {"use_dora": True}),
        ("vit", {"lora_bias": True}),
        ("bert", {"bias": "all"}),
        ("timm-resnet", {"bias": "lora_only"}),
        ("bert", {"init_lora_weights": "orthogonal", "rank_pattern": {"query": 4}}),
        ("vit", {"init_lora_weights": "gaussian", "use_rslora": True}),
        ("vit", {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1]}),
        ("vit", {"target_modules": ".*attention.*", "exclude_modules": ["q_proj"]}),
    ],
)
def test_every_option_merges_right(family: str, options: dict[str, Any]) -> None:
    model = FAMILIES[family].make().eval()
    made = adapt(model, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in made.learning:
                parameter += 0.05 * torch.randn(parameter.shape)
    adapted = output(model, family)
    merge(model)
    assert output(model, family) == pytest.approx(adapted, abs=1e-5)


def test_targets_are_what_the_options_say_and_never_the_head() -> None:
    made = adapt(vit(), target_modules=["q_proj", "fc1"], layers_to_transform=[1])
    assert len(made.layers) == 2
    assert all(path.startswith("vit.layers.1.") for path in made.layers)
    made = adapt(bert(), target_modules=".*(query|classifier)")
    assert len(made.layers) == 3
    made = adapt(FAMILIES["deberta"].make(), target_modules=["dense"])
    assert "pooler.dense" not in made.layers


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("bert", {"target_modules": ["qeury"]}, "'qeury' matches no layer .*mean 'query'"),
        ("bert", {"target_modules": ["classifier"]}, "'classifier' matches no layer"),
        ("bert", {"target_modules": "nothing.*"}, "'nothing.*' matches no layer"),
        ("bert", {"target_modules": "(query"}, "no regular expression"),
        ("bert", {"target_modules": ["query"], "exclude_modules": ["query"]}, "leave none"),
        ("bert", {"target_modules": ["LayerNorm"]}, "'LayerNorm' matches no layer"),
        ("timm-resnet", {"target_modules": "all-linear"}, "no linear layer below the head"),
        ("timm-resnet", {"bias": "all"}, "BatchNorm moving"),
        ("timm-resnet", {"lora_bias": True}, "lora_bias: .* has no bias"),
        ("bert", {"init_lora_weights": "orthogonal", "r": 3}, "^init_lora_weights: .*even"),
        ("timm-efficientnet", {"target_modules": ["conv_dw"]}, "'conv_dw' matches no layer"),
    ],
)
def test_bad_targets_are_named(family: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        adapt(FAMILIES[family].make(), **options)


def test_layers_that_peft_would_adapt_wrongly_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.first = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.first.weight
            self.plain = nn.Linear(4, 4)

    made = inject(Odd(), RANDOM, (), seed=0)
    assert made.layers == ("plain",)


def test_where_peft_has_no_default_the_linear_layers_are_adapted_and_it_is_said() -> None:
    assert adapt(bert()).notes == []
    [note] = adapt(vit()).notes
    assert "peft has no default" in note
    assert "linear layers below the head are adapted (18)" in note
    [note] = adapt(batchnorm_resnet()).notes
    assert "all its convolutions below the head are adapted (15)" in note


def test_random_matrices_are_those_of_the_seed_and_leave_the_generator_alone() -> None:
    first, again, other = vit(), vit(), vit()
    state = torch.get_rng_state()
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        inject(model, {"r": 2}, head(model), seed=seed)
    assert torch.equal(torch.get_rng_state(), state)

    def a(model: Any) -> torch.Tensor:
        return adapted_weights(model)[0].a

    assert torch.equal(a(first), a(again))
    assert not torch.equal(a(first), a(other))


def test_rates_of_an_adapter_are_those_of_its_block() -> None:
    model = bert()
    made = adapt(model)
    rates = learning_rates(find_layer_groups(model), 1.0, layer_decay=0.5, head_multiplier=3)
    assert rates["classifier.weight"] == 3
    for name in made.learning:
        block = int(name.split("layer.")[1].partition(".")[0])
        assert rates[name] == 0.5 ** (3 - block)


def test_dropout_is_on_among_adapters_and_off_where_there_are_none() -> None:
    model = bert(hidden_dropout_prob=0.1)
    made = adapt(model, lora_dropout=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in made.learning or name in head(model))
    with kept_in_eval(model, adapted=True):
        model.train()
        on = {path for path, module in model.named_modules() if module.training}
        assert not {path for path in on if path.startswith("bert.embeddings")}
        assert not {path for path in on if path.endswith(("LayerNorm", "base_layer", "pooler"))}
        block = "bert.encoder.layer.0.attention"
        assert {block, f"{block}.self.query.lora_dropout.default", "dropout"} <= on
        model.eval()
        assert not any(module.training for module in model.modules())


def test_frozen_batchnorm_stays_in_eval_mode() -> None:
    model = batchnorm_resnet()
    made = adapt(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in made.learning or name in head(model))
    with kept_in_eval(model, adapted=True):
        model.train()
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        assert norms
        assert not any(norm.training for norm in norms)


@pytest.mark.parametrize("family", ["bert", "vit", "timm-resnet", "timm-vit", "deberta"])
def test_saved_adapter_on_its_source_is_the_model(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].make().eval()
    source = copy.deepcopy(model)
    adapt(model, bias="lora_only")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in head(model):
                parameter += 0.1
    expected = output(model, family)
    save_adapter(model, tmp_path / "a", base="me/base", revision="v1", head=head(model))
    loaded: Any = PeftModel.from_pretrained(source, tmp_path / "a").eval()
    assert output(loaded, family) == pytest.approx(expected, abs=1e-6)
    config = loaded.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("me/base", "v1")
    assert config.inference_mode


def test_layers_that_never_learn_are_found() -> None:
    model = bert()
    inject(model, {"r": 2}, head(model), seed=0)
    first, *others = adapted_weights(model)
    with torch.no_grad():
        first.b.fill_(1.0)
    assert unmoved(model) == [one.path for one in others]


def test_weights_that_are_no_numbers_are_not_merged() -> None:
    model = bert()
    adapt(model)
    with torch.no_grad():
        adapted_weights(model)[0].b.fill_(float("nan"))
    with pytest.raises(RunFailedError, match="can't be merged"):
        merge(model)
