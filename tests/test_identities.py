"""Equal texts and files are known to be equal, wherever they are met."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfft.identities import file_identities, identity


def identities(*values: dict[str, Any]) -> list[int]:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": list(values)}, features=features)
    return file_identities(rows.with_format("arrow")[:].column("image"))


def test_identities_of_texts_stay_what_they_are() -> None:
    assert identity("a red cat") == identity(b"a red cat") == 6145314664299619481
    assert identity("a red cat") != identity("a red cat ")
    assert all(0 <= identity(str(n)) < 2**63 for n in range(100))


def test_one_file_has_one_identity_by_whatever_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / "real").mkdir(exist_ok=True)
        (tmp_path / "real" / name).touch()
    os.symlink(tmp_path / "real", tmp_path / "folder")
    os.symlink(tmp_path / "real" / "a.png", tmp_path / "link.png")
    monkeypatch.chdir(tmp_path)
    paths = ("real/a.png", "folder/a.png", "link.png", str(tmp_path / "real" / "a.png"))
    same = identities(*({"path": path, "bytes": None} for path in paths))
    assert len(set(same)) == 1
    other = identities({"path": "real/b.png", "bytes": None}, {"path": "gone.png", "bytes": None})
    assert len({*same, *other}) == 3


def test_bytes_are_known_by_themselves_whatever_their_names() -> None:
    one, two, three = identities(
        {"path": "a.png", "bytes": b"x"},
        {"path": None, "bytes": b"x"},
        {"path": "a.png", "bytes": b"y"},
    )
    assert one == two == identity(b"x") != three == identity(b"y")


def test_identities_of_a_part_are_those_of_its_rows() -> None:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    values = [{"path": None, "bytes": bytes([n])} for n in range(9)]
    rows = datasets.Dataset.from_dict({"image": values}, features=features)
    whole = rows.with_format("arrow")[:].column("image")
    assert file_identities(whole.slice(3, 4)) == [identity(bytes([n])) for n in range(3, 7)]
