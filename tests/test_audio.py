"""Sounds are opened at a model's rate, and every one that can't be is named beforehand."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from hfft.audio import SOUNDS, check_sounds, open_sound
from hfft.data import Column
from hfft.errors import InputError

from .data_files import complaint, load

AUDIO = {"audio": Column("audio", ("audio",)), "label": Column("label", ("label",))}
RATE = 16_000


def tone(hertz: float, rate: int = RATE, seconds: float = 0.25) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32) / 2


def save(path: Path, samples: np.ndarray | None = None, rate: int = RATE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(440, rate) if samples is None else samples, rate, **options)
    return path


def opened(path: Path, rate: int = RATE) -> np.ndarray:
    return open_sound({"path": str(path), "bytes": None}, rate)


def column(*paths: Path | None) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"audio": [path and str(path) for path in paths]})
    return rows.cast_column("audio", datasets.Audio(decode=False))


@pytest.mark.parametrize(
    ("name", "off"), [("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 0.05), ("a.mp3", 0.05)]
)
def test_every_format_is_opened_as_it_was_saved(name: str, off: float, tmp_path: Path) -> None:
    found = opened(save(tmp_path / name, tone(440, seconds=1)))
    assert (found.dtype, found.ndim) == (np.float32, 1)
    inner = slice(2000, 14_000)  # encoders taper the ends
    assert np.abs(found[inner] - tone(440, seconds=1)[inner]).max() < off


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.stack([tone(440), tone(440) * 0.5], axis=1)
    found = opened(save(tmp_path / "a.wav", both, subtype="FLOAT"))
    np.testing.assert_allclose(found, tone(440) * 0.75, atol=1e-6)


@pytest.mark.parametrize("own", [8_000, 22_050, 44_100, 48_000])
def test_tone_is_the_same_at_the_models_rate(own: int, tmp_path: Path) -> None:
    found = opened(save(tmp_path / "a.wav", tone(440, own), own))
    assert (len(found), found.dtype) == (int(np.ceil(len(tone(440, own)) * RATE / own)), np.float32)
    assert np.abs(found - tone(440)[: len(found)])[400:-400].max() < 0.005


def test_what_a_lower_rate_cannot_hold_is_filtered_out_not_folded_back(tmp_path: Path) -> None:
    found = opened(save(tmp_path / "a.wav", tone(15_000, 48_000), 48_000), RATE)
    assert np.abs(found[400:-400]).max() < 0.01


def test_bytes_are_opened_without_a_file() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(440), RATE, format="FLAC")
    assert len(open_sound({"path": "a.flac", "bytes": buffer.getvalue()}, RATE)) == RATE // 4


def test_open_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("hello" * 20)
    with pytest.raises(
        InputError, match=r'sound ".*notes\.wav" can\'t be read: its content is not a sound'
    ):
        opened(tmp_path / "notes.wav")


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros(0), "it holds no samples"),
        (tone(440, seconds=0.01), "it lasts 10 ms; models look at 25 ms at once"),
        (np.full(RATE, np.nan), "not all of its samples are finite"),
    ],
)
def test_what_no_model_could_make_sense_of_is_not_opened(
    samples: np.ndarray, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        opened(save(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_check_finds_every_kind_of_bad_sound_with_its_row(tmp_path: Path) -> None:
    good = save(tmp_path / "good.wav", rate=8_000)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "notes.mp3").write_text("hello" * 100)
    noise = np.random.default_rng(0).uniform(-1, 1, 50_000)
    cut = save(tmp_path / "cut.flac", noise)
    cut.write_bytes(cut.read_bytes()[:50_000])
    infinite = tone(440)
    infinite[7] = np.nan
    flaws, heard = check_sounds(
        column(
            good,
            tmp_path / "empty.wav",
            tmp_path / "folder.wav",
            tmp_path / "absent.wav",
            None,
            tmp_path / "notes.mp3",
            save(tmp_path / "silent.wav", np.zeros(0)),
            save(tmp_path / "infinite.wav", infinite, subtype="FLOAT"),
            cut,
            save(tmp_path / "click.wav", tone(440, seconds=0.01)),
            save(tmp_path / "other.ogg", tone(440, seconds=2)),
        ),
        "audio",
    )
    assert [row for row, _, _ in flaws] == list(range(1, 10))
    said = [
        "the file is empty",
        "it is a folder",
        "no such file",
        "names no sound",
        "not a sound that libsndfile knows",
        "holds no samples",
        "not all of its samples are finite",
        "flac decoder lost sync",
        "it lasts 10 ms; models look at 25 ms at once",
    ]
    for (_, _, reason), expected in zip(flaws, said, strict=True):
        assert expected in reason
    assert sorted(heard.rates) == [8_000, RATE]
    assert sorted(heard.seconds) == [0.25, 2]


def test_folder_of_sounds_by_class_is_read_as_images_are(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("10", "2"):
            for number in range(2):
                save(tmp_path / split / name / f"{number}.flac")
    data = load(tmp_path, AUDIO, validation="validation")
    assert (data.labels, data.notes) == (["2", "10"], [])
    assert data.splits["train"].column_names == ["audio", "label"]
    first = data.splits["train"][0]["audio"]
    assert first == {"path": str(tmp_path / "train" / "2" / "0.flac"), "bytes": None}
    assert data.fingerprint != load(tmp_path, AUDIO, validation="train").fingerprint


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_name_sounds_relative_to_themselves(ending: str, tmp_path: Path) -> None:
    paths = [str(save(tmp_path / "s" / f"{n}.wav").relative_to(tmp_path)) for n in range(4)]
    rows = datasets.Dataset.from_dict({"audio": paths, "label": ["a", "b"] * 2})
    path = tmp_path / f"d.{ending}"
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[ending](path)
    data = load(path, AUDIO, validation="train")
    assert data.splits["train"][3]["audio"]["path"] == str(tmp_path / "s" / "3.wav")


def test_audio_of_a_saved_dataset_is_read_without_its_decoder(tmp_path: Path) -> None:
    content = save(tmp_path / "a.wav").read_bytes()
    rows = datasets.Dataset.from_dict({"audio": [content] * 4, "label": ["a", "b"] * 2})
    rows.cast_column("audio", datasets.Audio(sampling_rate=8_000)).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", AUDIO, validation="train")
    assert data.splits["train"][0]["audio"]["bytes"] == content


def test_bad_sounds_are_named_or_skipped_and_differing_rates_noted(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "a" / f"{number}.wav")
        save(tmp_path / "b" / f"{number}.wav", rate=8_000)
    (tmp_path / "b" / "bad.wav").touch()
    said = complaint(tmp_path, AUDIO, validation="train")
    assert "1 of 7 sounds can't be decoded" in said
    assert "bad.wav: the file is empty" in said
    data = load(tmp_path, AUDIO, validation="train[:3]", on_bad_example="skip")
    assert data.skipped == [str(tmp_path / "b" / "bad.wav")]
    assert any("sounds of 8,000 to 16,000 samples a second" in note for note in data.notes)


def test_sounds_without_soundfile_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a" / "0.wav")
    save(tmp_path / "b" / "0.wav")
    assert len(list(SOUNDS.find(tmp_path))) == 2
    monkeypatch.setitem(sys.modules, "soundfile", None)
    said = complaint(tmp_path, AUDIO, validation="train")
    assert "data.columns.audio: " in said
    assert "pip install 'hfft[audio]'" in said
