"""What the model of a config may be: one that is whole, or two towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hfft.config import Config
from hfft.config_file import dump_config, load_config
from hfft.errors import InputError

TOWERS = {"image": "i", "text": "t"}


def load(folder: Path, model: Any) -> Config:
    path = folder / "run.yaml"
    values = {"task": "image-classification", "model": model, "data": {"path": "d"}}
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


def test_a_name_stands_for_a_model_and_for_a_tower(tmp_path: Path) -> None:
    whole = load(tmp_path, "m").model
    assert (whole.names, whole.towers, whole.place) == (["m"], None, "model")
    assert whole.tower("text") is whole
    model = load(tmp_path, {"towers": TOWERS}).model
    assert model.names == ["i", "t"]
    text = model.tower("text")
    assert (text.name, text.place, text.towers) == ("t", "model.towers.text", None)


def test_fields_of_a_tower_are_its_own(tmp_path: Path) -> None:
    text = {"name": "t", "revision": "r", "allow_pickle": True, "pooling": "cls"}
    model = load(tmp_path, {"towers": {"audio": "a", "text": text}, "projection": 8}).model
    assert model.tower("text").revision == "r"
    assert model.tower("text").allow_pickle
    assert not model.tower("audio").allow_pickle
    assert model.towers is not None
    assert list(model.towers.by_kind) == ["audio", "text"]
    assert model.towers.text.pooling == "cls"


@pytest.mark.parametrize("model", ["m", {"towers": TOWERS}, {"towers": TOWERS, "projection": 8}])
def test_config_that_is_written_down_is_the_same_again(model: Any, tmp_path: Path) -> None:
    config = load(tmp_path, model)
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(path).model == config.model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, "model: give the name of a model, or two towers"),
        ({"towers": {"image": "i"}}, "model.towers.text: is missing"),
        ({"towers": {"text": "t"}}, "model.towers: give image or audio beside text, one of them"),
        (
            {"towers": {"image": "i", "audio": "a", "text": "t"}},
            "model.towers: give image or audio beside text, one of them",
        ),
        (
            {"name": "m", "towers": TOWERS},
            "model: name and towers both say what the model is; keep one of them",
        ),
        ({"name": "m", "projection": 8}, "model: projection goes with towers; a model has its own"),
        ({"towers": TOWERS, "projection": 0}, "model.projection: "),
        (
            {"towers": TOWERS, "trust_remote_code": True},
            "model: trust_remote_code doesn't go with towers, which can't take code along",
        ),
        (
            {"towers": TOWERS, "revision": "r"},
            "model: revision doesn't go with towers; give it to one of them",
        ),
        ({"towers": {"imgae": "i", "text": "t"}}, "model.towers.imgae: unknown key; did you mean"),
        ({"towers": {"image": {"pooling": "cls"}, "text": "t"}}, "model.towers.image.name: "),
        ({"towers": {"image": "i", "text": {"name": "t", "pooling": "avg"}}}, "text.pooling: "),
    ],
)
def test_model_that_is_no_one_thing_is_refused(model: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, model)
    assert [m for m in caught.value.messages if said in m], caught.value.messages
