"""Spoken words: written by the script, and learned by a tower that has heard nothing before."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from .test_scripts import ROOT, load_script
from .text_models import minilm

pytest.importorskip("espeakng_loader")
spoken = load_script("make_spoken_words")


@pytest.fixture(scope="module")
def synthesizer() -> spoken.Synthesizer:
    return spoken.Synthesizer()


def test_a_word_is_a_sound_of_its_own_by_every_voice(synthesizer: spoken.Synthesizer) -> None:
    word, slow, other = (
        synthesizer.say(text, voice, speed, 50)
        for text, voice, speed in (
            ("seven", "en-us+m1", 170),
            ("seven", "en-us+m1", 100),
            ("elephant", "en-us+f2", 170),
        )
    )
    assert 0.2 < len(word) / spoken.RATE < 0.6
    assert len(slow) > 1.3 * len(word)
    assert len(other) > 1.1 * len(word)
    for sound in (word, slow, other):
        assert 0.05 < np.abs(sound).max() <= 1
        assert np.abs(sound[:50]).max() > 0  # no silence before it


def test_the_pitch_is_what_was_asked_for(synthesizer: spoken.Synthesizer) -> None:
    low, high = (synthesizer.say("no", "en-us+m1", 120, pitch) for pitch in (0, 99))
    assert hertz(high) > 1.5 * hertz(low)


def hertz(samples: np.ndarray) -> float:
    """How often a voice vibrates, by where its middle is most like itself."""
    middle = samples[len(samples) // 3 : len(samples) // 3 + 1600]
    alike = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return spoken.RATE / (40 + int(alike[40:300].argmax()))


def test_voices_there_are_not_and_silence_are_refused(synthesizer: spoken.Synthesizer) -> None:
    with pytest.raises(ValueError, match="has no voice nobody"):
        synthesizer.say("seven", "nobody", 170, 50)
    with pytest.raises(ValueError, match="says nothing at ''"):
        synthesizer.say("", "en-us+m1", 170, 50)


def test_script_writes_pairs_whose_validation_voices_are_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert spoken.main([str(tmp_path / "words"), "--voices", "1"]) == 0
    assert "40 train, 320 validation" in capsys.readouterr().err
    splits = {
        split: datasets.Dataset.from_parquet(str(tmp_path / "words" / f"{split}.parquet"))
        for split in ("train", "validation")
    }
    train, validation = (splits[name].to_pandas() for name in splits)
    assert sorted(train["caption"]) == sorted(spoken.WORDS)
    assert not {*train["voice"]} & {*validation["voice"]}
    for audio in train["audio"][:3]:
        samples, rate = soundfile.read(io.BytesIO(audio["bytes"]))
        assert (rate, samples.ndim) == (16_000, 1)
        assert len(samples) < 0.96 * rate  # what the benchmark reads of each
    assert json.loads((tmp_path / "words" / "about.json").read_text())["voices"] == 1
    assert spoken.main([str(tmp_path / "words"), "--voices", "1"]) == 0
    assert "is up to date" in capsys.readouterr().err
    assert spoken.main([str(tmp_path / "words"), "--voices", "2"]) == 2
    assert spoken.main([str(tmp_path / "others"), "--voices", "999"]) == 2
    assert "--voices must lie between 1 and" in capsys.readouterr().err


@pytest.mark.slow
def test_words_of_voices_never_heard_are_found_by_what_they_say(tmp_path: Path) -> None:
    """Chance is 1 of 40: recall at 1 is 0.025."""
    minilm()  # else skipped
    path = ROOT / "benchmarks" / "spoken_words.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_spoken_words", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure(tmp_path, voices=24, epochs=8)
    assert found["audio_to_text_recall_at_1"] > 0.3
    assert found["text_to_audio_recall_at_1"] > 0.4
