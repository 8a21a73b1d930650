"""What prepares pairs: a tokenizer, and what prepares the inputs of the other tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PROCESSOR_MAPPING, PretrainedConfig, VisionTextDualEncoderProcessor

from hfft.models.dual_encoder import DualEncoderConfig


@dataclass(frozen=True)
class PairProcessor:
    """Two processors of one model, saved in one folder, where transformers finds them.

    Its pipelines load either by itself, `AutoProcessor` both at once.

    Attributes:
        other: of images, or of sounds.
        tokenizer: of texts.
        whole: transformers' own processor of both; None: it has none for the model.
    """

    other: Any
    tokenizer: Any
    whole: Any = None

    @classmethod
    def of(cls, config: PretrainedConfig, other: Any, tokenizer: Any) -> PairProcessor:
        """Return the processor of a model, whose config it is, of its two parts."""
        kind = _whole(config)
        parts: list[str] = [] if kind is None else kind.get_attributes()
        if kind is None or len(parts) != 2 or "tokenizer" not in parts:
            return cls(other, tokenizer)
        whole = kind(**(dict.fromkeys(parts, other) | {"tokenizer": tokenizer}))
        return cls(other, tokenizer, whole)

    def to_dict(self) -> dict[str, Any]:
        """Return how inputs other than texts are prepared."""
        found: dict[str, Any] = self.other.to_dict()
        return found

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer as the tokenizers library has it; None: it is another's."""
        return getattr(self.tokenizer, "backend_tokenizer", None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` of either, and of both, reads."""
        if self.whole is not None:
            self.whole.save_pretrained(folder)
        self.other.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _whole(config: PretrainedConfig) -> Any:
    """Return transformers' class for the processor of a model; None: it has none."""
    if isinstance(config, DualEncoderConfig):
        return VisionTextDualEncoderProcessor if config.vision_config is not None else None
    return PROCESSOR_MAPPING.get(type(config), None)
