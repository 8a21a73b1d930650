"""Write pairs of a sound and a caption: words as many synthetic voices say them.

Contrastive training of sounds and texts needs pairs that no download stands in front of. eSpeak NG,
a synthesizer by rules, comes as a Python package with its voices: a word as each of them says it,
faster or slower, higher or lower, in one of the accents of English. They are written as Parquet,
with the columns ``audio`` (FLAC, 16 kHz), ``caption``, ``voice`` and ``accent``::

    OUT_DIR/train.parquet        40 words by every voice
    OUT_DIR/validation.parquet   the same words, by voices that don't occur in train
    OUT_DIR/about.json

Synthetic voices are cleaner and more alike than people are: this tells whether training works, not
how well a model would understand people.

Usage:
    pip install espeakng-loader
    python scripts/make_spoken_words.py data/spoken_words
"""

from __future__ import annotations

import argparse
import ctypes
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import espeakng_loader  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import soundfile
from datasets import Audio, Dataset, disable_progress_bars
from made_folder import Counts, make_and_tell
from scipy.signal import resample_poly

WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "silver"),
    *("dog", "cat", "horse", "elephant", "bird", "fish", "spider", "tiger", "rabbit", "monkey"),
    *("apple", "bread", "cheese", "potato", "water", "coffee", "sugar", "butter", "rice", "honey"),
)
ACCENTS = ("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbcwmd", "en-029")
HELD_OUT_VOICES = 8
"""Never heard in train."""
RATE = 16_000
WORDS_A_MINUTE = (130, 210)
PITCHES = (25, 75)
"""Of 100: eSpeak's scale, about each voice's own pitch."""

_SILENCE = 2**15 // 200  # that a sample stays below, where the loudest have 2**15

# of eSpeak's speak_lib.h
_SYNCHRONOUS, _CHARACTERS, _UTF8 = 2, 1, 1
_SPEED, _PITCH = 1, 3


@dataclass(frozen=True)
class Recipe:
    """Everything the written bytes depend on, kept beside the sounds in ``about.json``.

    Attributes:
        voices: that say every word in train.
        seed: of which these are, and of how each word is said.
    """

    voices: int
    seed: int


class Synthesizer:
    """eSpeak NG, of which a process has one."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self._rate <= 0:
            raise RuntimeError("eSpeak NG can't be started")
        self._heard: list[npt.NDArray[np.int16]] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = kind(self._hear)  # kept, since the library doesn't
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, voice: str, speed: int, pitch: int) -> npt.NDArray[np.float32]:
        """Return what a voice makes of a text: (T,) samples, `RATE` a second, from -1 to 1.

        The same twice is not quite the same: eSpeak's voices flutter, as people's do.

        Args:
            text: English; the silence around it is left out.
            voice: an accent, `+`, and the name of a voice.
            speed: words a minute.
            pitch: from 0 to 100; a voice's own is at 50.

        Raises:
            ValueError: there is no such voice, or it says nothing.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice}")
        self._library.espeak_SetParameter(_SPEED, speed, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._heard.clear()
        said = text.encode()
        size = ctypes.c_size_t(len(said) + 1)
        self._library.espeak_Synth(said, size, 0, _CHARACTERS, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        whole = np.concatenate([np.zeros(1, np.int16), *self._heard])
        loud = np.flatnonzero(np.abs(whole) > _SILENCE)
        if not len(loud):
            raise ValueError(f"the voice {voice} says nothing at {text!r}")
        word = whole[loud[0] : loud[-1] + 1].astype(np.float32) / 2**15
        return np.asarray(resample_poly(word, RATE, self._rate), dtype=np.float32).clip(-1, 1)

    def _hear(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: object) -> int:
        if count > 0:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on


def voices() -> list[str]:
    """Return the names of eSpeak's voices, ascending."""
    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def write_folder(folder: Path, recipe: Recipe) -> Counts:
    """Write the whole data set into ``folder``, which must not exist yet.

    Returns:
        The number of pairs in each split.

    Raises:
        ValueError: eSpeak has fewer voices than were asked for.
    """
    disable_progress_bars()
    order = np.random.default_rng(recipe.seed).permutation(voices()).tolist()
    held_out, others = order[:HELD_OUT_VOICES], order[HELD_OUT_VOICES:]
    if not 1 <= recipe.voices <= len(others):
        raise ValueError(f"--voices must lie between 1 and {len(others)}, not {recipe.voices}")
    folder.mkdir(parents=True)
    synthesizer, counts = Synthesizer(), {}
    for split, chosen in (("train", others[: recipe.voices]), ("validation", held_out)):
        rows = Dataset.from_list(list(_spoken(synthesizer, chosen, recipe.seed)))
        rows.cast_column("audio", Audio()).to_parquet(folder / f"{split}.parquet")
        counts[split] = len(rows)
    return counts


def _spoken(
    synthesizer: Synthesizer, chosen: Sequence[str], seed: int
) -> Iterator[dict[str, object]]:
    """Yield a row for every word and voice."""
    for voice in chosen:
        random = np.random.default_rng([seed, *voice.encode()])
        for word in WORDS:
            accent = ACCENTS[random.integers(len(ACCENTS))]
            speed, pitch = random.integers(*WORDS_A_MINUTE), random.integers(*PITCHES)
            samples = synthesizer.say(word, f"{accent}+{voice}", int(speed), int(pitch))
            buffer = io.BytesIO()
            soundfile.write(buffer, samples, RATE, format="FLAC")
            audio = {"bytes": buffer.getvalue(), "path": f"{word}-{voice}.flac"}
            yield {"audio": audio, "caption": word, "voice": voice, "accent": accent}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write spoken words and captions as Parquet.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to make")
    parser.add_argument("--voices", type=int, default=40, help="in train (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of voices and speed (default: 0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = parse_arguments(arguments)
    recipe = Recipe(voices=options.voices, seed=options.seed)
    note = {"source": "espeakng-loader", "words": list(WORDS), **asdict(recipe)}
    return make_and_tell(options.out_dir, note, lambda folder: write_folder(folder, recipe))


if __name__ == "__main__":
    raise SystemExit(main())
