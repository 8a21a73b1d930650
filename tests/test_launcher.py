from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfft import launcher

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs" / "accelerate"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that nothing launched, whatever the tests themselves were started by."""
    for name in ("LOCAL_RANK", *launcher.WORLD_SIZES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_ancestors", lambda: iter([]))
    return monkeypatch


def asked(
    arguments: str, folder: Path = REPOSITORY, home: Path = Path("no-such-home")
) -> int | None:
    return launcher.processes_asked(arguments.split(), folder, {"HF_HOME": str(home)})


def run_launched(
    script: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", *launcher.WORLD_SIZES)}
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)],
        env=clean | {"HF_HOME": str(script.parent), "PYTHONPATH": str(REPOSITORY)} | environment,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch --cpu train.py",
        "/opt/venv/bin/python /opt/venv/bin/accelerate launch --cpu train.py",
        "python -u /opt/venv/bin/accelerate launch --cpu train.py",
        "uv run accelerate launch --cpu train.py",
        "python -m accelerate.commands.launch --cpu train.py",
        "python -m accelerate.commands.accelerate_cli launch --cpu train.py",
        "python /opt/accelerate/commands/accelerate_cli.py launch --cpu train.py",
        "python /opt/accelerate/commands/launch.py --cpu train.py",
        "python /opt/venv/bin/accelerate-launch --cpu train.py",
        r"C:\venv\Scripts\python.exe C:\venv\Scripts\accelerate.exe launch --cpu train.py",
        r"C:\venv\python.exe C:\venv\Scripts\accelerate-launch-script.py --cpu train.py",
    ],
)
def test_each_way_to_call_accelerate_launch_is_recognised(command: str) -> None:
    assert launcher.launch_arguments(command.split()) == ["--cpu", "train.py"]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash",
        "hfft train config.yaml",
        "accelerate",
        "accelerate config --config_file launch",
        "python launch.py config.yaml",
        "python /home/me/accelerate/train.py --num_processes 2",
        "make launch",
    ],
)
def test_other_commands_are_no_launch(command: str) -> None:
    assert launcher.launch_arguments(command.split()) is None


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ("--num_processes 2 train.py", 2),
        ("--num_processes=2 train.py", 2),
        ("--num-processes 2 train.py", 2),
        ("--num-processes=2 train.py", 2),
        ("--cpu --num_processes 2 train.py", 2),
        ("--num_processes 2 --num_processes 3 train.py", 3),
        ("--mixed_precision no -m --num_processes 16 package.train", 16),
        ("--cpu train.py --num_processes 8", None),
        ("--main_process_port 29501 train.py --num_processes 8", None),
        ("--cpu -- train.py --num_processes 8", None),
        ("train.py", None),
        ("", None),
        ("--num_processes", None),
        ("--num_processes two train.py", None),
        ("--num_processes 0 train.py", None),
    ],
)
def test_the_launchers_own_num_processes_counts(arguments: str, number: int | None) -> None:
    assert asked(arguments) == number


def test_a_config_file_gives_the_number_unless_the_command_line_does() -> None:
    assert asked("--config_file configs/accelerate/two_cpu.yaml launch.py") == 2
    assert asked(f"--config-file={CONFIGS / 'two_cpu.yaml'} launch.py", Path("/")) == 2
    assert asked("--config_file configs/accelerate/one_cpu.yaml launch.py") == 1
    assert asked("--config_file configs/accelerate/two_cpu.yaml --num_processes 4 launch.py") == 4


def test_a_config_file_may_be_json_or_without_a_number(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text('{"num_processes": 2, "distributed_type": "MULTI_CPU"}')
    (tmp_path / "none.yaml").write_text("distributed_type: MULTI_GPU\n")
    (tmp_path / "empty.yaml").write_text("")
    assert asked("--config_file two.json train.py", tmp_path) == 2
    assert asked("--config_file none.yaml train.py", tmp_path) is None
    assert asked("--config_file empty.yaml train.py", tmp_path) is None
    assert asked("--config_file missing.yaml train.py", tmp_path) is None


def test_the_file_of_accelerate_config_counts_except_with_cpu(tmp_path: Path) -> None:
    default = tmp_path / "accelerate" / "default_config.yaml"
    default.parent.mkdir()
    default.write_text("num_processes: 4\n")
    assert asked("train.py", home=tmp_path) == 4
    assert asked("--cpu train.py", home=tmp_path) is None


def test_nothing_is_requested_where_nothing_launched(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(launcher, "_ancestors", lambda: iter([(["bash"], "/"), (["init"], "/")]))
    assert launcher.requested_processes() is None
    assert launcher.world_size_warning(1) is None


@pytest.mark.parametrize("name", launcher.WORLD_SIZES)
def test_a_world_size_in_the_environment_counts(alone: pytest.MonkeyPatch, name: str) -> None:
    alone.setenv(name, "3")
    assert launcher.requested_processes() == 3


def test_the_nearest_launcher_counts(alone: pytest.MonkeyPatch) -> None:
    parents = [
        ("bash -c script", "/"),
        ("python -m accelerate.commands.launch --num_processes 2 train.py", "/"),
        ("python -m accelerate.commands.launch --num_processes 5 sweep.py", "/"),
    ]
    alone.setattr(launcher, "_ancestors", lambda: ((c.split(), f) for c, f in parents))
    alone.setenv("WORLD_SIZE", "1")
    assert launcher.requested_processes() == 2


def test_a_torchrun_worker_asks_no_parent(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(
        launcher,
        "_ancestors",
        lambda: iter([(["accelerate", "launch", "--num_processes", "2"], "/")]),
    )
    alone.setenv("LOCAL_RANK", "0")
    alone.setenv("WORLD_SIZE", "8")
    assert launcher.requested_processes() == 8


def test_an_unreadable_process_table_raises_nothing(alone: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError

    alone.setattr(launcher, "_ancestors", refuse)
    assert launcher.requested_processes() is None


def test_the_warning_names_both_numbers_and_a_remedy_that_exists(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("WORLD_SIZE", "3")
    assert launcher.world_size_warning(3) is None
    warning = launcher.world_size_warning(1)
    assert warning is not None
    assert "asked for 3 processes, but this run has 1" in warning
    named = [Path(word) for word in warning.split() if word.endswith(".yaml")]
    assert [path.name for path in named] == ["two_cpu.yaml", "one_node_multi_gpu.yaml"]
    assert all(path.is_file() for path in named)


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, hfft.launcher; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_accelerates_flags_are_known() -> None:
    from accelerate.commands.launch import launch_command_parser

    options = [action for action in launch_command_parser()._actions if action.option_strings]
    flags = {
        name.lstrip("-").replace("-", "_")
        for action in options
        if action.nargs == 0
        for name in action.option_strings
    }
    assert flags <= launcher.FLAGS
    values = [action for action in options if action.nargs != 0]
    assert all(action.nargs in (None, 1) for action in values)
    assert not launcher.FLAGS & {name.lstrip("-") for a in values for name in a.option_strings}
    assert any(action.nargs == argparse.REMAINDER for action in launch_command_parser()._actions)


def test_one_process_started_by_accelerate_launch_learns_that_two_were_asked_for(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from hfft.launcher import requested_processes, world_size_warning\n"
        "print('requested', requested_processes(), world_size_warning(1))\n"
    )
    done = run_launched(script, "--cpu", "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("requested 2 the launcher was asked for 2 processes")
    assert done.stdout.count("requested 2") == 1  # one process, as ever: the reason for all this


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_two_cpu_yaml_starts_processes_that_join(tmp_path: Path, number: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from accelerate import Accelerator\n"
        "from hfft.launcher import requested_processes, world_size_warning\n"
        "size = Accelerator().num_processes\n"
        "seen = (size, requested_processes(), world_size_warning(size))\n"
        "open(os.path.join(os.path.dirname(__file__), os.environ['RANK']), 'w').write(str(seen))\n"
    )
    options = ("--config_file", str(CONFIGS / "two_cpu.yaml"), "--main_process_port", "0")
    if number != 2:
        options += ("--num_processes", str(number))
    done = run_launched(script, *options, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    seen = [(tmp_path / str(rank)).read_text() for rank in range(number)]
    assert seen == [f"({number}, {number}, None)"] * number
