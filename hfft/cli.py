"""The verbs. `hfft --help` and `hfft tasks` import no torch: each verb loads what it needs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfft.errors import InputError, RunFailedError

if TYPE_CHECKING:
    from hfft.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return 0 when done, 1 when the run failed, 2 when the input is wrong."""
    arguments = _parse(argv)
    debug = bool(os.environ.get("HFFT_DEBUG"))
    _set_up_messages(debug)
    try:
        return int(arguments.verb(arguments) or 0)
    except (InputError, RunFailedError) as error:
        if debug:
            traceback.print_exc()
        elif _is_main_process():
            messages = error.messages if isinstance(error, InputError) else [str(error)]
            for message in messages:
                print(f"hfft: {message}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("hfft: interrupted; `--resume` goes on from the last checkpoint", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `hfft ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def train(arguments: argparse.Namespace) -> None:
    """Fine-tune; print stages, scores and baselines."""
    config = _load(arguments)  # first, since a wrong config should not wait for the engine
    from hfft.report import result_report
    from hfft.run import train as run

    result = run(config, resume=arguments.resume, overwrite=arguments.overwrite)
    if _is_main_process():
        print(result_report(result.task, result.metrics, result.model_dir))


def plan(arguments: argparse.Namespace) -> None:
    """Check everything without training; print groups and stages."""
    config = _load(arguments)
    from hfft.plan import make_plan
    from hfft.report import plan_report

    print(plan_report(make_plan(config)))


def evaluate(arguments: argparse.Namespace) -> None:
    """Print a model's scores on a split."""
    from hfft.inference import evaluate as score
    from hfft.inference import open_finished
    from hfft.table import table

    finished = open_finished(arguments.model, arguments.overrides)
    result = score(finished, arguments.data, arguments.split)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(f"{result['examples']} examples of {result['split']}\n")
    print(table(("metric", "value"), result["metrics"].items()))
    if rows := result["per_class"]:
        print("\n" + table(tuple(rows[0]), [tuple(row.values()) for row in rows]))


def predict(arguments: argparse.Namespace) -> None:
    """Print what the model makes of files or texts."""
    from hfft.inference import open_finished
    from hfft.inference import predict as label

    model = open_finished(arguments.model)
    for result in label(model, arguments.inputs):
        if arguments.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            print(f"{result['input']}: {model.task.told(result)}", flush=True)


def push(arguments: argparse.Namespace) -> None:
    """Upload a run's model to the Hub; print its address."""
    from hfft.hub import push as upload

    run, name = Path(arguments.run), arguments.repo_id
    print(upload(run, name, private=not arguments.public, code=arguments.with_code))


def tasks(arguments: argparse.Namespace) -> None:
    """Print the registry, importing none of the tasks."""
    from hfft.registry import entries

    if arguments.json:
        rows = [{"name": entry.name, "summary": entry.summary} for entry in entries().values()]
        print(json.dumps(rows, ensure_ascii=False))
        return
    for entry in entries().values():
        print(f"{entry.name:<24}{entry.summary}")


def schema(_arguments: argparse.Namespace) -> None:
    """Print the config's JSON Schema."""
    from hfft.config_file import json_schema

    print(json.dumps(json_schema(), indent=2))


def cache(arguments: argparse.Namespace) -> None:
    """List the feature cache's entries, or remove some."""
    from hfft.features import verbs

    if arguments.action == "ls":
        print(verbs.listing(as_json=arguments.json))
    else:
        verbs.remove(arguments.keys, everything=arguments.all)


def _load(arguments: argparse.Namespace) -> Config:
    from hfft.config_file import load_config

    return load_config(arguments.config, arguments.overrides)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before flags and after."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfft", description="Fine-tuning: a task, and a list of stages, in one YAML file."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, help_: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help_, description=help_)
        added.set_defaults(verb=globals()[name])
        return added

    for name, help_ in (
        ("train", "run a config; several processes: accelerate launch launch.py CONFIG"),
        ("plan", "check a config without training: data, labels, layer groups, stages, steps"),
    ):
        added = verb(name, help_)
        added.add_argument("config", metavar="CONFIG", help="a YAML file")
        added.add_argument(
            "overrides", nargs="*", metavar="key=value", help="such as training.max_steps=10"
        )
        if name == "train":
            added.add_argument("--resume", action="store_true", help="go on where a run stopped")
            added.add_argument("--overwrite", action="store_true", help="replace the run there is")
    added = verb("evaluate", "score a run's or a folder's model")
    added.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder or a model folder")
    added.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the run's config; of a model alone, of task: task.templates='[\"a {}.\"]'",
    )
    added.add_argument("--data", metavar="PATH", help="default: the run's own")
    added.add_argument("--split", metavar="NAME", help="default: test, else validation")
    added.add_argument("--json", action="store_true", help="print JSON")
    added = verb("predict", "label files or texts")
    added.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder or a model folder")
    added.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a text, a file, a folder of images, or - for standard input",
    )
    added.add_argument("--json", action="store_true", help="print JSON Lines")
    added = verb("push", "upload a run's model to the Hub, with its card")
    added.add_argument("run", metavar="RUN", help="a finished run folder")
    added.add_argument("repo_id", metavar="REPO_ID", help="user/name")
    added.add_argument("--public", action="store_true", help="default: private")
    added.add_argument(
        "--with-code", action="store_true", help="push Python code that the model needs to load"
    )
    added = verb("tasks", "list the tasks there are")
    added.add_argument("--json", action="store_true", help="print JSON")
    actions = verb("cache", "list or remove what the feature cache keeps").add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    added = actions.add_parser("ls", help="list the entries and their sizes")
    added.add_argument("--json", action="store_true", help="print JSON, with all there is to know")
    added = actions.add_parser("rm", help="remove entries that no run uses")
    added.add_argument("keys", nargs="*", metavar="KEY", help="a key, or how it begins")
    added.add_argument("--all", action="store_true", help="every entry")
    verb("schema", "print the config's JSON Schema, for editors")
    return parser


def _set_up_messages(debug: bool) -> None:
    """Send our messages to standard error, and keep the libraries' chatter down."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hfft").setLevel(
        logging.DEBUG if debug else logging.INFO if _is_main_process() else logging.ERROR
    )
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore")
        for library in ("torch.distributed", "accelerate", "huggingface_hub", "datasets"):
            logging.getLogger(library).setLevel(logging.ERROR)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
