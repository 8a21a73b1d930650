"""What can go wrong with stored features: a run goes on without them, and says so once a stage."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hfft.checkpoints import StageCheckpoints
from hfft.features.store import Entry
from hfft.registry import get
from hfft.trainer import StageTrainer

from .feature_runs import (
    cache_folder,
    chunks,
    entries,
    furthest,
    reused,
    stored,
    train,
    warnings_of_runs,
)
from .runs import metrics, same_weights

slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """Between stages the garbage is collected: spare it all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get("image-classification"), "draw", lambda *_: None)


@pytest.fixture(scope="module")
def computed(
    tmp_path_factory: pytest.TempPathFactory, vit_folder: Path, image_folder: Path
) -> Path:
    """The run of two stages without stored features."""
    folder = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        return train(folder / "run", vit_folder, image_folder, "off")


Train = Callable[..., Path]


@pytest.fixture
def trained(tmp_path: Path, vit_folder: Path, image_folder: Path, computed: Path) -> Train:
    """Train the two stages with the feature cache on; it must end where they do without."""

    def run(name: str = "run", cache: Any = "on", **sections: Any) -> Path:
        done = train(tmp_path / name, vit_folder, image_folder, cache, **sections)
        assert same_weights(done, computed)
        assert furthest(done, computed) == (0, 0)
        assert metrics(done)["eval"] == metrics(computed)["eval"]
        return done

    return run


def half_written() -> list[Path]:
    folder = cache_folder() / "features"
    return [path for path in folder.rglob("*") if path.name != ".lock"]


@pytest.mark.parametrize("synced", [pytest.param(0, marks=slow), 3])
def test_a_full_disk_in_the_middle(
    synced: int, trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the first file of the run's, or after some."""
    sync, times = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal times
        times += 1
        if times > synced:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with warnings_of_runs() as said:
        run = trained()
    assert stored(run) == [False, False]
    assert len(said) == 2
    assert all("computed in every epoch" in line and "No space left" in line for line in said)
    assert half_written() == []


def test_a_disk_that_fails_at_the_last_file(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, times = Entry.write, 0

    def failing(self: Entry, *args: Any) -> None:
        nonlocal times
        times += 1
        if times == 4:  # train and validation, for each of the two stages
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(self, *args)

    monkeypatch.setattr(Entry, "write", failing)
    with warnings_of_runs() as said:
        run = trained()
    assert stored(run) == [False, True]
    [warning] = said
    assert "computed in every epoch" in warning
    assert os.strerror(errno.EIO) in warning
    assert not list(cache_folder().rglob("*.partial"))


@pytest.mark.parametrize("place", ["a file", pytest.param("below a file", marks=slow)])
def test_a_cache_folder_that_is_none(
    place: str, trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setenv("HFFT_CACHE", str(file if place == "a file" else file / "below"))
    with warnings_of_runs() as said:
        run = trained()
    assert stored(run) == [False, False]
    assert len(said) == 2
    assert all(str(file) in line for line in said)
    assert file.read_text() == "mine"


def test_a_cache_folder_that_cant_be_written(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache_folder()))

    monkeypatch.setattr("hfft.features.prepare.open_entry", refused)
    with warnings_of_runs() as said:
        run = trained()
    assert stored(run) == [False, False]
    assert all("Permission denied" in line and str(cache_folder()) in line for line in said)


def test_a_limit_leaves_out_what_does_not_fit(trained: Train) -> None:
    run = trained("run", {"mode": "on", "limit": "4KB"})
    assert stored(run) == [True, False]
    assert stored(trained("none", {"mode": "on", "limit": 1})) == [False, False]


def damaged(path: Path, how: str) -> None:
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "head":
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()


@pytest.mark.parametrize(
    "how", ["cut short", *(pytest.param(how, marks=slow) for how in ("empty", "head", "gone"))]
)
def test_a_damaged_file_is_written_anew(how: str, trained: Train) -> None:
    trained("first")
    before = {path: path.read_bytes() for path in chunks()}
    for path in before:
        damaged(path, how)
    assert reused(trained("again")) == [False, True]
    assert {path: path.read_bytes() for path in chunks()} == before


def test_a_file_that_cant_be_read_is_no_reason_to_stop(trained: Train) -> None:
    """As a folder in its place. The entry is removed, and the next stage makes it anew."""
    trained("first")
    for path in chunks():
        damaged(path, "a folder")
    with warnings_of_runs() as said:
        run = trained("again")
    assert stored(run) == [False, True]
    assert len(said) == 1


@pytest.mark.parametrize(
    "text", ["{", pytest.param(None, marks=slow), pytest.param('{"format": 99}', marks=slow)]
)
def test_a_damaged_manifest_makes_a_new_entry(text: str | None, trained: Train) -> None:
    trained("first")
    for folder in entries():
        path = folder / "manifest.json"
        path.unlink() if text is None else path.write_text(text)
    assert reused(trained("again")) == [False, True]


def test_a_cache_removed_between_two_stages_is_filled_again(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = StageCheckpoints.finish

    def removing(self: StageCheckpoints, *args: Any, **kwargs: Any) -> None:
        finish(self, *args, **kwargs)
        shutil.rmtree(cache_folder())

    monkeypatch.setattr(StageCheckpoints, "finish", removing)
    assert reused(trained()) == [False, False]


def test_cache_rm_leaves_what_a_run_uses(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    step, done = StageTrainer.training_step, list[subprocess.CompletedProcess[str]]()

    def removing(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not done:
            command = [sys.executable, "-m", "hfft", "cache", "rm", "--all"]
            done.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", removing)
    assert reused(trained()) == [False, True]
    assert done[0].returncode == 2
    assert done[0].stderr.count("in use by a run") == 4
    assert "0 entries removed" in done[0].stdout
    assert len(entries()) == 4


@pytest.mark.parametrize(
    "precision", ["bf16_full_eval", pytest.param("fp16_full_eval", marks=slow)]
)
def test_evaluation_in_another_precision_is_no_reason_to_stop(
    precision: str, tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    training = {precision: True, "max_steps": 1}
    one = train(tmp_path / "on", vit_folder, image_folder, "on", training=training)
    other = train(tmp_path / "off", vit_folder, image_folder, "off", training=training)
    assert metrics(one)["eval"] == pytest.approx(metrics(other)["eval"], abs=1e-2)


def test_stages_that_differ_above_the_cut_share_one_entry(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    """Patterns that keep more frozen above what learns ask for the same features below it."""
    below = ["*embeddings*", "*layers.0.*"]
    two = [
        {"name": "one", "freeze": below, "epochs": 1},
        {"name": "two", "freeze": [*below, "*layers.1.*"], "epochs": 1},
    ]
    run = train(tmp_path / "run", vit_folder, image_folder, stages=two)
    assert stored(run) == [True, True]
    assert len(entries()) == 4
