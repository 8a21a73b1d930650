"""The options of `lora`, checked against peft.LoraConfig before any is made."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError

from hfft.complaints import nearest

MERGE = "merge"  # ours, and the only key of a stage's `lora` that is not peft's

# Fields of LoraConfig that another part of the config already decides.
SET_ELSEWHERE = {
    "task_type": "task",
    "base_model_name_or_path": "model",
    "revision": "model.revision",
    "modules_to_save": "the head, which always learns and is kept with the adapter",
    "inference_mode": "the run, which trains",
    "peft_type": "lora itself",
    "peft_version": "the peft that is installed",
    "auto_mapping": "the model",
}

_OTHER_METHOD = "it makes another method of it than W + s B A"
_CHANGES_WEIGHTS = "it serves initialisations that change the weights the adapter is added to"
_QUANTIZED = "it is for quantized weights"
_MEGATRON = "it is for Megatron's layers"

# Fields of LoraConfig that don't go with a frozen source, plain transformers and merging.
UNSUPPORTED = {
    "loftq_config": _QUANTIZED,
    "use_qalora": _QUANTIZED,
    "qalora_group_size": _QUANTIZED,
    "eva_config": _CHANGES_WEIGHTS,
    "corda_config": _CHANGES_WEIGHTS,
    "lora_ga_config": _CHANGES_WEIGHTS,
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "velora_config": _OTHER_METHOD,
    "alora_invocation_tokens": _OTHER_METHOD,
    "monteclora_config": _OTHER_METHOD,
    "use_bdlora": _OTHER_METHOD,
    "arrow_config": _OTHER_METHOD,
    "kasa_config": _OTHER_METHOD,
    "layer_replication": "it changes the architecture, which from_pretrained then can't load",
    "trainable_token_indices": "only layers are adapted",
    "target_parameters": "only layers are adapted; name them in target_modules",
    "ensure_weight_tying": "weights that two layers share are not adapted",
    "runtime_config": "it is for adapters that are loaded, not trained",
}

# Fields of LoraConfig that it takes more for than works.
NARROWER: dict[str, Any] = {
    "r": PositiveInt,
    "lora_alpha": PositiveInt,
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "init_lora_weights": bool | Literal["gaussian", "orthogonal"],
    "target_modules": Annotated[list[str], Field(min_length=1)] | str,
    "rank_pattern": dict[str, PositiveInt],
    "alpha_pattern": dict[str, PositiveInt],
    MERGE: bool,
}


def check_lora(place: str, options: Mapping[str, Any], beside: Collection[str] = ()) -> list[str]:
    """Check names and types against peft.LoraConfig.

    Args:
        place: the options' dotted path in the config.
        options: peft's fields, and `merge`.
        beside: keys that may stand beside them, checked elsewhere; for the nearest right name.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        return [f"{place}: LoRA needs peft ({error}): pip install 'hfft[lora]'"]
    hints = typing.get_type_hints(LoraConfig) | NARROWER
    fields = {field.name for field in dataclasses.fields(LoraConfig)} | {MERGE}
    allowed = fields - SET_ELSEWHERE.keys() - UNSUPPORTED.keys()
    problems = []
    for key, value in options.items():
        if key in SET_ELSEWHERE:
            problems.append(f"{place}.{key}: is set by {SET_ELSEWHERE[key]}; remove it here")
        elif key in UNSUPPORTED:
            problems.append(f"{place}.{key}: is not supported: {UNSUPPORTED[key]}")
        elif key not in allowed:
            problems.append(f"{place}.{key}: unknown key{nearest(str(key), {*allowed, *beside})}")
        else:
            try:
                TypeAdapter(hints[key]).validate_python(value, strict=True)
            except ValidationError as error:
                problems.append(f"{place}.{key}: {error.errors()[-1]['msg']}, found {value!r}")
    if not problems:
        try:
            LoraConfig(**{key: value for key, value in options.items() if key != MERGE})
        except (ValueError, TypeError) as error:
            problems.append(f"{place}: {error}")
    return problems
