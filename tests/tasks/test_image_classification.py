from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTImageProcessor,
)

from hfft.examples import seeded
from hfft.sections import ModelConfig
from hfft.source import load_weights, read_model_config, skeleton
from hfft.task import InputError, Split
from hfft.tasks.image_classification import ClassificationOptions, ImageClassification
from tests import pair_models
from tests.test_images import photo

LABELS = ["1", "2", "10"]


def prepared(folder: Path, **options: Any) -> tuple[ImageClassification, Any, Any]:
    """A task on a model: the task, the model's config, the processor."""
    task = ImageClassification(ClassificationOptions.model_validate(options))
    source = ModelConfig(name=str(folder))
    config = read_model_config(source)
    config = task.configure(config, LABELS)
    return task, config, task.load_processor(source, config)


def row(image_folder: Path) -> dict[str, Any]:
    return {"image": {"path": str(image_folder / "train/10/0.png"), "bytes": None}, "label": 2}


def values_apart(processor: Any, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Differences in values of 255."""
    own = getattr(processor, "image_std", None) or processor.data_config["std"]
    return (one - other).abs() * 255 * torch.tensor(own).view(3, 1, 1)


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_evaluation_input_is_the_models_own_preprocessing(
    folder: str, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    image = Image.open(image_folder / "train/10/0.png").convert("RGB")
    own = AutoImageProcessor.from_pretrained(source)(image, return_tensors="pt")["pixel_values"][0]
    for decode, most in (("exact", 0.0), ("fast", 1.01)):
        task, _, processor = prepared(source, decode=decode)
        inputs = task.transform(processor, training=False)(row(image_folder))
        assert inputs["labels"] == 2
        assert values_apart(processor, inputs["pixel_values"], own).max() <= most


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
@pytest.mark.parametrize(
    "augmentation",
    [
        "default",
        {"rotate": 20},
        {"scale": (0.5, 1.0), "vertical_flip": 0.5},
        {"color_jitter": 0.4, "shear": 10, "zoom": (0.8, 1.2), "translate": 0.1},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
    ],
)
def test_augmentation_is_random_in_training_alone(
    augmentation: object, folder: str, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    task, _, processor = prepared(request.getfixturevalue(folder), augmentation=augmentation)

    def draw(training: bool, seed: int) -> torch.Tensor:
        with seeded(seed):
            inputs = task.transform(processor, training=training)(row(image_folder))
        pixels: torch.Tensor = inputs["pixel_values"]
        assert pixels.shape == (3, 32, 32)
        return pixels

    draws = [draw(True, seed) for seed in range(6)]
    assert any(not torch.equal(draws[0], other) for other in draws[1:])
    assert torch.equal(draw(True, 3), draws[3])
    assert torch.equal(draw(False, 0), draw(False, 1))


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
@pytest.mark.parametrize(
    "augmentation",
    [
        "none",
        "default",
        {"horizontal_flip": 1.0},
        {"rotate": 20},
        {"scale": (0.1, 0.5), "color_jitter": 0.4, "rotate": 10},
    ],
)
@pytest.mark.parametrize("size", [(800, 600), (801, 603), (40, 60)])
def test_decode_fast_and_exact_draw_the_same_and_show_the_same(
    size: tuple[int, int],
    augmentation: object,
    folder: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    photo(*size).save(tmp_path / "a.jpg", quality=90)
    example = {"image": {"path": str(tmp_path / "a.jpg"), "bytes": None}, "label": 2}
    made = []
    for decode in ("fast", "exact"):
        options = {"decode": decode, "augmentation": augmentation}
        task, _, processor = prepared(request.getfixturevalue(folder), **options)
        with seeded(0):
            made.append(task.transform(processor, training=True)(example)["pixel_values"])
    assert values_apart(processor, *made).mean() < 1


def test_batch_is_the_examples_whatever_their_order_in_memory(timm_folder: Path) -> None:
    task, config, processor = prepared(timm_folder)
    collate = task.collator(processor, config)
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 4, 5, generator=random)
    for examples in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        rows = [{"pixel_values": one, "labels": 0} for one in examples]
        assert torch.equal(collate(rows)["pixel_values"], pixels)


def test_unknown_way_to_decode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decode"):
        ClassificationOptions.model_validate({"decode": "quick"})


def test_no_augmentation_makes_training_input_the_evaluation_input(
    timm_folder: Path, image_folder: Path
) -> None:
    task, _, processor = prepared(timm_folder, augmentation="none")
    training, evaluation = (
        task.transform(processor, training=training)(row(image_folder))["pixel_values"]
        for training in (True, False)
    )
    assert torch.equal(training, evaluation)


def test_timm_folder_that_does_not_say_how_images_are_prepared_is_named(
    timm_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(timm_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["pretrained_cfg"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"bare: its config\.json lacks pretrained_cfg"):
        prepared(folder)


def test_unknown_policy_is_named(timm_folder: Path) -> None:
    task, _, processor = prepared(timm_folder, augmentation={"auto_augment": "best"})
    with pytest.raises(InputError, match=r"task.augmentation.auto_augment.*'best'"):
        task.transform(processor, training=True)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_every_mode_become_three_channels(
    mode: str, timm_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I;16") else "image.png")
    Image.new(mode, (20, 30)).save(path)
    task, _, processor = prepared(timm_folder)
    example = {"image": {"path": str(path), "bytes": None}, "label": 0}
    assert task.transform(processor, training=False)(example)["pixel_values"].shape == (3, 32, 32)


def test_image_size_changes_input_and_saved_preprocessing(
    timm_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    task, config, processor = prepared(timm_folder, image_size=48, crop_pct=1.0)
    inputs = task.transform(processor, training=False)(row(image_folder))
    assert inputs["pixel_values"].shape == (3, 48, 48)
    loaded = load_weights(task.auto_model, ModelConfig(name=str(timm_folder)), config)
    loaded.model.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(again.data_config["input_size"]) == (3, 48, 48)


def test_image_size_that_the_weights_do_not_fit_is_an_error(vit_folder: Path) -> None:
    task, config, _ = prepared(vit_folder, image_size=64)
    with pytest.raises(InputError, match=r"other sizes than .*was the image size"):
        load_weights(task.auto_model, ModelConfig(name=str(vit_folder)), config)


@pytest.mark.parametrize(
    ("own", "size"),
    [
        (ConvNextImageProcessor(size={"shortest_edge": 224}), {"shortest_edge": 48}),
        (CLIPImageProcessor(size={"shortest_edge": 256}), {"shortest_edge": 55}),  # 256 / 224 of 48
        (ViTImageProcessor(), {"height": 48, "width": 48}),
    ],
)
def test_image_size_is_set_in_the_processors_own_form(
    own: Any, size: dict[str, int], image_folder: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "num_stages": 3}
    model = ConvNextForImageClassification(ConvNextConfig(**sizes))
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    task, _, processor = prepared(tmp_path, image_size=48)
    for training in (True, False):
        inputs = task.transform(processor, training=training)(row(image_folder))
        assert inputs["pixel_values"].shape == (3, 48, 48)
    processor.save_pretrained(tmp_path)
    assert dict(AutoImageProcessor.from_pretrained(tmp_path).size) == size


def test_image_size_is_in_the_config_before_the_model_is_built(vit_folder: Path) -> None:
    task = ImageClassification(ClassificationOptions(image_size=64))
    config = read_model_config(ModelConfig(name=str(vit_folder)))
    task.configure(config, LABELS)
    model = skeleton(task.auto_model, config)
    positions = model.get_parameter("vit.embeddings.position_embeddings")
    assert positions.shape[1] == 1 + (64 // 8) ** 2


def test_distilled_model_learns_without_its_teachers_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DeiTConfig(**sizes, intermediate_size=32, image_size=32, patch_size=8)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    task, found, _ = prepared(tmp_path)
    model = load_weights(task.auto_model, ModelConfig(name=str(tmp_path)), found).model
    output = model(pixel_values=torch.rand(2, 3, 32, 32), labels=torch.tensor([0, 2]))
    assert output.loss.isfinite()
    assert output.logits.shape == (2, 3)


def test_metrics_agree_with_counting() -> None:
    task = ImageClassification(ClassificationOptions())
    logits = np.eye(3)[[0, 0, 1, 2, 2, 1]]
    labels = np.array([0, 1, 1, 2, 2, 2])
    split = Split([], [], LABELS)
    scores = task.metrics(logits, labels, split)
    assert tuple(scores) == task.metric_names
    assert scores["accuracy"] == pytest.approx(4 / 6)
    # F1: 2*1/(2+1), 2*1/(2+2), 2*2/(2+3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    rows = task.scores_by_label(logits, labels, split)
    assert [r["examples"] for r in rows] == [1, 2, 3]
    assert rows[2]["recall"] == pytest.approx(2 / 3)
    assert rows[2]["precision"] == pytest.approx(1.0)


def test_class_that_never_occurs_is_scored_as_none(tmp_path: Path) -> None:
    task = ImageClassification(ClassificationOptions())
    logits, labels = np.eye(3)[[0, 0]], np.array([0, 0])
    assert task.scores_by_label(logits, labels, Split([], [], LABELS))[1]["examples"] == 0
    [picture] = task.draw(tmp_path, logits, labels, Split([], [], LABELS))
    assert Image.open(picture).size[0] > 100


@pytest.mark.parametrize("key", ["scale", "ratio", "zoom"])
@pytest.mark.parametrize("limits", [[2, 1], [0, 1], [-1, 1]])
def test_range_that_nothing_can_be_drawn_from_is_refused(key: str, limits: list[float]) -> None:
    with pytest.raises(ValueError, match="above 0, the smaller first"):
        ClassificationOptions.model_validate({"augmentation": {key: limits}})


def test_the_head_is_made_by_the_text_tower_only_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = pair_models.save(pair_models.clip(), tmp_path)
    task, config, processor = prepared(folder)
    assert config.model_type == "clip"
    task, config, processor = prepared(folder, head="zero-shot", image_size=32)
    assert config.model_type == "zero-shot-head"
    assert config.prompt_templates == ["a photo of a {}."]
    assert list(config.id2label.values()) == LABELS
    assert config.vision_config.image_size == 32
    assert dict(processor.crop_size) == {"height": 32, "width": 32}
    again = task.configure(config, LABELS)
    assert again is config


def test_what_the_classifier_leaves_out_is_idle(tmp_path: Path, vit_folder: Path) -> None:
    folder = pair_models.save(pair_models.clip(), tmp_path)
    side = pair_models.SIDE
    for model, size, among in (
        (folder, side, {"vision_model.post_layernorm.weight"}),
        (vit_folder, 32, set()),
    ):
        task, config, _ = prepared(model)
        pixels = torch.zeros(1, 3, size, size)
        found = task.idle(
            skeleton(task.auto_model, config), lambda pixels=pixels: {"pixel_values": pixels}
        )
        assert among <= found
        assert bool(found) == bool(among)
