"""`hfft cache`: what it lists, what it removes, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfft.cli import main
from hfft.features.room import Hold
from hfft.features.store import Column, open_entry

KEYS = ["aaaa1111" * 4, "aaaa2222" * 4]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One complete entry of two chunks, and one that lacks a chunk."""
    monkeypatch.setenv("HFFT_CACHE", str(tmp_path))
    monkeypatch.delenv("HFFT_DEBUG", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    for number, key in enumerate(KEYS):
        with open_entry(
            tmp_path,
            key,
            examples=2,
            columns=[Column("x", torch.float32, (2**18,))],
            rows_per_chunk=1,
            description={"model": f"org/m{number}", "split": "train", "boundary": "layer3"},
        ) as entry:
            for chunk in range(2 - number):
                entry.write(chunk, [{"x": torch.zeros(2**18)}])
    return tmp_path


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "features").glob("[!.]*"))


def test_ls_shows_size_state_and_what_it_is_of(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "key MiB chunks last used model split boundary"
    (whole,) = (line.split() for line in lines if line.startswith(KEYS[0][:12]))
    assert whole[1:4] == ["2.0", "all", "2"]
    assert whole[-3:] == ["org/m0", "train", "layer3"]
    (part,) = (line for line in lines if line.startswith(KEYS[1][:12]))
    assert "1 of 2" in part
    assert lines[-1] == f"2 entries, 3.0 MiB, in {root / 'features'}"


def test_ls_as_json_has_everything(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "features" / KEYS[0] / "manifest.json").write_text("{")
    assert main(["cache", "ls", "--json"]) == 0
    entries = {entry["key"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries.keys() == set(KEYS)
    assert entries[KEYS[0]]["manifest"] is None
    part = entries[KEYS[1]]
    assert (part["complete"], part["chunks_written"], part["chunks"]) == (False, 1, 2)
    assert part["bytes"] > 2**20
    assert part["manifest"]["description"]["model"] == "org/m1"


def test_ls_of_no_cache_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HFFT_CACHE", str(tmp_path / "none"))
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'none' / 'features'} is empty\n"
    assert main(["cache", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_rm_takes_how_a_key_begins(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "rm", "aaaa1"]) == 0
    assert left(root) == KEYS[1:]
    assert capsys.readouterr().out.splitlines() == [
        f"removed {KEYS[0]}: 2.0 MiB",
        "1 entry removed, 2.0 MiB freed",
    ]


def test_rm_all_removes_all_and_nothing_else(root: Path) -> None:
    (root / "features" / "notes").mkdir()
    assert main(["cache", "rm", "--all"]) == 0
    assert left(root) == ["notes"]


def test_rm_names_what_fits_nothing_or_several_and_removes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "rm", "aaaa1111", "aaaa", "aaaa2223"]) == 2
    assert left(root) == KEYS
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"aaaa: fits 2 entries, {KEYS[0]}, {KEYS[1]}" in lines[0]
    assert lines[1].endswith(f"no such entry; the nearest is {KEYS[1]}")


@pytest.mark.parametrize("words", [["--all"], KEYS])
def test_rm_leaves_and_names_what_is_in_use(
    root: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    hold = Hold(root / "features" / KEYS[0])
    assert main(["cache", "rm", *words]) == 2
    hold.close()
    assert left(root) == KEYS[:1]
    printed = capsys.readouterr()
    assert printed.out.endswith("1 entry removed, 1.0 MiB freed\n")
    assert printed.err == f"hfft: {KEYS[0]}: in use by a run; it stays\n"


@pytest.mark.parametrize("words", [[], ["--all", "aaaa1"]])
def test_rm_wants_keys_or_all(
    root: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["cache", "rm", *words]) == 2
    assert left(root) == KEYS
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["rm", "aaaa1"]])
def test_the_verb_imports_no_torch(root: Path, words: list[str]) -> None:
    code = (
        "import sys\nfrom hfft.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'safetensors', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "cache", *words], check=True, capture_output=True)
