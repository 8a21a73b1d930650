"""What predictions are made for: files, those in folders, and records of a file and candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfft.contrastive.given import read_given
from hfft.errors import InputError
from hfft.media import Medium

SHAPES = Medium("shape", "shape", lambda: frozenset({".shp"}), None)


def read(*given: Path) -> list[tuple[str, dict[str, Any]]]:
    return list(read_given([str(one) for one in given], "shape", SHAPES.given))


def undecoded(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": None}


def test_files_are_taken_as_they_are_and_folders_for_what_is_in_them(tmp_path: Path) -> None:
    for name in ("b.shp", "a.shp", "notes.txt"):
        (tmp_path / name).touch()
    inside = [(str(tmp_path / n), {"shape": undecoded(tmp_path / n)}) for n in ("a.shp", "b.shp")]
    assert read(tmp_path) == inside
    odd = tmp_path / "notes.txt"
    assert read(odd, tmp_path)[0] == (str(odd), {"shape": undecoded(odd)})


def test_records_name_files_relative_to_themselves_and_perhaps_candidates(tmp_path: Path) -> None:
    records = [{"shape": "x/a.shp", "candidates": ["a", "b"]}, {"shape": "/b.shp", "more": 1}]
    lines = tmp_path / "asked.jsonl"
    lines.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (_, first), (place, second) = read(lines)
    assert first == {"shape": undecoded(tmp_path / "x" / "a.shp"), "candidates": ["a", "b"]}
    assert second == {"shape": undecoded(Path("/b.shp"))}
    assert place == f"{lines}, line 2"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"candidates": ["a"]}, "line 1: has no shape"),
        ({"shape": "a.shp", "candidates": "a"}, "line 1: its candidates is no list"),
        ({"shape": "a.shp", "candidates": ["a", 1]}, "line 1: the candidate 1 names nothing"),
        ({"shape": "a.shp", "candidates": [" "]}, "line 1: the candidate ' ' names nothing"),
    ],
)
def test_records_of_another_form_are_refused(
    record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read(tmp_path / "asked.jsonl")


def test_folders_with_none_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder holds no shapes"):
        read(tmp_path)
