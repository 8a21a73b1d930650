"""How many processes the launcher was asked for, whatever it then started.

`accelerate launch --cpu --num_processes 2` starts one process, says nothing and succeeds; so does a
config file with `distributed_type: MULTI_CPU`. Nothing in the environment of that one process holds
the number, so it is read where it was written: on the launcher's command line, which is that of a
parent of this process, or in the config file that this command line names.

The opposite happens too: without `ACCELERATE_USE_CPU=true`, the processes that `use_cpu: true` in a
config file or torchrun starts on a machine without a GPU don't join, and each trains alone. Those
have the number in WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

# The options of `accelerate launch` that take no value. All others take one.
FLAGS = frozenset(
    {
        "cpu",
        "debug",
        "downcast_bf16",
        "dynamo_use_dynamic",
        "dynamo_use_fullgraph",
        "dynamo_use_regional_compilation",
        "enable_cpu_affinity",
        "fp8_use_autocast_during_eval",
        "help",
        "module",
        "multi_gpu",
        "no_python",
        "no_tpu_cluster",
        "quiet",
        "same_network",
        "tpu",
        "tpu_cluster",
        "tpu_use_sudo",
        "use_deepspeed",
        "use_fsdp",
        "use_megatron_lm",
        "use_parallelism_config",
        # and their short forms
        "h",
        "m",
        "q",
    }
)

# Where torchrun, and then the kinds of mpirun that accelerate knows, leave the number.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# The file that `accelerate config` writes, in the Hugging Face cache.
DEFAULT_CONFIG = PurePath("accelerate", "default_config.yaml")


def world_size_warning(actual: int) -> str | None:
    """What to tell the user when the launcher started another number of processes than asked for.

    Args:
        actual: The number of processes of this run.

    Returns:
        The message; None where the number is the one asked for, or none was.
    """
    asked = requested_processes()
    if asked is None or asked == actual:
        return None
    configs = Path(__file__).parent / "configs" / "accelerate"
    return (
        f"the launcher was asked for {_processes(asked)}, but this run has {actual}. "
        f"`accelerate launch --cpu --num_processes {asked}` starts one process and says nothing; "
        f"this starts {asked} on CPUs: ACCELERATE_USE_CPU=true accelerate launch "
        f"--config_file {configs / 'two_cpu.yaml'} --num_processes {asked} ...; "
        f"and this on GPUs, where there are as many: accelerate launch "
        f"--config_file {configs / 'one_node_multi_gpu.yaml'} --num_processes {asked} ..."
    )


def requested_processes() -> int | None:
    """The number of processes that `accelerate launch`, torchrun or mpirun was asked for.

    Returns:
        The number over all machines; None where this process wasn't started by a launcher, where
        the launcher was given no number, or where it can't be found out. Never raises.
    """
    try:
        if "LOCAL_RANK" in os.environ:  # a worker of torchrun, or of accelerate through torchrun
            return _from_environment(os.environ)
        for argv, folder in _ancestors():
            arguments = launch_arguments(argv)
            if arguments is not None:
                return processes_asked(arguments, folder, os.environ)
        return _from_environment(os.environ)
    except Exception:  # a hint must not stop a run
        return None


def launch_arguments(argv: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch`, in any of the ways to call it, on a command line.

    Args:
        argv: The words of the command line; the interpreter and its options may come first.

    Returns:
        The arguments of `accelerate launch`, the training script and its arguments included; None
        where the command line is not one of `accelerate launch`.
    """
    for index, word in enumerate(argv):
        path = PurePath(word.replace("\\", "/"))
        name = path.name.removesuffix(".exe").removesuffix("-script.py")
        following = list(argv[index + 1 :])
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return following
        if path.parts[-3:] == ("accelerate", "commands", "launch.py"):
            return following
        if name in ("accelerate", "accelerate.commands.accelerate_cli", "accelerate_cli.py"):
            return following[1:] if following[:1] == ["launch"] else None
    return None


def launch_options(arguments: Sequence[str]) -> dict[str, str | None]:
    """The options of `accelerate launch` itself, without the training script's own.

    Args:
        arguments: As `launch_arguments` returns them.

    Returns:
        Option name, without dashes in front and with underscores inside, to its value; None for a
        flag.
    """
    options: dict[str, str | None] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "--":
            break  # the training script
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in FLAGS:
            options[name] = None
        elif equals:
            options[name] = value
        else:
            options[name] = next(words, None)
    return options


def processes_asked(
    arguments: Sequence[str], folder: str | os.PathLike[str], environment: Mapping[str, str]
) -> int | None:
    """The number of processes that `accelerate launch` takes from its arguments.

    As accelerate does: `--num_processes` first, then the file given by `--config_file`, then,
    except with `--cpu`, the file that `accelerate config` wrote.

    Args:
        arguments: As `launch_arguments` returns them.
        folder: The launcher's working folder, to which a config file's path is relative.
        environment: The launcher's environment, which says where the Hugging Face cache is.

    Returns:
        The number; None where none was given.
    """
    options = launch_options(arguments)
    if options.get("num_processes") is not None:
        return _positive(options["num_processes"])
    if options.get("config_file") is not None:
        return _from_config_file(Path(folder, str(options["config_file"])))
    if "cpu" not in options:
        return _from_config_file(_hugging_face_home(environment) / DEFAULT_CONFIG)
    return None


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _positive(value: object) -> int | None:
    """The value as a number of processes; None where it is none."""
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if number > 0 else None


def _from_environment(environment: Mapping[str, str]) -> int | None:
    numbers = (_positive(environment.get(name)) for name in WORLD_SIZES)
    return next((number for number in numbers if number is not None), None)


def _from_config_file(path: Path) -> int | None:
    """The number in a config file of accelerate, which may be YAML or JSON; YAML reads both."""
    if not path.is_file():
        return None
    import yaml

    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        return None
    return _positive(settings.get("num_processes"))


def _hugging_face_home(environment: Mapping[str, str]) -> Path:
    cache = environment.get("XDG_CACHE_HOME", "~/.cache")
    return Path(environment.get("HF_HOME", os.path.join(cache, "huggingface"))).expanduser()


def _ancestors() -> Iterator[tuple[list[str], str]]:
    """Command line and working folder of each parent, the nearest first.

    Parents that this user may not look at are left out.
    """
    import psutil  # a dependency of accelerate

    for process in psutil.Process().parents():
        try:
            argv = process.cmdline()
        except psutil.Error:
            continue
        try:
            folder = process.cwd()
        except psutil.Error:
            folder = os.getcwd()
        yield argv, folder
