from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hfft.errors import InputError
from hfft.sections import ModelConfig
from hfft.source import (
    carry_body,
    check_shapes,
    initialise,
    load_weights,
    read_model_config,
    skeleton,
)
from hfft.text.pooled import PooledConfig

from .text_runs import bert_folder, gpt_folder

AUTO = AutoModelForImageClassification


def read(folder: Path, **fields: bool) -> object:
    return read_model_config(ModelConfig(name=str(folder), **fields))


def test_missing_folder_names_its_neighbour(vit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vit_folder, tmp_path / "my-vit")
    with pytest.raises(InputError, match=r"no folder .*did you mean 'my-vit'"):
        read(tmp_path / "my-vti")


def test_source_with_an_adapter_in_it_is_refused(vit_folder: Path, tmp_path: Path) -> None:
    """transformers would load the adapter unasked, and the layers have other names then."""
    shutil.copytree(vit_folder, tmp_path / "vit")
    (tmp_path / "vit" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter beside its weights; merge it"):
        read(tmp_path / "vit")


def test_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no model folder: it has no config\.json"):
        read(tmp_path)


def test_run_folder_points_to_its_model(vit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vit_folder, tmp_path / "run" / "model")
    with pytest.raises(InputError, match=r"did you mean .*run/model"):
        read(tmp_path / "run")


def test_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="is a file; give the folder"):
        read(tmp_path / "model.safetensors")


def test_pickled_weights_need_permission(vit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(vit_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pickled weights only.*model.allow_pickle: true"):
        read(folder)
    source = ModelConfig(name=str(folder), allow_pickle=True)
    loaded = load_weights(AUTO, source, read_model_config(source)).model
    safe = AUTO.from_pretrained(vit_folder).state_dict()
    assert all(torch.equal(tensor, safe[name]) for name, tensor in loaded.state_dict().items())


def test_folder_without_weights_is_named(vit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vit_folder, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        read(tmp_path / "empty")


def test_remote_code_needs_permission_and_does_not_run(vit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(vit_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "theirs"
    config["auto_map"] = {"AutoConfig": "theirs.TheirConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match=r"model\.trust_remote_code: true"):
        read(folder)
    assert not (tmp_path / "ran").exists()


def test_truncated_weights_are_named(vit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(vit_folder, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"model.safetensors can't be loaded.*copy it anew"):
        read(folder)  # before a run is claimed, and with --overwrite another one removed


def test_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no local folder and can't be had from the Hub"):
        read_model_config(ModelConfig(name="timm/no_such_model"))


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
