from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hfft.errors import InputError
from hfft.models.pooled import PooledConfig
from hfft.sections import ModelConfig
from hfft.source import (
    carry_body,
    check_shapes,
    initialise,
    load_weights,
    read_model_config,
    skeleton,
)

from . import pair_models
from .text_runs import bert_folder, gpt_folder

AUTO = AutoModelForImageClassification


def test_half_precision_sources_train_in_float32(vit_folder: Path, tmp_path: Path) -> None:
    AUTO.from_pretrained(vit_folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    source = ModelConfig(name=str(tmp_path / "half"))
    model = load_weights(AUTO, source, read_model_config(source)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


THEIRS = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TheirConfig(PretrainedConfig):
    model_type = "theirs"

class TheirModel(PreTrainedModel):
    config_class = TheirConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Linear(4, 4)
        self.classifier = torch.nn.Linear(4, config.num_labels)
        self.post_init()
"""


def test_remote_code_that_is_allowed_builds_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "theirs.py").write_text(THEIRS)
    auto_map = {"AutoConfig": "theirs.TheirConfig", AUTO.__name__: "theirs.TheirModel"}
    values = {"model_type": "theirs", "auto_map": auto_map, "architectures": ["TheirModel"]}
    (folder / "config.json").write_text(json.dumps(values))
    shapes = {"body.weight": (4, 4), "body.bias": (4,)}
    save_file(
        {name: torch.ones(shape) for name, shape in shapes.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    source = ModelConfig(name=str(folder), trust_remote_code=True)
    config = read_model_config(source)
    with pytest.raises(InputError, match="can't be built"):  # and nobody is asked on stdin
        skeleton(AUTO, config)
    assert skeleton(AUTO, config, trust_remote_code=True).device.type == "meta"
    assert initialise(AUTO, config, trust_remote_code=True).device.type == "cpu"
    loaded = load_weights(AUTO, source, config)
    assert loaded.new_head
    assert loaded.model.get_parameter("body.weight").eq(1).all()


def labelled(folder: Path, source: Path, names: tuple[str, ...]) -> tuple[ModelConfig, Any]:
    """Copy a model with names for its classes; return it as a source, and its config."""
    model = AUTO.from_pretrained(source)
    model.config.id2label = dict(enumerate(names))
    if model.config.model_type == "timm_wrapper":
        model.config.label_names = list(names)
    model.save_pretrained(folder)
    chosen = ModelConfig(name=str(folder))
    return chosen, read_model_config(chosen)


@pytest.mark.parametrize("kind", ["vit_folder", "timm_folder"])
def test_head_for_other_classes_is_drawn_anew_though_it_fits(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, config = labelled(tmp_path, request.getfixturevalue(kind), ("ant", "bee"))
    config.id2label = {0: "cat", 1: "dog"}

    def load(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        loaded = load_weights(AUTO, source, config)
        assert loaded.notes == ["the head is new: the source's classes are others"]
        assert loaded.new_head
        return loaded.model.state_dict()

    first, again, other = load(0), load(0), load(1)
    stored = AUTO.from_pretrained(tmp_path).state_dict()
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, stored[name])}
    assert {name.rpartition(".")[0] for name in changed} in ({"classifier"}, {"timm_model.fc"})
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in changed if n.endswith("weight"))


@pytest.mark.parametrize("kind", ["vit_folder", "timm_folder"])
def test_head_for_the_same_classes_is_kept(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, config = labelled(tmp_path, request.getfixturevalue(kind), ("cat", "dog"))
    loaded = load_weights(AUTO, source, config)
    assert loaded.notes == ["the head is the source's own: its classes are the same"]
    assert not loaded.new_head
    stored = AUTO.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(stored[n], tensor) for n, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("kind", ["vit_folder", "timm_folder"])
def test_shapes_are_checked_without_loading(kind: str, request: pytest.FixtureRequest) -> None:
    source = ModelConfig(name=str(request.getfixturevalue(kind)))
    config = read_model_config(source)
    config.id2label = dict(enumerate("abc"))  # a head of another size is no misfit
    check_shapes(source, skeleton(AUTO, config))
    if kind == "vit_folder":
        config.image_size = 64
    else:
        config.model_args = {"channels": (8, 8, 16, 32), "stem_width": 8}
    with pytest.raises(InputError, match=r"other sizes than .*was the image size"):
        check_shapes(source, skeleton(AUTO, config))


def test_shapes_are_checked_in_a_body_stored_alone(vit_folder: Path, tmp_path: Path) -> None:
    ViTForImageClassification.from_pretrained(vit_folder).vit.save_pretrained(tmp_path)
    source = ModelConfig(name=str(tmp_path))
    config = read_model_config(source)
    config.image_size = 64
    with pytest.raises(InputError, match=r"1 weights below the head.*position_embeddings"):
        check_shapes(source, skeleton(AUTO, config))


@pytest.mark.parametrize("make", [pair_models.clip, pair_models.dual])
def test_projections_to_different_lengths_are_refused_before_weights_are_loaded(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    source = ModelConfig(name=str(pair_models.save(make(), tmp_path)))
    model = skeleton(transformers.AutoModel, read_model_config(source))
    check_shapes(source, model)
    stored = load_file(tmp_path / "model.safetensors")
    stored["text_projection.weight"] = torch.ones(24, 16)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    lengths = r"visual_projection.weight to 16, text_projection.weight to 24"
    with pytest.raises(InputError, match=rf"{lengths}.* can't be compared; take a model whose"):
        check_shapes(source, model)


def test_projections_of_other_sizes_than_the_config_says_are_refused(tmp_path: Path) -> None:
    source = ModelConfig(name=str(pair_models.save(pair_models.clip(), tmp_path)))
    config = read_model_config(source)
    config.projection_dim = 8
    with pytest.raises(InputError, match=r"2 weights .*first visual_projection.weight"):
        check_shapes(source, skeleton(transformers.AutoModel, config))


def test_weights_of_another_model_are_no_source(
    vit_folder: Path, timm_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(vit_folder, folder)
    shutil.copy(timm_folder / "model.safetensors", folder)
    source = ModelConfig(name=str(folder))
    with pytest.raises(InputError, match="is no source for a ViTForImageClassification: it lacks"):
        load_weights(AUTO, source, read_model_config(source))


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_is_computed_as_asked_for_under_any_head(kind: str, tmp_path: Path) -> None:
    source = ModelConfig(name=str(bert_folder(tmp_path)), attn_implementation=kind)
    config = read_model_config(source)
    auto = transformers.AutoModelForSequenceClassification
    model = load_weights(auto, source, config).model
    assert model.config._attn_implementation == kind
    pooled = load_weights(auto, source, PooledConfig.around(config, "mean")).model
    assert pooled.base_model.config._attn_implementation == kind


def test_attention_that_is_not_installed_is_an_error(tmp_path: Path) -> None:
    source = ModelConfig(name=str(bert_folder(tmp_path)), attn_implementation="nonsense")
    with pytest.raises(InputError, match="nonsense"):
        skeleton(transformers.AutoModelForSequenceClassification, read_model_config(source))


def test_body_is_carried_under_another_head(tmp_path: Path) -> None:
    source = ModelConfig(name=str(bert_folder(tmp_path)))
    config = read_model_config(source)
    old = load_weights(transformers.AutoModelForMaskedLM, source, config).model
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(1.0)
    new = load_weights(transformers.AutoModelForTokenClassification, source, config).model
    head = new.classifier.weight.clone()
    carried = carry_body(old, new)
    assert {n for n, _ in new.named_parameters()} - carried == {
        "classifier.weight",
        "classifier.bias",
    }
    for name, tensor in old.bert.named_parameters():
        assert torch.equal(new.bert.get_parameter(name), tensor)
    assert torch.equal(new.classifier.weight, head)


def test_models_without_a_body_in_common_cannot_follow_one_another(tmp_path: Path) -> None:
    bert, gpt = bert_folder(tmp_path / "bert"), gpt_folder(tmp_path / "gpt")
    one = transformers.AutoModelForMaskedLM.from_pretrained(bert)
    other = transformers.AutoModelForCausalLM.from_pretrained(gpt)
    with pytest.raises(InputError, match="BertForMaskedLM and GPT2LMHeadModel have no body"):
        carry_body(one, other)
