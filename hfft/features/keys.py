"""What the rows of an entry depend on, as a digest: rows are shared by whoever needs the same."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xxhash import xxh3_128_hexdigest

_VERSION = 1
_LIBRARIES = ("hfft", "torch", "torchvision", "transformers", "timm", "pillow")
_OF_TOKENIZERS = (
    "chat_template",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "special_tokens_map",
    "truncation_side",
)
# A model's config says these of its head and of where it came from, not of what lies below.
_NOT_BELOW = {
    "id2label",
    "label2id",
    "label_names",
    "num_classes",
    "problem_type",
    "use_cache",
    "architectures",
    "transformers_version",
    "_name_or_path",
}


def digest(parts: Mapping[str, Any]) -> str:
    """Return a hexadecimal digest of values that JSON or `str` can write."""
    text = json.dumps({"version": _VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def weights_digest(model: nn.Module, names: Iterable[str], known: dict[str, str]) -> str:
    """Digest the named parameters, and the buffers of the modules that they make up.

    Args:
        model: whose they are.
        names: of parameters.
        known: digests of its tensors, by name; missing ones are added.
    """
    names = frozenset(names)
    found: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {prefix + n: p for n, p in module.named_parameters(recurse=False)}
        below = {name: p for name, p in own.items() if name in names}
        if len(below) == len(own):  # BatchNorm's statistics
            below |= {prefix + n: b for n, b in module.named_buffers(recurse=False)}
        for name, tensor in below.items():
            if name not in known:
                kind = f"{tensor.dtype} {tuple(tensor.shape)} "
                known[name] = kind + xxh3_128_hexdigest(_bytes(tensor))
            found.append((name, known[name]))
    return xxh3_128_hexdigest(repr(sorted(found)).encode())


def processor_identity(processor: Any) -> list[Any]:
    """Return what decides how a processor, or a tokenizer, prepares inputs."""
    found: list[Any] = [type(processor).__name__]
    parts = [processor, *(getattr(processor, name, None) for name in ("tokenizer",))]
    for part in parts:
        if hasattr(part, "to_dict"):
            found.append(part.to_dict())
        if hasattr(part, "backend_tokenizer"):
            found.append(part.backend_tokenizer.to_str())
        elif hasattr(part, "get_vocab"):
            found.append(sorted(part.get_vocab().items()))
        found.append([repr(getattr(part, name, None)) for name in _OF_TOKENIZERS])
    return found


def model_identity(model: Any) -> dict[str, Any]:
    """Return which code computes, and how exactly."""
    backends: Any = torch.backends  # whose stubs lack these
    code = type(model).__module__
    remote = Path(inspect.getfile(type(model))) if code.startswith("transformers_modules") else None
    return {
        "model": type(model).__name__,
        "code": None if remote is None else remote.read_text(encoding="utf-8"),
        "config": model_config(model.config),
        "versions": {name: version(name) for name in _LIBRARIES},
        "device": [model.device.type, *_device_names(model.device)],
        "products": [
            backends.fp32_precision,
            backends.cuda.matmul.fp32_precision,
            backends.cudnn.conv.fp32_precision,
        ],
    }


def _device_names(device: torch.device) -> list[str]:
    return [torch.cuda.get_device_name(device)] if device.type == "cuda" else []


def inputs_digest(examples: Iterable[Mapping[str, Any]]) -> str:
    """Digest examples as the model is given them, which shows changes in what prepared them."""
    found = [
        (name, xxh3_128_hexdigest(_bytes(value)) if isinstance(value, Tensor) else repr(value))
        for example in examples
        for name, value in sorted(example.items())
    ]
    return xxh3_128_hexdigest(repr(found).encode())


def model_config(config: Any) -> dict[str, Any]:
    """Return what a model's config says of its layers."""
    found = {name: value for name, value in config.to_dict().items() if name not in _NOT_BELOW}
    return found | {"attention": getattr(config, "_attn_implementation", None)}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
