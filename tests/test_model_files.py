"""What is wrong with the files of a model is told before a weight of it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, PretrainedConfig, ViTModel

from hfft.errors import InputError
from hfft.model_files import (
    explained,
    first_line,
    lacking,
    misfits,
    pretrained,
    read_config,
    refuse,
    stored_shape,
    stored_shapes,
    told_missing,
)
from hfft.sections import ModelConfig

AUTO = AutoModelForImageClassification


def read(folder: Path, **fields: bool) -> PretrainedConfig:
    return read_config(ModelConfig(name=str(folder), **fields))


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
    loaded, _ = pretrained(AUTO, source, read_config(source))
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


def test_hub_id_without_network_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"no local folder and can't be had from the Hub"):
        read_config(ModelConfig(name="timm/no_such_model"))


def classifier(folder: Path, **changes: Any) -> Any:
    """A model of a folder's config, changed, without its weights."""
    config = read(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return AUTO.from_config(config)


def test_config_is_of_float32_weights(vit_folder: Path, tmp_path: Path) -> None:
    AUTO.from_pretrained(vit_folder, dtype=torch.float16).save_pretrained(tmp_path)
    assert read(tmp_path).dtype == torch.float32
    model, info = pretrained(AUTO, ModelConfig(name=str(tmp_path)), read(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError("no file named model.safetensors"),
            "m has no safetensors weights; .*e: true",
        ),
        (ValueError("set trust_remote_code=True"), r"m needs Python .*model.trust_remote_code: tr"),
        (
            OSError("no such repository\nmore"),
            r"m is no local .*\(no such repository\); give a local",
        ),
        (KeyError("depth"), "m is no local folder"),
    ],
)
def test_what_libraries_raise_is_explained(error: Exception, said: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(InputError, match=f"^model: {said}") as caught:
        explained(ModelConfig(name="m"), fail)
    assert caught.value.__cause__ is error


def test_folder_that_is_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("depth")

    with pytest.raises(InputError, match=f"^model: {tmp_path} can't be loaded: 'depth'$"):
        explained(ModelConfig(name=str(tmp_path)), fail)


def test_code_of_a_towers_own_is_refused_without_a_remedy_that_is_none() -> None:
    model = ModelConfig.model_validate({"towers": {"image": "i", "text": "t"}})

    def fail() -> None:
        raise ValueError("set trust_remote_code=True")

    with pytest.raises(InputError, match=r"model.towers.text: t needs .* a tower can't take along"):
        explained(model.tower("text"), fail)


@pytest.mark.parametrize(("error", "said"), [(OSError("a\nb"), "a"), (OSError(" "), "OSError")])
def test_first_line_is_never_empty(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_shapes_are_found_under_any_name_that_a_parameter_is_stored_by(
    vit_folder: Path, timm_folder: Path, tmp_path: Path
) -> None:
    name, shape = "embeddings.position_embeddings", [1, 17, 16]
    model = classifier(vit_folder)
    with_head = stored_shapes(ModelConfig(name=str(vit_folder)))
    ViTModel.from_pretrained(vit_folder).save_pretrained(tmp_path)
    alone = stored_shapes(ModelConfig(name=str(tmp_path)))
    for stored in (with_head, alone):
        assert stored_shape(f"vit.{name}", stored, model) == shape
        assert stored_shape(name, stored, model.vit) == shape
    assert stored_shape("classifier.bias", with_head, model) == [2]
    assert stored_shape("classifier.bias", alone, model) is None
    timm = stored_shapes(ModelConfig(name=str(timm_folder)))
    assert stored_shape("timm_model.fc.bias", timm, classifier(timm_folder)) == [2]


def test_of_a_model_on_the_hub_no_shape_is_known(vit_folder: Path) -> None:
    away, model = ModelConfig(name="google/vit"), classifier(vit_folder)
    assert stored_shapes(away) == {}
    assert misfits(away, model) == {}
    assert lacking(away, model, {"vit.no.such"}) == frozenset()


def test_weights_that_do_not_fit_are_all_found_and_the_first_is_named(vit_folder: Path) -> None:
    source = ModelConfig(name=str(vit_folder))
    assert misfits(source, classifier(vit_folder)) == {}
    model = classifier(vit_folder, image_size=64, id2label=dict.fromkeys(range(3)))
    position = "vit.embeddings.position_embeddings"
    head = ("classifier.weight", "classifier.bias")
    assert misfits(source, model).keys() == {position, *head}
    found = misfits(source, model, head)
    assert found == {position: ([1, 17, 16], (1, 65, 16))}
    refuse(source, {})
    with pytest.raises(InputError, match=rf"1 weights .*first {position}: \(1, 17, 16\) stored"):
        refuse(source, found)


def test_what_a_source_lacks_is_known_unless_it_is_called_otherwise_there(
    vit_folder: Path, timm_folder: Path
) -> None:
    model = classifier(timm_folder)
    body = {name for name, _ in model.named_parameters()}
    source = ModelConfig(name=str(timm_folder))
    assert lacking(source, model, body) == frozenset()
    assert lacking(source, model, {*body, "timm_model.new"}) == {"timm_model.new"}
    other = ModelConfig(name=str(vit_folder))  # as where transformers changes names on loading
    assert lacking(other, model, body) == frozenset()


def test_weights_that_start_afresh_are_told_and_most_of_them_refused(vit_folder: Path) -> None:
    source, model = ModelConfig(name=str(vit_folder)), classifier(vit_folder)
    body = [name for name, _ in model.named_parameters()]
    assert told_missing(source, model, body, ()) == []
    [one] = told_missing(source, model, body, body[:1])
    assert one == f"1 weights below the head are not in the source and start afresh: {body[0]}"
    [several] = told_missing(source, model, body, body[:5])
    assert several.endswith(f"{sorted(body[:5])[3]} …")
    with pytest.raises(InputError, match=r"is no source for a ViTForImageClassification: it lacks"):
        told_missing(source, model, body, body[: len(body) // 2 + 1])
