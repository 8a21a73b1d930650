"""The source model: its config, its weights, and everything that can be wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hfft import towers, zero_shot_head
from hfft.errors import InputError
from hfft.layers import find_layer_groups
from hfft.model_files import (
    first_line,
    lacking,
    misfits,
    pretrained,
    read_config,
    refuse,
    stored_shape,
    stored_shapes,
    told_missing,
)
from hfft.models import pooled  # noqa: F401 (registers its model with transformers)
from hfft.models.dual_encoder import DualEncoderConfig
from hfft.sections import ModelConfig


@dataclass(frozen=True)
class LoadedModel:
    """A model with the source's weights.

    Attributes:
        model: float32, its new head initialised from torch's global generator.
        notes: plain sentences on what the source did not bring.
        new_head: whether the source brought no head that fits.
    """

    model: PreTrainedModel
    notes: list[str]
    new_head: bool


def read_model_config(source: ModelConfig) -> PretrainedConfig:
    """Read the source's config, or that of two towers, without weights.

    Raises:
        InputError: the folder is no model, its weights are pickled, its code is remote, or the
            Hub can't be reached; two towers can't be put together.
    """
    return read_config(source) if source.towers is None else towers.read(source)


def skeleton(
    auto_model: Any, config: PretrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model on torch's meta device: every name and shape, no memory.

    Raises:
        InputError: the architecture has no such head.
    """
    with torch.device("meta"):
        return initialise(auto_model, config, trust_remote_code)


def initialise(
    auto_model: Any, config: PretrainedConfig, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model with fresh weights, from torch's global generator."""
    try:
        # left out, transformers would ask on stdin whether the code may run
        model: PreTrainedModel = auto_model.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        cause = first_line(error)
        if cause.startswith("Unrecognized configuration class"):
            cause = f"transformers has none of its kind, {config.model_type}; take another model"
            if isinstance(config, DualEncoderConfig):
                cause = (
                    "it is of two towers, which go with tasks that contrast pairs; take one model"
                )
        raise InputError(
            f"model: {config.name_or_path or type(config).__name__} can't be built as "
            f"{auto_model.__name__}: {cause}"
        ) from error
    return model


def check_shapes(source: ModelConfig, model: PreTrainedModel) -> None:
    """Compare a local source's weights with the model they are for, without loading them.

    Raises:
        InputError: weights below the head have other shapes than the model's, or the projections
            of its towers have different lengths, or there is no text tower to make a head of.
    """
    if zero_shot_head.is_made(source, model.config):
        zero_shot_head.check(source, model.config)
    elif source.towers is not None:
        towers.check_shapes(source, model)
        return
    groups = find_layer_groups(model)
    if len(groups.towers) == 1:
        refuse(source, misfits(source, model, groups.head.parameters))
        return
    stored = stored_shapes(source)
    names = [name for name in groups.head.parameters if name.endswith("projection.weight")]
    shapes = {name: stored_shape(name, stored, model) for name in names}
    lengths = {name: shape[0] for name, shape in shapes.items() if shape is not None}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} to {length}" for name, length in lengths.items())
        raise InputError(
            f"model: {source.name}: its towers' projections map to vectors of different lengths "
            f"({told}), which can't be compared; take a model whose towers were trained together"
        )
    refuse(source, misfits(source, model))  # the projections are no head for classes


def head_is_new(source: ModelConfig, model: PreTrainedModel, head: Iterable[str]) -> bool:
    """Say whether `load_weights` will find no head for the model's classes in the source.

    One that the source's text tower makes is found there.

    Known for certain once the weights are loaded; for a Hub id this goes by what the source's
    config says.
    """
    if zero_shot_head.is_made(source, model.config):
        return False
    if source.towers is not None:
        return True
    own = read_model_config(source)
    if own.id2label != model.config.id2label:
        return True
    if not Path(source.name).exists():
        return type(model).__name__ not in (own.architectures or [])
    stored, shapes = stored_shapes(source), dict(model.named_parameters())
    return any(stored_shape(name, stored, model) != list(shapes[name].shape) for name in head)


def not_in_source(
    source: ModelConfig, model: PreTrainedModel, head: Iterable[str]
) -> frozenset[str]:
    """Return the parameters below the head that a local source lacks.

    None where that can't be known: of a Hub id, and where most names are changed on loading.
    """
    if source.towers is not None:
        return towers.not_in_source(source, model)
    return lacking(source, model, {n for n, _ in model.named_parameters()} - set(head))


def load_weights(auto_model: Any, source: ModelConfig, config: PretrainedConfig) -> LoadedModel:
    """Load the source's weights into the model that `config` describes.

    The source's head is kept where its classes are those of `config`, name by name.

    Raises:
        InputError: the weights can't be read, or don't fit below the head.
    """
    if zero_shot_head.is_made(source, config):
        return LoadedModel(*zero_shot_head.load(source, config), new_head=False)
    if source.towers is not None:
        return LoadedModel(*towers.load(source, config), new_head=True)
    model, info = pretrained(auto_model, source, config)
    head = set(find_layer_groups(model).head.parameters)
    other_sizes = {item[0]: item[1:] for item in info["mismatched_keys"]}
    refuse(source, {name: sizes for name, sizes in other_sizes.items() if name not in head})
    own = read_model_config(source)
    new_head = bool(other_sizes or head & set(info["missing_keys"]))
    notes = []
    if sizes := next(iter(other_sizes.values()), None):
        notes.append(
            f"the head is new: the source's has {sizes[0][0]} outputs, the task {sizes[1][0]}"
        )
    elif new_head:
        missing = sorted(head.intersection(info["missing_keys"]))
        whole = "the head is new: the source has none for this task"
        part = f"the source lacks part of the head, which is new: {', '.join(missing)}"
        notes.append(whole if len(missing) == len(head) else part)
    elif head and own.id2label != config.id2label:
        _initialise_anew(model, head)
        new_head = True
        notes.append("the head is new: the source's classes are others")
    elif head and config.id2label != {n: f"LABEL_{n}" for n in config.id2label or {}}:
        notes.append("the head is the source's own: its classes are the same")
    body = {name for name, _ in model.named_parameters()} - head
    notes += told_missing(source, model, body, set(info["missing_keys"]) - head)
    return LoadedModel(model, notes, new_head)


def hand_on(source: ModelConfig, old: PreTrainedModel, new: PreTrainedModel) -> frozenset[str]:
    """Copy what two models have in common: all weights, or those below the head.

    A head that is made by the text tower is made anew by the old model's, where it has one.

    Args:
        source: that both were loaded from.
        old: one model.
        new: the other, for the same task or another.

    Returns:
        The names of the parameters in `new` that were copied.

    Raises:
        InputError: they have no body in common.
    """
    carried = carry_all(old, new) or carry_body(old, new)
    if zero_shot_head.is_made(source, new.config) and hasattr(old, "get_text_features"):
        zero_shot_head.make_head(source, old, new)
    return carried


def carry_all(old: PreTrainedModel, new: PreTrainedModel) -> frozenset[str]:
    """Copy all weights into a model with the same head, of the same classes.

    Returns:
        The names of its parameters; none where the heads differ.
    """
    theirs, own = old.state_dict(), new.state_dict()
    alike = type(old) is type(new) and old.config.id2label == new.config.id2label
    if not alike or {n: t.shape for n, t in theirs.items()} != {n: t.shape for n, t in own.items()}:
        return frozenset()
    new.load_state_dict(theirs)
    return frozenset(name for name, _ in new.named_parameters())


def carry_body(old: PreTrainedModel, new: PreTrainedModel) -> frozenset[str]:
    """Copy all weights below the head from a model into one with another head.

    Returns:
        The names of the parameters in `new` that were copied.

    Raises:
        InputError: less than half of the smaller body is the same.
    """
    try:
        common = body_in_common(old, new)
    except InputError as error:
        raise InputError(f"stages: {error}, so their tasks can't follow one another") from error
    body = new.base_model
    prefix = next(f"{path}." if path else "" for path, m in new.named_modules() if m is body)
    theirs, own = (model.base_model.state_dict(keep_vars=True) for model in (old, new))
    with torch.no_grad():
        for name in common:
            own[name].copy_(theirs[name])
    return frozenset(prefix + name for name, _ in body.named_parameters() if name in common)


def body_in_common(old: PreTrainedModel, new: PreTrainedModel) -> frozenset[str]:
    """Return what two models have in common below their heads, by its names in the body.

    Args:
        old: one model; its weights don't matter.
        new: another.

    Raises:
        InputError: it is less than half of the smaller body's parameters.
    """
    theirs, own = (model.base_model.state_dict(keep_vars=True) for model in (old, new))
    common = {name for name, t in own.items() if name in theirs and theirs[name].shape == t.shape}
    sizes = [len(dict(model.base_model.named_parameters())) for model in (old, new)]
    shared = common & {name for name, _ in new.base_model.named_parameters()}
    if len(shared) * 2 < min(sizes):
        raise InputError(f"{type(old).__name__} and {type(new).__name__} have no body in common")
    return frozenset(common)


def _initialise_anew(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Draw parameters again as the model's own code does, from torch's global generator."""
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(path)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            # set on what was loaded; transformers leaves such tensors alone
            tensor._is_hf_initialized = False  # type: ignore[attr-defined]
        with torch.no_grad():
            cast(Any, model)._init_weights(module)
