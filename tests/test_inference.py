from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import hfft
from hfft.cli import main
from hfft.inference import open_finished

from .runs import write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, timm_folder: Path, image_folder: Path) -> Path:
    """A run that has learned to tell the colours apart."""
    folder = tmp_path_factory.mktemp("finished")
    data = {"path": str(image_folder), "validation": "validation", "test": "test"}
    config = write_config(folder / "c.yaml", timm_folder, image_folder, data=data)
    hfft.train(config, ["strategy.epochs=8", "training.learning_rate=0.01"])
    return folder / "run"


def test_evaluate_repeats_the_runs_own_score(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    own = json.loads((run / "metrics.json").read_text())["test"]
    assert found["split"] == "test"
    assert found["metrics"] == pytest.approx(own, abs=1e-5)
    assert [r["label"] for r in found["per_class"]] == ["1", "2", "10"]


def test_evaluate_takes_a_model_folder_and_other_data(
    run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(image_folder), "--split", "validation"]
    assert main(["evaluate", str(run / "model"), *data]) == 0
    out = capsys.readouterr().out
    assert "9 examples of validation" in out
    assert "accuracy" in out


def test_evaluate_refuses_labels_the_model_does_not_know(
    run: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_folder / "test", tmp_path / "other")
    (tmp_path / "other" / "2").rename(tmp_path / "other" / "zebra")
    assert main(["evaluate", str(run), "--data", str(tmp_path / "other")]) == 2
    assert "zebra" in capsys.readouterr().err


def test_predict_labels_files_and_folders(
    run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [str(image_folder / "test" / "10"), str(image_folder / "test" / "2" / "0.png")]
    assert main(["predict", str(run), *inputs, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert [line["scores"][0]["label"] for line in lines] == ["10", "10", "10", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{run}", "nowhere.png"], "nowhere.png"),
        (["predict", "{run}", ""], "INPUT: one is empty"),
        (["predict", "{run}/log.jsonl", "x.png"], "neither a run folder"),
        (["evaluate", "{run}", "--split", "tset"], "there is no 'tset'"),
        (["evaluate", "{run}/model"], "needs --data"),
        (["push", "{run}/model", "me/model"], "is no finished run"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_message(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(run=run) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_push_that_fails_leaves_the_model_and_names_the_remedy(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert main(["push", str(run), "me/model"]) == 1
    assert f"hfft push {run} me/model" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (run / "model").iterdir()}


def test_card_names_no_local_path_in_its_metadata(run: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "datasets" not in card.data.to_dict()
    assert "base_model" not in card.data.to_dict()
    assert str(run.parent) not in card.content


def test_model_without_a_head_is_not_scored(
    run: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    save_file({n: t for n, t in stored.items() if ".fc." not in n}, file, {"format": "pt"})
    assert main(["evaluate", str(tmp_path / "model"), "--data", str(image_folder)]) == 2
    assert "nothing to score: the head is new" in capsys.readouterr().err


def test_evaluate_treats_bad_examples_and_foreign_code_as_its_run_does(
    run: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(image_folder / "test", tmp_path / "data")
    (tmp_path / "data" / "2" / "0.png").write_bytes(b"no image")
    evaluate = ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "data")]
    assert main(evaluate) == 2
    config = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["data"]["on_bad_example"] = "skip"
    values["model"] = {"name": "theirs", "trust_remote_code": True}
    config.write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main([*evaluate, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 8
    finished = open_finished(tmp_path / "run")
    assert finished.source.trust_remote_code
    assert finished.source.name == str(tmp_path / "run" / "model")
