"""Sounds and texts that belong together: retrieval, and classes by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, PretrainedConfig

from hfft.audio import SHORTEST, given_sounds, open_sound
from hfft.contrastive.given import read_given
from hfft.contrastive_task import ContrastiveOptions, ContrastiveTask
from hfft.registry import register
from hfft.task import Column, InputError, ModelConfig

NAMES = (
    *("audio", "sound", "speech", "recording", "path", "file", "file_name", "filename"),
    *("wav", "flac", "mp3", "ogg"),
)
INPUTS = ("input_values", "input_features", "audio_attention_mask")


class AudioTextOptions(ContrastiveOptions):
    """The task's own keys."""

    max_seconds: float = Field(
        10, ge=SHORTEST, description="of a sound, that are read; longer ones are cut, and counted"
    )


@register("zero-shot-audio-classification")
class ZeroShotAudioClassification(ContrastiveTask):
    """Sounds and texts to embeddings that are alike where they belong together."""

    Options = AudioTextOptions
    model_suffix = "DualEncoderModel"
    other, other_config = "audio", "audio_config"
    template = "the sound of a {}."
    augments_other = False

    def __init__(self, options: BaseModel) -> None:
        self.seconds = cast(AudioTextOptions, options).max_seconds
        self.column = Column("audio", NAMES, seconds=self.seconds)
        super().__init__(options)

    @classmethod
    def takes(cls, config: PretrainedConfig) -> bool:
        """Say whether a finished model is of sounds and texts."""
        return getattr(config, "audio_config", None) is not None and super().takes(config)

    def load_other(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the audio tower's feature extractor."""
        source = source.tower("audio")
        try:
            extractor = cast(Any, AutoFeatureExtractor).from_pretrained(
                source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"{source.place}: {source.name} has no feature extractor "
                f"(preprocessor_config.json): {error}"
            ) from error
        if (most := window(extractor)) is not None and self.seconds > most:
            raise InputError(
                f"task.max_seconds: {self.seconds:g} are more than {source.name} hears; set "
                f"{most:g}, or less"
            )
        return extractor

    def prepare(self, processor: Any, *, training: bool) -> Callable[[Any], dict[str, Any]]:
        """Return sound to samples (T,), or a spectrogram of two axes, and a mask of either."""
        rate: int = processor.sampling_rate

        def prepared(sound: Mapping[str, Any]) -> dict[str, Any]:
            found = processor(
                open_sound(sound, rate, self.seconds),
                sampling_rate=rate,
                return_attention_mask=True,
                return_tensors="pt",
            )
            mask = found.pop("attention_mask", None)
            masked = {} if mask is None else {"audio_attention_mask": mask[0]}
            return {name: value[0] for name, value in found.items()} | masked

        return prepared

    def stack(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch samples (B, T), or spectrograms, padded by 0, the mean, and their masks."""
        return {
            name: pad_sequence([example[name] for example in inputs], batch_first=True)
            for name in INPUTS
            if name in inputs[0]
        }

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield sound files, those in folders, and records of a sound and its candidates."""
        return read_given(given, "audio", given_sounds)


def window(extractor: Any) -> float | None:
    """Return the seconds of the window that a feature extractor fills; None: it has none."""
    if (seconds := getattr(extractor, "chunk_length", None)) is not None:  # Whisper's
        return float(seconds)
    frames = getattr(extractor, "max_length", None)  # AST's, one each 10 ms
    return None if frames is None else frames / 100
