"""The source model: its config, its weights, and everything that can be wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hfft.complaints import nearest
from hfft.config import ModelConfig
from hfft.errors import InputError
from hfft.layers import find_layer_groups

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class LoadedModel:
    """A model with the source's weights.

    Attributes:
        model: float32, its new head initialised from torch's global generator.
        notes: plain sentences on what the source did not bring.
    """

    model: PreTrainedModel
    notes: list[str]


def read_model_config(source: ModelConfig) -> PretrainedConfig:
    """Read the source's config without its weights.

    Raises:
        InputError: the folder is no model, its weights are pickled, its code is remote, or the
            Hub can't be reached.
    """
    if Path(source.name).exists():
        _check_folder(source)
    elif _looks_like_path(source.name):
        raise InputError(f"model: there is no folder {source.name}{_neighbours(source.name)}")
    config: PretrainedConfig = _explained(
        source,
        lambda: AutoConfig.from_pretrained(
            source.name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        ),
    )
    config.dtype = torch.float32  # of the weights that train; mixed precision is training.bf16
    return config


def skeleton(auto_model: Any, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model on torch's meta device: every name and shape, no memory.

    Raises:
        InputError: the architecture has no such head.
    """
    with torch.device("meta"):
        return initialise(auto_model, config)


def initialise(auto_model: Any, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model with fresh weights, from torch's global generator."""
    try:
        model: PreTrainedModel = auto_model.from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"model: {config.name_or_path or type(config).__name__} can't be built as "
            f"{auto_model.__name__}: {_first_line(error)}"
        ) from error
    return model


def load_weights(auto_model: Any, source: ModelConfig, config: PretrainedConfig) -> LoadedModel:
    """Load the source's weights into the model that `config` describes.

    Raises:
        InputError: the weights can't be read, or don't fit below the head.
    """
    model, info = _explained(
        source,
        lambda: auto_model.from_pretrained(
            source.name,
            config=config,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=None if source.allow_pickle else True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        ),
    )
    head = set(find_layer_groups(model).head.parameters)
    other_sizes = {item[0]: item[1:] for item in info["mismatched_keys"]}
    if misfits := {name: sizes for name, sizes in other_sizes.items() if name not in head}:
        name, (stored, wanted) = next(iter(misfits.items()))
        raise InputError(
            f"model: {source.name}: {len(misfits)} weights below the head have other sizes than "
            f"the model asked for, first {name}: {tuple(stored)} stored, {tuple(wanted)} wanted; "
            f"was the image size or another part of the architecture changed?"
        )
    notes = []
    if sizes := next(iter(other_sizes.values()), None):
        notes.append(
            f"the head is new: the source's has {sizes[0][0]} outputs, the task {sizes[1][0]}"
        )
    elif head & set(info["missing_keys"]):
        notes.append("the head is new: the source has none for this task")
    if missing := sorted(set(info["missing_keys"]) - head):
        notes.append(
            f"{len(missing)} weights below the head are not in the source and start afresh: "
            f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
        )
    return LoadedModel(model, notes)


def _check_folder(source: ModelConfig) -> None:
    folder = Path(source.name)
    if not folder.is_dir():
        raise InputError(f"model: {folder} is a file; give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        inner = folder / "model" / "config.json"
        hint = f"; did you mean {inner.parent}?" if inner.is_file() else ""
        raise InputError(f"model: {folder} is no model folder: it has no config.json{hint}")
    if any(folder.glob("*.safetensors")) or source.allow_pickle:
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"model: {folder} holds pickled weights only ({pickled[0]}), and loading them can run "
            f"code; convert them to safetensors, or set model.allow_pickle: true if you trust them"
        )
    raise InputError(f"model: {folder} holds no weights (*.safetensors)")


def _explained(source: ModelConfig, load: Callable[[], Any]) -> Any:
    """Call `load`; turn what the libraries raise into one message that names the remedy."""
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            remedy = (
                "needs Python code from its own repository, which is off unless you set "
                "model.trust_remote_code: true"
            )
        elif "safetensors" in text and not source.allow_pickle:
            remedy = (
                "has no safetensors weights; pickled ones load with model.allow_pickle: true, "
                "if you trust them"
            )
        elif not Path(source.name).exists():
            remedy = (
                f"is no local folder and can't be had from the Hub ({_first_line(error)}); give a "
                f"local folder, check the name, or the network and HF_TOKEN for a gated model"
            )
        else:
            remedy = f"can't be loaded: {_first_line(error)}"
        raise InputError(f"model: {source.name} {remedy}") from error


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).parent.is_dir()


def _neighbours(name: str) -> str:
    parent = Path(name).parent
    return nearest(Path(name).name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
