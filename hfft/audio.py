"""Sounds: opened at a model's rate with a message that names the file, checked before training.

libsndfile decodes them, through soundfile, which comes with `hfft[audio]`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from hfft.errors import InputError
from hfft.media import Medium, cause, check, content_of, name_of

# soundfile and scipy are imported where they are used: tasks without sounds do without

_ENDINGS = frozenset({".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"})

_SAMPLES_AT_ONCE = 1 << 20
"""Of each channel, held in memory by the check."""

SHORTEST = 0.025
"""Seconds that spectrograms and the convolutions of wav2vec 2.0 and its like make one frame of."""

_UNKNOWN = {1, 7}
"""libsndfile's numbers for content of no format it knows, or not that of the file's name."""


def sound_extensions() -> frozenset[str]:
    """File-name endings, lower case with the dot, of sounds that are looked for in folders."""
    return _ENDINGS


SOUNDS = Medium("audio", "sound", sound_extensions, datasets.Audio(decode=False))


def given_sounds(given: Sequence[str]) -> list[Path]:
    """Sound files, and all sounds in folders.

    Raises:
        InputError: a folder holds none.
    """
    return SOUNDS.given(given)


def open_sound(
    value: Mapping[str, Any], rate: int, seconds: float | None = None
) -> npt.NDArray[np.float32]:
    """Opens one value of an undecoded audio column: (T,) samples, its channels' mean.

    Args:
        value: `{"path": ..., "bytes": ...}`; `bytes`, where there are any, win.
        rate: samples a second wanted; from another, it is resampled by a polyphase filter.
        seconds: that are read, from the beginning; None: all.

    Raises:
        InputError: the sound can't be decoded; the message names the file and says why.
    """
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(content_of(value, "sound")) as file:
            own = file.samplerate
            frames = -1 if seconds is None else round(seconds * own)
            channels = file.read(frames, dtype="float32", always_2d=True)
            _check_samples(channels)
            _check_length(len(channels), own)
    except Exception as error:
        raise InputError(f'sound "{name_of(value)}" can\'t be read: {_reason(error)}') from error
    return _resampled(channels.mean(axis=1), own, rate)


@dataclass(frozen=True)
class Heard:
    """What is known of sounds that were decoded, each file once.

    Attributes:
        rates: samples a second, of any.
        seconds: how long each is, in no order.
    """

    rates: Collection[int]
    seconds: Sequence[float]


def check_sounds(
    dataset: datasets.Dataset, column: str
) -> tuple[list[tuple[int, str, str]], Heard]:
    """Decodes every sound of an undecoded column, all of it.

    Returns:
        (row, path, reason) of each sound that can't be decoded or is too short, in row order; what
        is known of the others.

    Raises:
        InputError: what decodes them isn't installed.
    """
    soundfile = _soundfile()
    found: list[tuple[int, float]] = []  # filled by threads

    def flaw(value: Mapping[str, Any] | None) -> str:
        try:
            with soundfile.SoundFile(content_of(value, "sound")) as file:
                seconds = _read_through(file) / file.samplerate
                found.append((int(file.samplerate), seconds))
        except Exception as error:
            return _reason(error)
        return ""

    bad = check(dataset, column, flaw)
    return bad, Heard({rate for rate, _ in found}, [seconds for _, seconds in found])


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # the library that it wraps may be what is missing
        raise InputError(f"sounds need soundfile ({error}): pip install 'hfft[audio]'") from error
    return soundfile


def _read_through(file: Any) -> int:
    """Decodes all of a sound; returns how many samples each channel has.

    Raises:
        ValueError: it is none to learn from.
    """
    read = 0
    while len(block := file.read(_SAMPLES_AT_ONCE, dtype="float32", always_2d=True)):
        read += len(block)
        _check_samples(block)
    if 0 < read < file.frames:
        raise ValueError(f"it is truncated: {read:,} of its {file.frames:,} samples are there")
    _check_length(read, file.samplerate)
    return read


def _check_samples(block: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(block).all():
        raise ValueError("not all of its samples are finite numbers")


def _check_length(samples: int, rate: int) -> None:
    if not samples:
        raise ValueError("it holds no samples")
    if samples < SHORTEST * rate:
        raise ValueError(
            f"it lasts {1000 * samples / rate:.3g} ms; models look at {1000 * SHORTEST:.0f} ms at "
            f"once"
        )


def _reason(error: Exception) -> str:
    if getattr(error, "code", None) in _UNKNOWN:
        return "its content is not a sound that libsndfile knows"
    said: str | None = getattr(error, "error_string", None)  # without the file's name
    return said or cause(error)


def _resampled(samples: npt.NDArray[np.float32], own: int, rate: int) -> npt.NDArray[np.float32]:
    """(T,) samples at `own` a second, as (T rate / own,) at `rate`, rounded up."""
    if own == rate:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(own, rate)
    found = resample_poly(samples, rate // common, own // common)
    return np.asarray(found, dtype=np.float32)
