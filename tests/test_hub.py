"""What the model card says of where a model comes from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hfft.hub import write_card
from hfft.sections import ModelConfig

METRICS: dict[str, Any] = {"test": None, "eval": {"recall_at_1": 0.5}}
STAGE = {"name": "whole", "steps": 3, "trainable_parameters": 7, "eval": {"recall_at_1": 0.5}}


def card(folder: Path, model: dict[str, Any]) -> Any:
    data = SimpleNamespace(path=str(folder), splits={"train": range(12)})
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(
            model=ModelConfig.model_validate(model), data=data, output_dir=str(folder / "run")
        ),
        task=SimpleNamespace(name="zero-shot-image-classification", metric="recall_at_1"),
        subject=SimpleNamespace(data=data, labels=[]),
        main=SimpleNamespace(stages=[]),
    )
    write_card(folder, plan, {**METRICS, "stages": [STAGE]})
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("model", "base", "said"),
    [
        ({"name": "openai/clip"}, ["openai/clip"], "openai/clip, fine-tuned"),
        (
            {"towers": {"image": "timm/vit", "text": "google/bert"}},
            ["timm/vit", "google/bert"],
            "timm/vit + google/bert, fine-tuned",
        ),
        (
            {"towers": {"image": "{folder}/tower", "text": "google/bert"}},
            ["google/bert"],
            "tower + google/bert, fine-tuned",
        ),
        ({"name": "{folder}/tower"}, None, "tower, fine-tuned"),
    ],
)
def test_models_of_the_hub_are_named_and_local_folders_are_not(
    model: dict[str, Any], base: list[str] | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "tower").mkdir()
    found = card(tmp_path, json.loads(json.dumps(model).replace("{folder}", str(tmp_path))))
    named = found.data.to_dict().get("base_model")
    assert ([named] if isinstance(named, str) else named) == base
    assert f"\n{said} for zero-shot-image-classification" in found.content
    assert str(tmp_path) not in found.content
