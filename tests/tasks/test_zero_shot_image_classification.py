from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from hfft.contrastive_task import Reference
from hfft.errors import InputError
from hfft.registry import get
from hfft.sections import ModelConfig
from tests.pair_models import SIDE, clip, dual, save, siglip

TEMPLATES = ["a {} square.", "a photo of a {} square."]
NAMES = ["red", "green"]


def task(**options: Any) -> Any:
    kind = get("zero-shot-image-classification")
    return kind(kind.Options.model_validate({"augmentation": "none", **options}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(clip(), tmp_path_factory.mktemp("clip"))


def opened(own: Any, folder: Path, labels: list[str] = NAMES) -> tuple[Any, Any, Any]:
    source = ModelConfig(name=str(folder))
    config = own.configure(hf.AutoConfig.from_pretrained(folder), labels)
    model = hf.AutoModel.from_pretrained(folder, config=config).eval()
    return own.load_processor(source, config), config, model


def images(*colours: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Return pictures as data have them."""
    found = []
    for colour in colours:
        held = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), colour).save(held, "png")
        found.append({"path": None, "bytes": held.getvalue()})
    return found


def test_scores_of_classes_are_transformers_logits(folder: Path) -> None:
    own = task(templates=TEMPLATES[:1])
    processor, _, model = opened(own, folder)
    pictures = images((200, 10, 10), (10, 200, 10), (90, 90, 90))
    texts = [TEMPLATES[0].replace("{}", name) for name in NAMES]
    prepare = own.prepare(processor.other, training=False)
    pixels = torch.stack([prepare(one)["pixel_values"] for one in pictures])
    tokens = processor.tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**tokens, pixel_values=pixels).logits_per_image
        found = model.get_image_features(pixel_values=pixels).pooler_output
    one = torch.nn.functional.normalize(found, dim=-1).numpy()
    reference = own.reference(model, SimpleNamespace(processor=processor))
    logits = reference.scale * torch.from_numpy(one) @ reference.classes.T
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_class_is_the_mean_of_its_prompts(folder: Path) -> None:
    both = task(templates=TEMPLATES)
    processor, _, model = opened(both, folder)
    found = both.reference(model, SimpleNamespace(processor=processor)).classes
    each = []
    for template in TEMPLATES:
        own = task(templates=[template])
        processor, _, model = opened(own, folder)
        each.append(own.reference(model, SimpleNamespace(processor=processor)).classes)
    mean = torch.nn.functional.normalize(torch.stack(each).mean(0), dim=-1)
    torch.testing.assert_close(found, mean)


def test_accuracy_counts_an_image_of_several_captions_once() -> None:
    own = task(templates=TEMPLATES)
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    reference = Reference(torch.tensor(1.0), None, classes)
    one = np.array([[1, 0], [1, 0], [1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
    labels = np.array([[1, 11], [1, 12], [1, 13], [2, 14], [3, 15]])
    split: Any = SimpleNamespace(
        rows={"label": [0, 1, 1]}, encoded={"row": [0, 0, 0, 1, 2]}, reference=reference
    )
    found = own.metrics((one, one), labels, split)
    assert found["zero_shot_accuracy"] == pytest.approx(2 / 3)
    assert found.keys() == {"loss", *own.metric_names}


def test_loss_of_a_split_is_over_all_its_pairs(folder: Path) -> None:
    own = task()
    _, _, model = opened(own, folder)
    pixels = torch.randn(4, 3, SIDE, SIDE)
    ids = torch.tensor([[2, 4, 5, 3], [2, 6, 7, 3], [2, 8, 9, 3], [2, 10, 11, 3]])
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        outputs = model(**inputs, return_loss=True)
    labels = torch.arange(4)[:, None].expand(-1, 2)
    embedded = [one.numpy() for one in own.reduce(outputs, labels)]
    reference = own.reference(model, None)
    split: Any = SimpleNamespace(reference=reference)
    found = own.metrics(embedded, labels.numpy(), split)
    assert found["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert own.loss(outputs, labels).item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_training_draws_a_prompt_and_evaluation_takes_the_first(folder: Path) -> None:
    own = task(templates=TEMPLATES)
    processor, config, _ = opened(own, folder)
    assert own.augments
    encoded = own.encode(processor, config)({"index": [0], "image": [7], "label": [1]})
    row = {name: values[0] for name, values in encoded.items()} | {"image": images((1, 2, 3))[0]}
    train, still = (own.transform(processor, training=training) for training in (True, False))
    seen = {tuple(train(row)["input_ids"]) for _ in range(30)}
    assert seen == {tuple(ids) for ids in row["prompts"]}
    assert {tuple(still(row)["input_ids"]) for _ in range(5)} == {tuple(row["prompts"][0])}
    assert still(row)["labels"] == [7, row["text_key"]]


def test_batches_hold_what_both_towers_read(folder: Path) -> None:
    own = task()
    processor, config, model = opened(own, folder)
    rows = {"index": [0, 1], "image": [7, 8], "caption": [["red"], ["a green square"]]}
    encoded = own.encode(processor, config)(rows)
    transform = own.transform(processor, training=False)
    examples = [
        transform({name: values[n] for name, values in encoded.items()} | {"image": picture})
        for n, picture in enumerate(images((1, 2, 3), (4, 5, 6)))
    ]
    batch = own.collator(processor, config)(examples)
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 5)
    assert batch["labels"].tolist() == [[7, encoded["text_key"][0]], [8, encoded["text_key"][1]]]
    assert model(**{n: v for n, v in batch.items() if n != "labels"}).text_embeds.shape == (2, 16)


@pytest.mark.parametrize(("make", "loss"), [(clip, "softmax"), (siglip, "sigmoid")])
def test_finished_models_are_taken(make: Any, loss: str) -> None:
    kind, model = type(task()), make()
    model.config.architectures = [type(model).__name__]
    assert kind.takes(model.config)
    model.config.prompt_templates, model.config.class_names = TEMPLATES, NAMES
    assert kind.options_of(model.config) == {"templates": TEMPLATES, "loss": loss}
    assert kind.labels_of(model.config) == NAMES
    task(loss=loss).check_skeleton(model)


def test_encoders_of_one_kind_are_refused_by_what_they_lack() -> None:
    with pytest.raises(InputError, match="vit has no image tower; take a two-tower model"):
        task().configure(hf.ViTConfig(), [])
    with pytest.raises(InputError, match=r"task\.loss: sigmoid needs a logit_bias"):
        task(loss="sigmoid").check_skeleton(dual())
