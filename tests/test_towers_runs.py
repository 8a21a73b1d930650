"""A model put together of two towers, from the user's data to answers and to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import transformers as hf
from huggingface_hub import HfApi, ModelCard

from hfft.cli import main
from hfft.config_file import load_config
from hfft.models.dual_encoder import DualEncoderModel
from tests.dual_models import PICTURE
from tests.families import batchnorm_resnet
from tests.fresh import fresh
from tests.pair_models import COLOURS, SIDE, TEXT, picture, save, write_classes, write_config
from tests.runs import losses, metrics, same_weights

pytestmark = pytest.mark.slow
TEMPLATE = "a photo of the {} square ."
TRAINING = {
    "num_train_epochs": 40,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 6,
    "logging_steps": 1,
    "use_cpu": True,
}


def timm_tower() -> Any:
    """A ResNet for the images of these tests."""
    model = batchnorm_resnet()
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "input_size": (3, SIDE, SIDE)}
    return model


def vit_tower() -> Any:
    return hf.ViTModel(hf.ViTConfig(**{**PICTURE, "image_size": SIDE}))


@pytest.fixture(scope="module", params=[("timm", "softmax"), ("vit", "sigmoid")])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on pictures in folders by their colour."""
    (image, loss), folder = request.param, tmp_path_factory.mktemp("towers")
    save({"timm": timm_tower, "vit": vit_tower}[image](), folder / "image")
    save(hf.BertModel(hf.BertConfig(**TEXT)), folder / "text")
    config = write_config(
        folder / "run.yaml",
        {"towers": {kind: str(folder / kind) for kind in ("image", "text")}, "projection": 8},
        write_classes(folder / "data"),
        task={
            "name": "zero-shot-image-classification",
            "augmentation": "none",
            "loss": loss,
            "templates": [TEMPLATE],
        },
        data={"path": str(folder / "data"), "validation": "validation"},
        training=TRAINING,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        assert main(["train", str(config)]) == 0
    return folder / "run"


def test_both_towers_and_what_joins_them_learn(run: Path) -> None:
    found = [loss for *_, loss in losses(run)]
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert metrics(run)["eval"]["zero_shot_accuracy"] > 2 / len(COLOURS)
    after: Any = hf.AutoModel.from_pretrained(run / "model")
    for kind, tower in (("image", after.vision_model), ("text", after.text_model)):
        before = dict(hf.AutoModel.from_pretrained(run.parent / kind).named_parameters())
        moved = {n: not torch.equal(before[n], own) for n, own in tower.named_parameters()}
        assert sum(moved.values()) > 0.9 * len(moved) > 10


def test_plan_names_both_towers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run / "config.yaml")]) == 0
    told = capsys.readouterr().out
    assert f"{run.parent / 'image'} + {run.parent / 'text'} (DualEncoderModel" in told


def test_config_in_the_run_folder_repeats_the_run(run: Path, tmp_path: Path) -> None:
    own = load_config(run / "config.yaml").model
    assert own.names == [str(run.parent / kind) for kind in ("image", "text")]
    assert main(["train", str(run / "config.yaml"), f"output_dir={tmp_path / 'again'}"]) == 0
    assert same_weights(run, tmp_path / "again")


def test_evaluate_repeats_the_runs_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    own = metrics(run)["eval"]
    assert found == pytest.approx({name: own[name] for name in found}, abs=1e-5)
    assert (
        main(
            [
                "evaluate",
                str(run / "model"),
                "--data",
                str(run.parent / "data"),
                "--split",
                "validation",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(found, abs=1e-5)


def test_predict_scores_the_classes_or_a_records_candidates(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture("red", "left", tmp_path / "red.png")
    record = {"image": "red.png", "candidates": ["green", "red"]}
    (tmp_path / "asked.jsonl").write_text(json.dumps(record))
    given = [str(tmp_path / name) for name in ("red.png", "asked.jsonl")]
    assert main(["predict", str(run), *given, "--json"]) == 0
    whole, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert {one["label"] for one in whole["scores"]} == set(COLOURS)
    assert {one["label"] for one in two["scores"]} == {"green", "red"}
    ranks = [one["score"] for one in whole["scores"]]
    assert ranks == sorted(ranks, reverse=True)


def test_model_folder_loads_where_hfft_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture("red", "left", tmp_path / "red.png")
    assert main(["predict", str(run), str(tmp_path / "red.png"), "--json"]) == 0
    [wanted] = map(json.loads, capsys.readouterr().out.splitlines())
    found = fresh(
        f"""
import json
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, names = {str(run / "model")!r}, {list(COLOURS)!r}
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
texts = [{TEMPLATE!r}.format(name) for name in names]
inputs = processor(
    text=texts, images=Image.open("red.png"), padding=True, return_tensors="pt"
)
inputs.pop("token_type_ids", None)
with torch.no_grad():
    logits = model(**inputs).logits_per_image[0]
scores = logits.softmax(0) if model.logit_bias is None else logits.sigmoid()
print(json.dumps(dict(zip(names, scores.tolist()))))
""",
        tmp_path,
    )
    scores = {one["label"]: one["score"] for one in wanted["scores"]}
    assert found == pytest.approx(scores, abs=1e-3)


def test_card_names_both_towers_and_no_local_path(run: Path) -> None:
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.to_dict().keys().isdisjoint({"base_model", "datasets"})
    assert "image + text, fine-tuned for zero-shot-image-classification on data" in card.content
    assert str(run.parent) not in card.content


def test_push_takes_the_code_along_only_if_told_to(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[str] = []

    def upload(_: HfApi, *, folder_path: Path, **others: Any) -> None:
        sent.extend(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **others: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert main(["push", str(run), "me/towers"]) == 2
    assert "(dual_encoder.py, pooling.py" in capsys.readouterr().err
    assert sent == []
    assert main(["push", str(run), "me/towers", "--with-code"]) == 0
    assert f"{huggingface_hub.constants.ENDPOINT}/me/towers" in capsys.readouterr().out
    assert {"dual_encoder.py", "pooling.py", "tower.py", "model.safetensors"} <= set(sent)


def test_finished_model_is_the_source_of_another_run(run: Path, tmp_path: Path) -> None:
    task = load_config(run / "config.yaml").task
    options = {"name": task.name, **(task.model_extra or {})}
    training = {**TRAINING, "num_train_epochs": 1, "learning_rate": 1e-7}
    config = write_config(
        tmp_path / "run.yaml",
        run / "model",
        run.parent / "data",
        task=options,
        data={"path": str(run.parent / "data"), "validation": "validation"},
        training=training,
    )
    assert main(["train", str(config)]) == 0
    model = hf.AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(model, DualEncoderModel)
    before, after = metrics(run)["eval"], metrics(tmp_path / "run")["eval"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)
