"""The quickstart's ingredients: the digits that are made, and the model that is shipped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "glyph-resnet"
HEAD = {"timm_model.fc.weight", "timm_model.fc.bias"}
DIGITS = [str(digit) for digit in range(10)]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


load_script("made_folder")  # which the others import
digits = load_script("make_digits")


def make(folder: Path, *options: str) -> int:
    return int(digits.main([str(folder), "--per-class", "2", *options]))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "made"
    assert make(folder) == 0
    return folder


def test_digits_are_written_as_split_and_class_folders(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {"train", "validation", "test", "about.json"}
    sizes = {"train": 20, "validation": 300, "test": 900}
    for split, size in sizes.items():
        assert sorted(path.name for path in (made / split).iterdir()) == DIGITS
        assert len(list((made / split).glob("*/*.png"))) == size
    assert all(len(list((made / "train" / digit).iterdir())) == 2 for digit in DIGITS)
    with Image.open(next((made / "train" / "7").iterdir())) as image:
        assert (image.mode, image.size) == ("L", (32, 32))


def test_about_json_tells_what_the_digits_were_made_from(made: Path) -> None:
    about = json.loads((made / "about.json").read_text(encoding="utf-8"))
    assert (about["per_class"], about["jitter"], about["seed"]) == (2, True, 0)
    assert "load_digits" in about["source"]


def test_no_digit_is_in_two_splits(made: Path) -> None:
    names = [path.name for path in made.rglob("*.png")]
    assert len(names) == len(set(names))


def test_validation_and_test_stay_the_same_whatever_the_size_of_train(
    made: Path, tmp_path: Path
) -> None:
    make(tmp_path / "more", "--per-class", "5")
    fewer, more = contents(made), contents(tmp_path / "more")
    assert set(fewer) < set(more)
    assert all(more[name] == fewer[name] for name in fewer if name != "about.json")


def test_making_the_same_digits_again_changes_nothing(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert make(made) == 0
    assert "up to date" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize("option", [["--per-class", "3"], ["--seed", "1"], ["--no-jitter"]])
def test_a_folder_of_other_digits_is_refused_and_kept(
    made: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(made)
    assert make(made, *option) == 2
    assert f"{made} exists and was made differently" in capsys.readouterr().err
    assert contents(made) == before


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    assert make(tmp_path) == 2
    assert contents(tmp_path) == {"thesis.txt": b"all of it"}


def test_more_training_digits_than_there_are_is_refused_without_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path / "digits", "--per-class", "1000") == 2
    assert "--per-class must lie between 1 and" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError("no space left")])
def test_an_interruption_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    calls = 0
    draw: Callable[..., Image.Image] = digits.draw_digit

    def fail_at_the_hundredth(*arguments: Any) -> Image.Image:
        nonlocal calls
        calls += 1
        if calls == 100:
            assert len(list(tmp_path.rglob("*.png"))) == 99
            raise failure
        return draw(*arguments)

    monkeypatch.setattr(digits, "draw_digit", fail_at_the_hundredth)
    with pytest.raises(type(failure)):
        make(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_pretraining_without_fonts_but_dejavu_names_the_remedy(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "pretrain_glyphs.py"
    command: list[str | Path] = [
        sys.executable,
        script,
        "--threads=1",
        f"--out={tmp_path}/out",
        "--fonts",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "besides DejaVu" in ended.stderr
    assert "--fonts" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_model_is_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 3_000_000


def test_the_shipped_model_is_safetensors_in_half_precision() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    tensors = load_file(MODEL / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_of_the_shipped_model_only_the_head_is_missing_for_ten_new_labels() -> None:
    model, loading = AutoModelForImageClassification.from_pretrained(
        MODEL, num_labels=10, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = {name for name, *_ in loading["mismatched_keys"]}
    assert mismatched | set(loading["missing_keys"]) == HEAD
    assert not loading["unexpected_keys"]
    stored = load_file(MODEL / "model.safetensors")
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(
        torch.equal(loaded[name], stored[name].to(loaded[name])) for name in stored.keys() - HEAD
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.eval()(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 10)


def test_the_shipped_model_was_pretrained_on_no_digit() -> None:
    labels = AutoConfig.from_pretrained(MODEL).id2label.values()
    assert len(labels) == 100
    assert not any(character.isnumeric() for label in labels for character in label)


def test_the_shipped_model_has_a_readable_card() -> None:
    card = ModelCard.load(MODEL / "README.md").data.to_dict()
    assert card["license"] == "apache-2.0"
    assert card["library_name"] == "transformers"
    assert card["pipeline_tag"] == "image-classification"
