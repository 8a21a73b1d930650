"""Adapters in one tower of two: the other one stays as it was, and its output can be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel

import hfft
from hfft.adapters import adapted_weights, inject, merge
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.layers import find_layer_groups
from hfft.plan import make_plan
from tests import pair_models
from tests.families import TOWERS
from tests.feature_runs import furthest, stored
from tests.features.cases import answers, batch_of, make
from tests.runs import metrics, weights

RANDOM = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}  # B is not zero
SIDES = [(family, tower) for family in TOWERS for tower in TOWERS[family].depth]


def only(family: str, tower: str) -> dict[str, Any]:
    """The options that adapt one tower: its convolutions by name, or else all linear layers."""
    if (family, tower) == ("dual-encoder-timm", "vision"):
        return {**RANDOM, "target_modules": r"vision_model\..*conv\d"}
    [other] = TOWERS[family].depth.keys() - {tower}
    return {**RANDOM, "exclude_modules": rf"{other}_model\..*"}


def adapted(family: str, tower: str) -> tuple[Any, Any]:
    model = make(family)
    head = find_layer_groups(model).head.parameters
    return model, inject(model, only(family, tower), head, seed=0)


@pytest.mark.parametrize(("family", "tower"), SIDES)
def test_one_tower_is_adapted_and_it_alone_learns(family: str, tower: str) -> None:
    model, made = adapted(family, tower)
    assert made.layers
    assert {path.partition(".")[0] for path in made.layers} == {f"{tower}_model"}
    answers(model, batch_of(family))[0].backward()
    moving = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moving == made.learning


@pytest.mark.parametrize(("family", "tower"), SIDES)
def test_merged_it_answers_as_with_the_adapter_and_the_other_tower_is_untouched(
    family: str, tower: str
) -> None:
    before, (model, _) = make(family).state_dict(), adapted(family, tower)
    groups = find_layer_groups(make(family))
    with torch.no_grad():
        apart = answers(model.eval(), batch_of(family))[1]
        merge(model)
        together = answers(model, batch_of(family))[1]
    for name, value in apart.items():
        assert torch.allclose(together[name], value, rtol=1e-4, atol=1e-4)
    assert adapted_weights(model) == []
    assert find_layer_groups(model) == groups
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.partition(".")[0] for name in moved} == {f"{tower}_model"}


def test_the_note_on_what_is_adapted_counts_what_is_left_of_it() -> None:
    _, made = adapted("clip", "text")
    [note] = made.notes
    assert f"({len(made.layers)})" in note
    assert "that the other options leave" in note


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    pair_models.save(pair_models.clip(), folder / "clip")
    pair_models.write_pairs(folder / "pairs")
    return folder


def config_of(folder: Path, place: Path, cache: str, **lora: Any) -> Path:
    folder.mkdir(parents=True)
    data = {"path": str(place / "pairs"), "validation": "validation"}
    return pair_models.write_config(
        folder / "c.yaml",
        place / "clip",
        place / "pairs",
        data=data,
        strategy={"name": "lora", "r": 2, "epochs": 2, **lora},
        feature_cache=cache,
    )


@pytest.mark.slow
def test_a_run_that_adapts_texts_stores_images_and_leaves_an_adapter_that_peft_loads(
    tmp_path: Path, place: Path
) -> None:
    text = {"exclude_modules": r"vision_model\..*", "learning_rate": 1e-2}
    for name, cache in (("stored", "on"), ("computed", "off")):
        hfft.train(config_of(tmp_path / name, place, cache, **text))
    one, other = (tmp_path / name / "run" for name in ("stored", "computed"))
    assert (stored(one), stored(other)) == ([True], [False])
    loss, weight = furthest(one, other)
    assert loss < 1e-4
    assert weight < 1e-3  # Adam makes steps of rounding
    assert metrics(one)["eval"] == pytest.approx(metrics(other)["eval"], abs=1e-3)
    given, found = hf.CLIPModel.from_pretrained(place / "clip"), weights(one)
    moved = {name for name, p in given.state_dict().items() if not torch.equal(found[name], p)}
    assert {name.partition(".")[0] for name in moved} == {
        *("text_model", "text_projection", "visual_projection", "logit_scale")
    }
    apart: Any = PeftModel.from_pretrained(given, one / "adapter").eval()
    whole = hf.CLIPModel.from_pretrained(one / "model").eval()
    batch = {
        "pixel_values": torch.rand(3, 3, pair_models.SIDE, pair_models.SIDE),
        "input_ids": torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0], [2, 4, 12, 3]]),
    }
    with torch.no_grad():
        answered, expected = (model(**batch).logits_per_image for model in (apart, whole))
    assert torch.allclose(answered, expected, rtol=1e-4)


def test_a_tower_that_is_not_there_is_said_before_training(tmp_path: Path, place: Path) -> None:
    config = config_of(tmp_path / "run", place, "off", target_modules=r"audio_model\..*")
    with pytest.raises(InputError, match=r"audio_model.*matches no layer that can be adapted"):
        make_plan(load_config(config))
