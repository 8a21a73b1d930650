"""Sounds and texts: prepared, batched, checked; models of both, trained and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import transformers as hf

import hfft
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.inference import evaluate, open_finished, predict
from hfft.plan import make_plan
from hfft.registry import get
from tests import dual_models, pair_models
from tests.runs import largest_difference, metrics
from tests.sound_models import (
    RATE,
    config,
    extractor,
    save_tone,
    save_towers,
    write_tone_classes,
    write_tones,
)
from tests.test_data_readers import shard

slow = pytest.mark.slow
Sounds = get("zero-shot-audio-classification")
SIZE = "per_device_train_batch_size"
KINDS = ("wav2vec2", "hubert", "ast")


def task(**options: Any) -> Any:
    return Sounds(Sounds.Options(**options))


def sound(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": None}


def prepared(kind: str, *paths: Path, **options: Any) -> list[dict[str, Any]]:
    prepare = task(**options).prepare(extractor(kind), training=False)
    return [prepare(sound(path)) for path in paths]


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(load_config(path))
    return "\n".join(caught.value.messages)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_is_embedded_alone_as_in_a_batch_of_longer_ones(kind: str, tmp_path: Path) -> None:
    paths = [save_tone(tmp_path / f"{n}.wav", "red", s) for n, s in enumerate((0.1, 0.3, 0.17))]
    inputs = prepared(kind, *paths)
    model = dual_models.hearing(kind)
    with torch.no_grad():
        together = model(**task().stack(inputs)).audio_embeds
        for number, one in enumerate(inputs):
            alone = model(**task().stack([one])).audio_embeds
            torch.testing.assert_close(alone[0], together[number], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["wav2vec2", "ast"])
def test_sounds_are_prepared_as_the_extractor_does_it(kind: str, tmp_path: Path) -> None:
    path = save_tone(tmp_path / "a.wav", "blue")
    samples, _ = soundfile.read(path, dtype="float32")
    expected = extractor(kind)(samples, sampling_rate=RATE, return_tensors="pt").input_values[0]
    torch.testing.assert_close(prepared(kind, path)[0]["input_values"], expected)


def test_sounds_of_any_rate_come_at_the_extractors(tmp_path: Path) -> None:
    own, other = (save_tone(tmp_path / f"{r}.wav", "red", 0.2, r) for r in (RATE, 44_100))
    one, two = (found["input_values"] for found in prepared("wav2vec2", own, other))
    assert one.shape == two.shape == (3200,)
    assert torch.corrcoef(torch.stack([one, two]))[0, 1] > 0.99


def test_only_the_seconds_asked_for_are_read(tmp_path: Path) -> None:
    path = save_tone(tmp_path / "a.wav", "red", 0.5, 8000)
    [found] = prepared("wav2vec2", path, max_seconds=0.125)
    assert found["input_values"].shape == (2000,)


def test_longer_sounds_are_counted(tmp_path: Path) -> None:
    towers, data = save_towers(tmp_path), write_tones(tmp_path / "tones")
    path = config(tmp_path / "c.yaml", towers, data, task={"max_seconds": 0.16})
    notes = make_plan(load_config(path)).notes
    said = "6 of 12 sounds last longer than task.max_seconds (0.16), up to 0.2 s: truncated."
    assert any(note.startswith("data.train, ") and said in note for note in notes)
    path = config(tmp_path / "c.yaml", towers, data)
    assert not any("max_seconds" in note for note in make_plan(load_config(path)).notes)


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg"])
def test_tar_files_of_sounds_and_texts_are_pairs(ending: str, tmp_path: Path) -> None:
    colours = list(pair_models.COLOURS)
    files = [save_tone(tmp_path / f"{colour}.{ending}", colour) for colour in colours]
    samples = [
        {ending: file.read_bytes(), "txt": f"a {colour} square"}
        for file, colour in zip(files, colours, strict=True)
    ]
    tar = shard(tmp_path / "0.tar", samples)
    chosen = {"path": str(tar), "validation": "train"}
    file = config(tmp_path / "c.yaml", save_towers(tmp_path), tar, data=chosen)
    examples = make_plan(load_config(file)).subject.examples["train"].rows
    assert [row["audio"]["bytes"] for row in map(examples.__getitem__, range(6))] == [
        sample[ending] for sample in samples
    ]


def test_more_seconds_than_the_extractors_window_are_refused(tmp_path: Path) -> None:
    towers, data = save_towers(tmp_path, "ast"), write_tones(tmp_path / "tones")
    said = complaint(config(tmp_path / "c.yaml", towers, data))
    assert "task.max_seconds: 10 are more than" in said
    assert "hears; set 0.32, or less" in said


def test_towers_without_what_prepares_sounds_are_refused(tmp_path: Path) -> None:
    towers, data = save_towers(tmp_path), write_tones(tmp_path / "tones")
    (tmp_path / "audio" / "preprocessor_config.json").unlink()
    said = complaint(config(tmp_path / "c.yaml", towers, data))
    assert f"model.towers.audio: {tmp_path / 'audio'} has no feature extractor" in said


def test_models_without_an_audio_tower_are_refused_with_the_remedy(tmp_path: Path) -> None:
    data = write_tones(tmp_path / "tones")
    clip = pair_models.save(pair_models.clip(), tmp_path / "clip")
    name = {"name": "zero-shot-audio-classification"}
    said = complaint(pair_models.write_config(tmp_path / "c.yaml", clip, data, task=name))
    assert "clip has no audio tower" in said
    assert "model.towers: {audio: NAME, text: NAME}" in said


def test_finished_models_go_to_the_task_of_their_towers() -> None:
    seeing, hearing = dual_models.dual().config, dual_models.hearing("ast").config
    seeing.architectures = hearing.architectures = ["DualEncoderModel"]
    images = get("zero-shot-image-classification")
    assert (Sounds.takes(hearing), Sounds.takes(seeing)) == (True, False)
    assert (images.takes(hearing), images.takes(seeing)) == (False, True)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_towers_of_sounds_and_texts_train_and_answer(kind: str, tmp_path: Path) -> None:
    towers, data = save_towers(tmp_path, kind), write_tones(tmp_path / "tones")
    seconds = {"max_seconds": 0.3}
    hfft.train(config(tmp_path / "c.yaml", towers, data, task=seconds))
    run = tmp_path / "run"
    [stage] = metrics(run)["stages"]
    assert stage["steps"] == 4
    assert {"recall_at_1", "audio_to_text_recall_at_5"} <= metrics(run)["eval"].keys()
    again = evaluate(open_finished(run), None, None)["metrics"]
    assert again == pytest.approx(metrics(run)["eval"], abs=1e-5)
    record = {"audio": "validation-0.wav", "candidates": ["a red square", "a blue square"]}
    (data / "asked.jsonl").write_text(json.dumps(record), encoding="utf-8")
    [answer] = predict(open_finished(run), [str(data / "asked.jsonl")])
    given = {one["label"]: one["score"] for one in answer["scores"]}
    assert sum(given.values()) == pytest.approx(1)
    with pytest.raises(InputError, match=r"has no classes of its own; give records"):
        list(predict(open_finished(run), [str(data / "validation-0.wav")]))
    peer = hf.pipeline(
        "zero-shot-audio-classification", model=str(run / "model"), trust_remote_code=True
    )
    samples, _ = soundfile.read(data / "validation-0.wav", dtype="float32")
    said = peer(samples, candidate_labels=record["candidates"], hypothesis_template="{}")
    assert {one["label"]: one["score"] for one in said} == pytest.approx(given, abs=1e-5)


@slow
def test_classes_of_sounds_are_learned_by_their_names(tmp_path: Path) -> None:
    towers, data = save_towers(tmp_path), write_tone_classes(tmp_path / "tones")
    named = {"templates": ["a {} square", "the square is {}"]}
    hfft.train(config(tmp_path / "c.yaml", towers, data, task=named))
    run = tmp_path / "run"
    assert 0 <= metrics(run)["eval"]["zero_shot_accuracy"] <= 1
    folder = data / "validation" / "red"
    answers = list(predict(open_finished(run), [str(folder)]))
    assert [answer["input"] for answer in answers] == [str(folder / f"{n}.wav") for n in (0, 1)]
    assert sorted(one["label"] for one in answers[0]["scores"]) == sorted(pair_models.COLOURS)


@slow
@pytest.mark.parametrize("kind", ["wav2vec2", "ast"])
def test_a_locked_audio_towers_outputs_are_stored(kind: str, tmp_path: Path) -> None:
    towers, data = save_towers(tmp_path, kind), write_tones(tmp_path / "tones")
    locked = {"towers": {"audio": {"freeze": "backbone"}}, "contrastive": {"chunk": 3}}
    for cache in ("on", "off"):
        folder = tmp_path / cache
        folder.mkdir()
        hfft.train(
            config(
                folder / "c.yaml",
                towers,
                data,
                task={"max_seconds": 0.3},
                strategy={"name": "full", **locked},
                training={"optim": "sgd", "learning_rate": 0.05, SIZE: 6, "use_cpu": True},
                feature_cache=cache,
            )
        )
    one, other = tmp_path / "on" / "run", tmp_path / "off" / "run"
    [stage] = metrics(one)["stages"]
    assert stage["feature_cache"]["bytes"] > 0
    assert largest_difference(one, other) < 1e-4
