"""How a text classifier pools: as asked, as the source was pretrained, or as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
)

from hfft.errors import InputError
from hfft.models.pooled import PooledConfig

_SENTENCE_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "lasttoken": "last",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
"""What sentence-transformers calls them, and the keys of its older folders."""


def with_pooling(config: PretrainedConfig, asked: str) -> PretrainedConfig:
    """Return a config whose model pools as asked: the one given, or that of a pooled classifier.

    Args:
        config: the source's; may be changed.
        asked: a pooling, or "auto": as the source was pretrained for sentences, else as
            transformers' own classifier of the model.

    Raises:
        InputError: the model can't be had with that pooling.
    """
    if isinstance(config, PooledConfig):
        if asked != "auto":
            config.pooling = cast(Any, asked)
        return config
    wanted = pretrained_pooling(config.name_or_path or "") if asked == "auto" else asked
    own = own_pooling(config)
    if wanted is None or wanted == own:
        return config
    name = config.name_or_path or config.model_type
    if own == "last" and asked == "cls":
        raise InputError(
            f"task.head.pooling: cls: {name} is a decoder, whose first token sees nothing of the "
            f"text; take last, or mean"
        )
    if getattr(config, "classifier_pooling", None) in ("cls", "mean") and wanted in ("cls", "mean"):
        config.classifier_pooling = wanted  # ModernBERT's classifier has the choice
        return config
    if type(config) in MODEL_MAPPING and not config.is_encoder_decoder:
        return PooledConfig.around(config, cast(Any, wanted))
    if asked == "auto":
        return config
    raise InputError(
        f"task.head.pooling: {asked} is for encoders and decoders that transformers has, which "
        f"{name} is not; leave it at auto"
    )


def own_pooling(config: PretrainedConfig) -> str | None:
    """Return what transformers' own classifier of a model pools; None: it has none, or its own way.

    Those of encoders read the first token, mostly through a pooler, those of decoders the last that
    is no padding.
    """
    kind = type(config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or config.is_encoder_decoder:
        return None
    if kind in MODEL_FOR_MASKED_LM_MAPPING:
        return getattr(config, "classifier_pooling", "cls")
    return "last" if kind in MODEL_FOR_CAUSAL_LM_MAPPING else None


def pretrained_pooling(source: str, revision: str | None = None) -> str | None:
    """Return how sentence-transformers pools a model; None: it is none of its models.

    Nor are those whose way of pooling isn't among ours, or that pool in several.

    Args:
        source: the model's folder, or its name on the Hub; "" for none.
        revision: branch, tag or commit on the Hub.
    """
    if not source:
        return None
    modules = _read_json(source, "modules.json", revision) or []
    paths = [m["path"] for m in modules if str(m.get("type")).endswith(".Pooling")]
    own = _read_json(source, f"{paths[0]}/config.json", revision) if paths else None
    if own is None:
        return None
    older = [key for key, on in own.items() if key.startswith("pooling_mode_") and on is True]
    found = own.get("pooling_mode") or older or "mean"
    modes = [found] if isinstance(found, str) else found
    return _SENTENCE_POOLINGS.get(modes[0]) if len(modes) == 1 else None


def _read_json(source: str, name: str, revision: str | None) -> Any:
    """Return what a file of a model's folder, or of its repository on the Hub, holds, if it can."""
    try:
        folder = Path(source)
        is_local = folder.is_dir()
        path = folder / name if is_local else hf_hub_download(source, name, revision=revision)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError):
        return None
