"""The verbs' promises to a shell: what they import, print and return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hfft
from hfft import cli
from hfft.errors import InputError, RunFailedError
from hfft.registry import entries

HEAVY = {"torch", "transformers", "datasets", "timm", "accelerate", "pydantic", "numpy", "sklearn"}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts a verb; what the verb sets for its libraries ends with the test."""
    for name in ("HFFT_DEBUG", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def imported(*words: str) -> tuple[set[str], str]:
    """What of the heavy libraries a command line imports, and what it prints."""
    code = (
        "import sys\n"
        "from hfft.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return HEAVY & set(done.stderr.split()), done.stdout


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def verb(_arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli, "tasks", verb)


def test_help_imports_nothing_heavy_and_names_every_verb() -> None:
    heavy, printed = imported("--help")
    assert heavy == set()
    for verb in ("train", "plan", "evaluate", "predict", "push", "tasks", "schema"):
        assert f"\n    {verb} " in printed


def test_tasks_imports_nothing_heavy() -> None:
    heavy, printed = imported("tasks")
    assert heavy == set()
    assert "image-classification" in printed


def test_importing_hfft_imports_nothing_heavy_until_a_name_is_used() -> None:
    code = "import sys, hfft; print(*sys.modules); hfft.InputError"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & HEAVY == set()


def test_every_public_name_is_there() -> None:
    for name in hfft.__all__:
        assert getattr(hfft, name).__name__ == name
        assert name in dir(hfft)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hfft.nothing  # noqa: B018


# Exit status


def test_done_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks"]) == 0
    assert capsys.readouterr().err == ""


def test_wrong_input_is_2_with_each_message_on_standard_error_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, InputError(["first thing", "second thing"]))
    assert cli.main(["tasks"]) == 2
    assert capsys.readouterr() == ("", "hfft: first thing\nhfft: second thing\n")


def test_failed_run_is_1_with_its_message_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, RunFailedError("the loss is nan"))
    assert cli.main(["tasks"]) == 1
    assert capsys.readouterr() == ("", "hfft: the loss is nan\n")


def test_error_of_ours_is_1_with_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("a bug"))
    assert cli.main(["tasks"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupted_run_is_1_and_names_the_way_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["tasks"]) == 1
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(InputError("x"), 2), (RunFailedError("x"), 1)])
def test_debug_shows_the_traceback_and_keeps_the_status(
    error: Exception,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    os.environ["HFFT_DEBUG"] = "1"
    fail_with(monkeypatch, error)
    assert cli.main(["tasks"]) == status
    assert "Traceback" in capsys.readouterr().err


def test_message_is_printed_by_the_main_process_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["RANK"] = "1"
    fail_with(monkeypatch, InputError("once is enough"))
    assert cli.main(["tasks"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", [["trian", "c.yaml"], [], ["train"], ["plan", "c.yaml", "--resume"], ["tasks", "x"]]
)
def test_wrong_command_line_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: hfft" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_missing_config_is_2(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err == f"hfft: {tmp_path / 'c.yaml'}: there is no such config file\n"


@pytest.mark.parametrize("words", [["evaluate"], ["predict", "x.png"]])
def test_folder_without_a_model_is_2(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([words[0], str(tmp_path), *words[1:]]) == 2
    assert "is neither a run folder (config.yaml) nor a model folder" in capsys.readouterr().err


def test_push_of_an_unfinished_run_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(tmp_path), "me/x"]) == 2
    assert "is no finished run" in capsys.readouterr().err


def test_push_to_a_name_that_can_be_none_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "metrics.json").write_text("{}")
    assert cli.main(["push", str(tmp_path), "me/my model"]) == 2
    assert "REPO_ID: Repo id must use alphanumeric chars" in capsys.readouterr().err


def test_push_without_the_network_is_1_and_says_how_to_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "metrics.json").write_text("{}")
    assert cli.main(["push", str(tmp_path), "me/x"]) == 1
    assert f"hfft push {tmp_path} me/x" in capsys.readouterr().err


# Output


def test_tasks_as_json_is_one_list_of_names_and_summaries(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["tasks", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in listed] == list(entries())
    assert all(task["summary"] for task in listed)


def test_schema_is_json_schema_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"task", "model", "data"}
    assert {"strategy", "stages", "training", "hub", "seed"} < schema["properties"].keys()


def test_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hfft", "push", "nowhere", "me/x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hfft: nowhere: is no finished run")
