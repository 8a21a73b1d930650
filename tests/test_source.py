from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hfft.config import ModelConfig
from hfft.errors import InputError
from hfft.source import load_weights, read_model_config

AUTO = AutoModelForImageClassification


def read(folder: Path, **fields: bool) -> object:
    return read_model_config(ModelConfig(name=str(folder), **fields))


def test_missing_folder_names_its_neighbour(vit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vit_folder, tmp_path / "my-vit")
    with pytest.raises(InputError, match=r"no folder .*did you mean 'my-vit'"):
        read(tmp_path / "my-vti")


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
