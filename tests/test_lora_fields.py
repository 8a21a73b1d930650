"""The options of lora are peft's own, and what is wrong with them is said before any weight."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hfft.config import Stage, StrategyConfig
from hfft.config_file import dump_config, json_schema
from hfft.lora_fields import NARROWER, SET_ELSEWHERE, UNSUPPORTED, check_lora
from hfft.strategies import expand

from .test_config import complaints, load
from .test_strategies import FOUR, STRATEGY


def expanded(**options: Any) -> list[Stage]:
    strategy: StrategyConfig = STRATEGY.validate_python({"name": "lora", **options})
    return expand(strategy, FOUR, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_alfa": 8}, "lora_alfa: unknown key; did you mean 'lora_alpha'?"),
        ({"epoch": 3}, "epoch: unknown key; did you mean 'epochs'?"),
        ({"r": "8"}, "r: Input should be a valid integer, found '8'"),
        ({"r": 0}, "r: Input should be greater than 0, found 0"),
        ({"lora_dropout": 1.0}, "lora_dropout: Input should be less than 1, found 1.0"),
        ({"target_modules": []}, "target_modules: Input should be a valid string, found []"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: Input should be greater than 0, found "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: Input should be 'gaussian' or "),
        ({"task_type": "SEQ_CLS"}, "task_type: is set by task; remove it here"),
        ({"modules_to_save": ["fc"]}, "modules_to_save: is set by the head, which always learns"),
        ({"base_model_name_or_path": "x"}, "base_model_name_or_path: is set by model; remove"),
        ({"inference_mode": True}, "inference_mode: is set by the run, which trains"),
        ({"loftq_config": {}}, "loftq_config: is not supported: it is for quantized weights"),
        ({"layers_pattern": ["h"]}, "When `layers_pattern` is specified"),
    ],
)
def test_wrong_options_are_named_with_their_place(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    [told] = complaints(tmp_path, strategy={"name": "lora", **options})
    assert told.startswith(("strategy." + said, "strategy: " + said))
    if "epoch" not in options:
        stage = {"name": "a", "freeze": "backbone", "lora": options}
        [told] = complaints(tmp_path, stages=[stage])
        assert told.startswith(("stages.0.lora." + said, "stages.0.lora: " + said))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    wrong = {"name": "lora", "r": "8", "alpha": 3, "task_type": "x", "lr_scheduler_type": "x"}
    assert len(complaints(tmp_path, strategy=wrong)) == 4


def test_merge_is_a_switch(tmp_path: Path) -> None:
    [told] = complaints(tmp_path, strategy={"name": "lora", "merge": "yes"})
    assert told.startswith("strategy.merge: ")
    stage = {"name": "a", "freeze": "backbone", "lora": {"merge": "yes"}}
    [told] = complaints(tmp_path, stages=[stage])
    assert told.startswith("stages.0.lora.merge: ")


@pytest.mark.parametrize("freeze", ["none", 2, ["*.bias"]])
def test_an_adapter_learns_in_place_of_the_backbone(freeze: Any, tmp_path: Path) -> None:
    [told] = complaints(tmp_path, stages=[{"name": "a", "freeze": freeze, "lora": {}}])
    assert told == ("stages.0: lora goes with freeze: backbone; the adapter learns in its place")


def test_peft_missing_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    [told] = complaints(tmp_path, strategy="lora")
    assert told.startswith("strategy: LoRA needs peft (")
    assert told.endswith("pip install 'hfft[lora]'")


def test_every_field_is_decided_on() -> None:
    import dataclasses

    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert SET_ELSEWHERE.keys() | UNSUPPORTED.keys() <= fields
    assert NARROWER.keys() <= fields | {"merge"}
    plain = fields - SET_ELSEWHERE.keys() - UNSUPPORTED.keys()
    assert plain == {
        *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias"),
        *("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    }
    defaults = LoraConfig()
    given = {name: value for name in plain if (value := getattr(defaults, name)) is not None}
    assert check_lora("strategy", given) == []


def test_lora_expands_to_one_stage_of_adapter_and_head() -> None:
    [stage] = expanded(r=4, target_modules=["q"], epochs=2, learning_rate=0.1, layer_decay=0.9)
    assert (stage.name, stage.freeze) == ("lora", "backbone")
    assert stage.lora == {"r": 4, "target_modules": ["q"]}
    assert (stage.epochs, stage.learning_rate, stage.layer_decay) == (2, 0.1, 0.9)
    assert expanded()[0].lora == {}
    assert expanded(merge=True)[0].lora == {"merge": True}


def test_config_with_lora_survives_dumping_and_loading(tmp_path: Path) -> None:
    config = load(tmp_path, strategy={"name": "lora", "r": 4, "merge": True, "epochs": 1})
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert "r: 4" in path.read_text()
    assert load(tmp_path, stages=[expanded(r=4)[0].model_dump(exclude_none=True)]).stages
    schema = json_schema()
    assert schema["$defs"]["Lora"]["additionalProperties"] is True
