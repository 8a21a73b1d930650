"""What is wrong with pairs, and with how they are to be learned, is said before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml

from hfft.config import Stage
from hfft.config_file import load_config
from hfft.contrastive_plan import check_contrast
from hfft.errors import InputError
from hfft.plan import Plan, make_plan

from . import pair_models

TASK = {"name": "zero-shot-image-classification", "augmentation": "none"}
SIZE = "per_device_train_batch_size"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `pairs` and `classes`, in a folder."""
    folder = tmp_path_factory.mktemp("place")
    for make in (pair_models.clip, pair_models.siglip):
        pair_models.save(make(), folder / make.__name__)
    pair_models.write_pairs(folder / "pairs")
    pair_models.write_classes(folder / "classes")
    return folder


def planned(folder: Path, model: Path, data: Path, /, **sections: Any) -> Plan:
    return make_plan(
        load_config(pair_models.write_config(folder / "c.yaml", model, data, **sections))
    )


def complaints(folder: Path, model: Path, data: Path, /, **sections: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        planned(folder, model, data, **sections)
    return caught.value.messages


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    """Write rows of one good picture, or of their own."""
    pair_models.picture("red", "left", folder / "good.png")
    lines = "".join(json.dumps({"image": "good.png", **row}) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    return folder


GOOD = {"caption": "a red square"}


@pytest.mark.parametrize(
    ("captions", "flaw"),
    [
        (["a red square", ""], "row 1 has an empty caption"),
        (["a red square", " \t"], "row 1 has an empty caption"),
        (["a red square", None], "row 1 has an empty caption"),
        ([["a red square"], []], "row 1 has no caption"),
        ([["a red square"], ["a blue square", " "]], "row 1 has an empty caption"),
        ([["a red square"], None], "row 1 has no caption"),
        (["a red square", 3], "row 1 is 3, no caption"),
        ([["a red square"], ["a", 3]], "row 1 has a caption that is 3, no text"),
    ],
)
def test_captions_that_say_nothing_are_named_by_row(
    captions: list[Any], flaw: str, place: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path, *({"caption": caption} for caption in captions))
    [said] = complaints(tmp_path, place / "clip", data)
    assert said.startswith(f'data.train, "{tmp_path}')
    assert "1 of 2 examples have no usable caption:" in said
    assert flaw in said
    assert "leave them out with data.on_bad_example: skip" in said


def test_numbers_are_no_captions(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path, {"caption": 1}, {"caption": 2})
    [said] = complaints(tmp_path, place / "clip", data)
    assert said.startswith('data.columns.caption: column "caption" of ')
    assert "holds int64, not a caption or a list of them an example" in said


def test_images_that_are_not_there_or_unreadable_are_all_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    bad = ("absent.png", None, "broken.png")
    data = write_rows(tmp_path, GOOD, *({**GOOD, "image": name} for name in bad))
    [said] = complaints(tmp_path, place / "clip", data)
    assert "3 of 4 images can't be decoded:" in said
    assert f"{tmp_path / 'absent.png'}: there is no such file" in said
    assert "(no file name): the row names no image" in said
    assert f"{tmp_path / 'broken.png'}: its content is not an image" in said
    assert "data.on_bad_example: skip" in said


def test_bad_pairs_are_left_out_where_that_is_asked_for(place: Path, tmp_path: Path) -> None:
    rows = [GOOD, {"caption": "a blue square"}, {"caption": " "}, {**GOOD, "image": "absent.png"}]
    data = write_rows(tmp_path, *rows, {"caption": "a green square"})
    chosen = {"path": str(data), "validation": "train", "on_bad_example": "skip"}
    plan = planned(tmp_path, place / "clip", data, data=chosen)
    assert len(plan.subject.examples["train"]) == 3
    assert any("left out 2 of 5 examples" in note for note in plan.notes)


def test_texts_longer_than_the_tower_takes_are_counted(place: Path, tmp_path: Path) -> None:
    captions = (["a red square"], ["a red square " * 9], ["a blue square"] * 2)
    data = write_rows(tmp_path, *({"caption": some} for some in captions))
    chosen = {"path": str(data), "validation": "train"}
    plan = planned(tmp_path, place / "clip", data, data=chosen)
    assert "data.train: 1 example of 4 longer than the limit: truncated." in plan.notes
    strict = {**TASK, "overlong": "error"}
    said = "\n".join(complaints(tmp_path, place / "clip", data, data=chosen, task=strict))
    assert "1 example of 4 longer than the limit; shorten them, raise task.max_length" in said


@pytest.mark.parametrize(
    ("training", "contrastive", "said"),
    [
        ({SIZE: 1}, None, f"training.{SIZE}: a batch of one pair has nothing to contrast it with"),
        (
            {SIZE: 6, "gradient_accumulation_steps": 2},
            None,
            "training.gradient_accumulation_steps: adds no negatives, since each micro-batch is "
            "contrasted for itself; leave it out, and set contrastive.global_batch",
        ),
        (
            {SIZE: 6, "label_smoothing_factor": 0.1},
            None,
            "training.label_smoothing_factor: is for classes, not for numbers or pairs",
        ),
        ({}, {"global_batch": 6, "chunk": 4}, "contrastive.chunk: 6 pairs of each process"),
        ({SIZE: 6}, {"global_batch": 6}, "contrastive.global_batch: training."),
    ],
)
def test_batches_that_cannot_be_contrasted_are_refused(
    training: dict[str, Any],
    contrastive: dict[str, int] | None,
    said: str,
    place: Path,
    tmp_path: Path,
) -> None:
    stage: dict[str, Any] = {"name": "full"}
    stage |= {} if contrastive is None else {"contrastive": contrastive}
    sections = {"strategy": stage, "training": {"use_cpu": True, **training}}
    [message] = complaints(tmp_path, place / "clip", place / "pairs", **sections)
    assert said in message


def test_a_global_batch_of_one_is_refused_by_its_key(place: Path, tmp_path: Path) -> None:
    stage = {"name": "full", "contrastive": {"global_batch": 1}}
    [said] = complaints(tmp_path, place / "clip", place / "pairs", strategy=stage)
    assert "contrastive.global_batch: Input should be greater than 1" in said


def test_a_global_batch_is_shared_evenly_by_processes(place: Path, tmp_path: Path) -> None:
    subject = planned(tmp_path, place / "clip", place / "pairs").subject
    stage = Stage(name="a", contrastive={"global_batch": 9})  # type: ignore[arg-type]
    [said] = check_contrast({}, None, stage, subject, (), processes=2)
    assert said.startswith("contrastive.global_batch: 9 pairs can't be shared by 2 processes")
    assert said.endswith("take a multiple of 2")
    assert check_contrast({}, None, stage, subject, (), processes=3) == []


@pytest.mark.parametrize("template", ["a photo", "a {} on a {}", "a {name}", "a {}{"])
def test_templates_have_one_place_for_the_name(template: str, place: Path, tmp_path: Path) -> None:
    task = {**TASK, "templates": ["a photo of a {}", template]}
    [said] = complaints(tmp_path, place / "clip", place / "classes", task=task)
    assert "task.templates" in said
    assert f"{template!r} must have one {{}}, where the class's name goes" in said


def test_templates_want_classes(place: Path, tmp_path: Path) -> None:
    task = {**TASK, "templates": ["a photo of a {}"]}
    [said] = complaints(tmp_path, place / "clip", place / "pairs", task=task)
    assert "has no classes for task.templates; map them (`data.columns.label: NAME`)" in said
    assert "leave task.templates out" in said


def test_classes_want_captions_or_templates(place: Path, tmp_path: Path) -> None:
    [said] = complaints(tmp_path, place / "clip", place / "classes")
    assert "has no captions; map them (`data.columns.caption: NAME`)" in said
    assert yaml.safe_load(said.split("`")[-2]) == {"task.templates": ["a photo of a {}."]}


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        ("clip", "sigmoid", "task.loss: sigmoid needs a logit_bias, which CLIPModel has not; set "),
        ("siglip", "softmax", "task.loss: SiglipModel has a logit_bias, which a softmax leaves"),
    ],
)
def test_models_are_trained_by_the_loss_they_were_made_for(
    model: str, loss: str, said: str, place: Path, tmp_path: Path
) -> None:
    [message] = complaints(tmp_path, place / model, place / "pairs", task={**TASK, "loss": loss})
    assert message.startswith(said)
    assert f"task.loss: {'softmax' if loss == 'sigmoid' else 'sigmoid'}" in message


def test_encoders_of_images_alone_are_refused_with_the_remedy(place: Path, tmp_path: Path) -> None:
    vit = pair_models.save(hf.ViTModel(hf.ViTConfig(**pair_models.VISION)), tmp_path / "vit")
    said = "\n".join(complaints(tmp_path, vit, place / "pairs"))
    assert "model.towers: {image: NAME, text: NAME}" in said


def test_towers_are_refused_by_tasks_of_one_model(place: Path, tmp_path: Path) -> None:
    vit = pair_models.save(hf.ViTModel(hf.ViTConfig(**pair_models.VISION)), tmp_path / "vit")
    towers: Any = {"towers": {"image": str(vit), "text": str(place / "clip")}}
    task = "image-classification"
    [said] = complaints(tmp_path, towers, place / "classes", task=task)
    assert "it is of two towers, which go with tasks that contrast pairs; take one model" in said


@pytest.mark.parametrize("half", ["image", "text"])
def test_pairs_of_one_half_are_nothing_to_contrast(half: str, place: Path, tmp_path: Path) -> None:
    pair_models.picture("blue", "top", tmp_path / "other.png")
    other = {"caption": "a blue square"} if half == "image" else {"image": "other.png"}
    data = write_rows(tmp_path, GOOD, GOOD, {**GOOD, **other})
    chosen = {"path": str(data), "validation": "train"}
    notes = planned(tmp_path, place / "clip", data, data=chosen).notes
    [said] = [note for note in notes if "nothing to contrast" in note]
    assert said.startswith(f"data.train: its 3 pairs are all of one {half}, so there is nothing")
