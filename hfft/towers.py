"""Two pretrained models as the towers of one: their configs, their weights, how each pools."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast, get_args

import torch
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from hfft.errors import InputError
from hfft.model_files import (
    lacking,
    misfits,
    pretrained,
    read_config,
    refuse,
    stored_shape,
    stored_shapes,
    told_missing,
)
from hfft.models.dual_encoder import PROJECTIONS, DualEncoderConfig, DualEncoderModel
from hfft.models.pooling import without_pooler
from hfft.models.tower import TowerPooling, make_tower, tower_of
from hfft.sections import ModelConfig, TowerKind
from hfft.text.pooling import own_pooling, pretrained_pooling

_NAMES: dict[TowerKind, str] = {"image": "vision", "audio": "audio", "text": "text"}
_INPUTS: dict[TowerKind, tuple[str, ...]] = {
    "image": ("pixel_values",),
    "audio": ("input_values", "input_features"),
    "text": ("input_ids",),
}
_CHANCE = ("mask_time_prob", "mask_feature_prob", "layerdrop", "encoder_layerdrop")
"""What audio models leave out at random. A step that is made twice, as gradient caching does, would
leave out other parts, and DDP waits for the gradients of what was left out."""


def read(source: ModelConfig) -> DualEncoderConfig:
    """Return the config of a model of both towers, from their own.

    Raises:
        InputError: one of them can't be read, is no tower of its kind, or doesn't pool as asked.
    """
    found: dict[str, Any] = {}
    attention: dict[str, Any] = {}
    problems: list[str] = []
    for kind, name in _kinds(source):
        try:
            config = _read_tower(source.tower(kind), kind)
            found[f"{name}_pooling"] = _pooling(source, kind, config)
            found[f"{name}_config"] = config
            attention[f"{name}_config"] = config._attn_implementation
        except InputError as error:
            problems += error.messages
    if problems:
        raise InputError(problems)
    if source.projection is not None:
        found["projection_dim"] = source.projection
    # left out, transformers would forget what was asked for a tower
    both = DualEncoderConfig(**found, attn_implementation=attention, dtype=torch.float32)
    both.name_or_path = source.name
    return both


def check_shapes(source: ModelConfig, model: PreTrainedModel) -> None:
    """Compare the weights of local towers with the model they are for, without loading them.

    Raises:
        InputError: some have other shapes than the model's.
    """
    for kind, name in _kinds(source):
        one = source.tower(kind)
        refuse(one, misfits(one, _tower(model, name)))


def not_in_source(source: ModelConfig, model: PreTrainedModel) -> frozenset[str]:
    """Return the parameters of the towers that a local source of theirs lacks."""
    found = set[str]()
    for kind, name in _kinds(source):
        tower = _tower(model, name)
        body = {own for own, _ in tower.named_parameters()}
        found |= {f"{name}_model.{own}" for own in lacking(source.tower(kind), tower, body)}
    return frozenset(found)


def load(source: ModelConfig, config: PretrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """Load both towers; what joins them is drawn from torch's global generator.

    Returns:
        The model, float32, and plain sentences on what is new in it.

    Raises:
        InputError: weights can't be read, or don't fit.
    """
    both = cast(DualEncoderConfig, config)
    towers: dict[str, PreTrainedModel] = {}
    notes = ["the projections are new: the two towers have not met"]
    for kind, name in _kinds(source):
        towers[name], told = _load_tower(source.tower(kind), both, name)
        notes += told
    model = DualEncoderModel(both, towers)
    cast(Any, model).eval()
    return model, notes


def _kinds(source: ModelConfig) -> Iterator[tuple[TowerKind, str]]:
    """Yield what each tower reads, and the name that the model has for it."""
    if source.towers is not None:
        for kind in source.towers.by_kind:
            yield kind, _NAMES[kind]


def _tower(model: PreTrainedModel, name: str) -> Any:
    return model.get_submodule(f"{name}_model")


def _read_tower(source: ModelConfig, kind: TowerKind) -> PretrainedConfig:
    """Return a tower's config: the model's own, or the part of it that is of this kind."""
    whole = read_config(source)
    config = getattr(whole, f"{_NAMES[kind]}_config", None) or whole
    config.name_or_path = ""  # it would be saved inside the model's config
    config.dtype = torch.float32
    if getattr(config, "use_cache", False):
        config.use_cache = False  # keys and values are of use for generation only
    for field in _CHANCE:
        if getattr(config, field, None):
            setattr(config, field, 0.0)
    model = _class_of(config)
    if model is None:
        raise InputError(
            f"{source.place}: {source.name}: transformers has no bare model of its kind, "
            f"{config.model_type}; take another one"
        )
    if model.main_input_name not in _INPUTS[kind]:
        raise InputError(
            f"{source.place}: {source.name} is a {model.__name__}, which reads "
            f"{model.main_input_name}; a tower of this kind reads {' or '.join(_INPUTS[kind])}"
        )
    return cast(PretrainedConfig, config)


def _class_of(config: PretrainedConfig) -> Any:
    """Return the class that transformers has for a bare model of this config; None: it has none."""
    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _pooling(source: ModelConfig, kind: TowerKind, config: PretrainedConfig) -> TowerPooling:
    """Return how a tower pools: as asked, or as it was pretrained.

    Raises:
        InputError: it can't pool as asked.
    """
    assert source.towers is not None
    asked, one, model = source.towers.by_kind[kind].pooling, source.tower(kind), _class_of(config)
    place = f"{one.place}.pooling: {asked}: {one.name} is a {model.__name__}"
    pools, optional = _pools_itself(model), bool(without_pooler(config))
    decoder = kind == "text" and own_pooling(config) == "last"
    if pools and not optional:  # with weights that get no gradient where the output isn't used
        if asked not in ("auto", "pooler"):
            raise InputError(f"{place}, which pools in its own way; leave it at auto")
        return "pooler"
    if asked == "pooler" and not pools:
        other = "last" if decoder else "cls"
        raise InputError(f"{place}, which returns no pooled output; take mean, or {other}")
    if asked == "cls" and decoder:
        raise InputError(
            f"{place}, a decoder, whose first token sees nothing of the text; take last, or mean"
        )
    if asked != "auto":
        return asked
    if kind == "text":  # BERT's pooler was trained to tell whether sentences follow one another
        found = pretrained_pooling(one.name, one.revision)
        return cast(Any, found) or ("last" if decoder else "mean")
    if not pools:
        return "mean"
    return "pooler" if _has_pooler(one, config) else "cls"  # which a pooler would read


def _pools_itself(model: Any) -> bool:
    """Whether a class of transformers says that it returns a pooled output."""
    returned = inspect.signature(model.forward).return_annotation
    kinds = get_args(returned) or (returned,)
    return any("pooler_output" in getattr(one, "__dataclass_fields__", {}) for one in kinds)


def _has_pooler(source: ModelConfig, config: PretrainedConfig) -> bool:
    """Whether the source has weights for its pooler; a classifier of images comes without.

    Of a Hub id this goes by the class that it was saved from.
    """
    with torch.device("meta"):
        tower = make_tower(config, "pooler")
    names = [name for name, _ in tower.named_parameters() if name.startswith("pooler.")]
    if not (stored := stored_shapes(source)):
        return not names or type(tower).__name__ in (config.architectures or [])
    return all(stored_shape(name, stored, tower) is not None for name in names)


def _load_tower(source: ModelConfig, both: DualEncoderConfig, name: str) -> tuple[Any, list[str]]:
    """Load a tower; say what in it the source lacks, and what of the source has no use."""
    config = both.tower(name)
    options = {} if both.pooling(name) == "pooler" else without_pooler(config)
    model, info = pretrained(AutoModel, source, config, **options)
    tower = tower_of(model)
    prefix = next(f"{path}." if path else "" for path, m in model.named_modules() if m is tower)
    refuse(source, {item[0]: item[1:] for item in info["mismatched_keys"]})
    body = {key for key, _ in tower.named_parameters()}
    missing = {key.removeprefix(prefix) for key in info["missing_keys"] if key.startswith(prefix)}
    notes = told_missing(source, tower, body, missing.intersection(tower.state_dict()))
    if f"{PROJECTIONS[name]}.weight" in info["unexpected_keys"]:
        notes.append(f"{source.place}: {source.name} has a {PROJECTIONS[name]}, which is left out")
    return tower, notes
