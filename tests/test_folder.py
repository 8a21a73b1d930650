"""A run folder is claimed only where nothing of anybody else's can be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfft.config import Config
from hfft.errors import InputError
from hfft.folder import RunFolder

ENVIRONMENT = {"num_processes": 1}


def config(folder: Path, **sections: object) -> Config:
    values = {"task": "image-classification", "model": "m", "data": {"path": "d"}}
    return Config.model_validate({**values, "output_dir": str(folder), **sections})


def check(folder: Path, *, resume: bool = False, overwrite: bool = False, **sections: Any) -> None:
    RunFolder(folder).check(config(folder, **sections), 1, resume=resume, overwrite=overwrite)


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model", None),
        ("config.yaml", "my: own"),
        ("metrics.json", "{}"),
        ("environment.json", "{"),
        ("environment.json", "{}"),
        ("environment.json", "[]"),
    ],
)
def test_what_is_no_run_is_left_alone_by_either_flag(
    name: str, text: str | None, flags: dict[str, bool], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=f"is no run of hfft, but has files .*{name}"):
        check(tmp_path, **flags)
    assert path.exists()


def test_run_is_not_replaced_by_one_that_starts_from_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    check(tmp_path, overwrite=True)
    with pytest.raises(InputError, match=r"--overwrite: model .* lies in the run"):
        check(tmp_path, overwrite=True, model=str(tmp_path / "model"))
    towers = {"image": "i", "text": str(tmp_path / "model")}
    with pytest.raises(InputError, match=r"--overwrite: model .* lies in the run"):
        check(tmp_path, overwrite=True, model={"towers": towers})


@pytest.mark.parametrize("below", ["file/run", "dangling", "n" * 300])
def test_folder_that_cannot_be_made_is_the_users_to_mend(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    folder = tmp_path / below
    check(folder)
    with pytest.raises(InputError, match=r"output_dir: .* can't be written"):
        RunFolder(folder).open(config(folder), ENVIRONMENT, overwrite=False)


def test_overwrite_removes_the_mark_of_a_run_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config(tmp_path), ENVIRONMENT, overwrite=False)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hfft.folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.open(config(tmp_path), ENVIRONMENT, overwrite=True)
    check(tmp_path, overwrite=True)
