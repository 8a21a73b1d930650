"""What the rows of an entry depend on, as a digest: rows are shared by whoever needs the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_VERSION = 1
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


def weights_digest(model: nn.Module, names: Iterable[str]) -> str:
    """Digest the named parameters, and the buffers of the modules that they make up."""
    names = frozenset(names)
    found = hashlib.blake2b(digest_size=20)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {prefix + n: p for n, p in module.named_parameters(recurse=False)}
        below = {name: p for name, p in own.items() if name in names}
        if len(below) == len(own):  # BatchNorm's statistics
            below |= {prefix + n: b for n, b in module.named_buffers(recurse=False)}
        for name, tensor in sorted(below.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    return found.hexdigest()


def inputs_digest(examples: Iterable[Mapping[str, Any]]) -> str:
    """Digest examples as the model is given them, which tells all that prepared them apart."""
    found = hashlib.blake2b(digest_size=20)
    for example in examples:
        for name, value in sorted(example.items()):
            found.update(name.encode())
            found.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()


def model_config(config: Any) -> dict[str, Any]:
    """Return what a model's config says of its layers."""
    found = {name: value for name, value in config.to_dict().items() if name not in _NOT_BELOW}
    return found | {"attention": getattr(config, "_attn_implementation", None)}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
