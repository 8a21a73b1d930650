"""Every text task from the user's data to answers: train, the run folder, evaluate, predict."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers as hf
import yaml

import hfft
from hfft.cli import main
from hfft.registry import get
from hfft.sections import TaskConfig
from hfft.subject import make_task

from .runs import log, metrics
from .task_runs import CASES, COUNTS, EPOCHS, Case, write_case
from .text_models import minilm

PIPELINES = {"text-classification", "token-classification", "text-generation", "fill-mask"}
"""The tasks that transformers 5 has a pipeline for."""


@dataclass(frozen=True)
class Finished:
    """A case, the folder of everything that belongs to it, and what `hfft train` printed."""

    case: Case
    folder: Path
    printed: str

    @property
    def run(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="module", params=CASES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("case")
    config = write_case(case, folder)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        assert main(["train", str(config)]) == 0
    return Finished(case, folder, printed.getvalue())


def test_a_run_leaves_its_folder_with_the_tasks_scores(finished: Finished) -> None:
    run, case = finished.run, finished.case
    names = {"config.yaml", "environment.json", "metrics.json", "log.jsonl", "checkpoints", "model"}
    assert names <= {path.name for path in run.iterdir()}
    found, task = metrics(run), make_task(TaskConfig(**case.task))
    assert found["task"] == case.name
    for scores in (found["eval"], found["test"], found["stages"][0]["eval"]):
        assert case.metrics | {"loss"} <= scores.keys()
        assert scores.keys() <= {"loss", "epoch", *task.metric_names}
    losses = [entry["loss"] for entry in log(run) if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert f"validation {task.metric}" in finished.printed
    assert f"The model is in {run / 'model'}" in finished.printed
    card = (run / "model" / "README.md").read_text()
    assert f"pipeline_tag: {case.name}" in card


def test_transformers_loads_the_model_with_its_labels(finished: Finished) -> None:
    case, folder = finished.case, str(finished.run / "model")
    model, report = get(case.name).auto_model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    if case.labels:
        assert list(model.config.id2label.values()) == case.labels
    if case.name not in PIPELINES:
        hf.AutoTokenizer.from_pretrained(folder)
        return
    answer: Any = hf.pipeline(case.name, model=folder)  # type: ignore[call-overload]
    if case.name == "text-generation":
        value = case.record.get("messages") or case.record["prompt"]
        assert answer(value, max_new_tokens=3)[0]["generated_text"]
    elif case.name == "fill-mask":
        assert {"token_str", "score"} <= answer(case.record["text"])[0].keys()
    elif case.name == "token-classification":
        assert {found["entity"] for found in answer(case.record["text"])} <= set(case.labels)
    else:
        scores = answer(case.record, top_k=None)
        assert {one["label"] for one in scores} == set(case.labels or ["LABEL_0"])


def scores_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_evaluate_repeats_the_runs_scores(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    run, own = finished.run, metrics(finished.run)
    found = scores_of(capsys, run)
    assert (found["split"], found["examples"]) == ("test", COUNTS["test"])
    assert found["metrics"] == pytest.approx(own["test"], abs=1e-5)
    held_out = scores_of(capsys, run, "--split", "validation")
    assert held_out["metrics"] == pytest.approx(own["eval"], abs=1e-5)
    if finished.case.labels and finished.case.name == "text-classification":
        assert [row["label"] for row in found["per_class"]] == finished.case.labels


def test_evaluate_scores_the_model_folder_alone_on_data(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other options than the model's config tells, here of generation, scores differ."""
    data: list[str | Path] = ["--data", finished.folder / "data", "--split", "test"]
    found = scores_of(capsys, finished.run / "model", *data)
    own = metrics(finished.run)["test"]
    same = own.keys() - get("summarization").metric_names
    assert {name: found["metrics"][name] for name in same} == pytest.approx(
        {name: own[name] for name in same}, abs=1e-5
    )


def answers(
    capsys: pytest.CaptureFixture[str], run: Path, *inputs: str | Path
) -> list[dict[str, Any]]:
    assert main(["predict", str(run), *map(str, inputs), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def same_answer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**one, "input": ""} == {**other, "input": ""}


def test_predict_takes_texts_files_json_lines_and_standard_input(
    finished: Finished,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, case = finished.run, finished.case
    line = json.dumps(case.record)
    records, lines = tmp_path / "inputs.jsonl", tmp_path / "inputs.txt"
    records.write_text(f"{line}\n{line}\n", encoding="utf-8")
    first, second = answers(capsys, run, records)
    assert first.keys() - {"input"} == second.keys() - {"input"}
    assert same_answer(first, second)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n{line}\n{line}\n"))
    given = answers(capsys, run, "-")
    assert len(given) == 3
    assert all(same_answer(first, one) for one in given)
    if case.text:
        [alone] = answers(capsys, run, *case.text)
        assert same_answer(first, alone)
    if len(case.text) == 1:
        lines.write_text(f"{case.text[0]}\n" * 2, encoding="utf-8")
        assert all(same_answer(first, one) for one in answers(capsys, run, lines))
    assert main(["predict", str(run), str(records)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in told] == [f"{records}, line {n}" for n in (1, 2)]
    if case.name != "text-generation":  # whose answer may be the end
        assert all(text.partition(": ")[2] for text in told)
    if case.labels and case.name == "text-classification":
        assert {one["label"] for one in first["scores"]} == set(case.labels)


def test_plan_tells_data_labels_groups_and_stages(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    case = finished.case
    assert main(["plan", str(finished.folder / "run.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"task    {case.name}" in out
    for split, count in COUNTS.items():
        assert f"{count} {split}" in out
    assert "tokens" in out
    if case.labels:
        assert f"labels  {len(case.labels)}: {', '.join(case.labels)}" in out
    pasted = yaml.safe_load(out.partition("The stages as YAML:")[2])
    assert pasted == {"stages": [{"name": "whole", "epochs": EPOCHS}]}


# A real model

ANIMALS = ["lion", "horse", "tiger", "sheep", "rabbit", "wolf", "eagle", "donkey"]
VEHICLES = ["car", "truck", "bicycle", "train", "tractor", "bus", "scooter", "van"]
FOODS = ["bread", "soup", "cheese", "pasta", "salad", "pudding", "omelette", "yoghurt"]
KINDS = {"animal": ANIMALS, "vehicle": VEHICLES, "food": FOODS}
SAYINGS = ["They talked about the {} all day.", "A {} is what I would like to see.", "My {}!"]


def kinds(things: slice) -> list[dict[str, str]]:
    return [
        {"text": saying.format(thing), "label": kind}
        for saying, (kind, own) in product(SAYINGS, KINDS.items())
        for thing in own[things]
    ]


def test_a_sentence_encoder_learns_what_holds_for_words_it_has_not_seen(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for split, things in (("train", slice(5)), ("validation", slice(5, None))):
        lines = "".join(json.dumps(row) + "\n" for row in kinds(things))
        (texts / f"{split}.jsonl").write_text(lines)
    values = {
        "task": "text-classification",
        "model": str(minilm()),
        "data": {"path": str(texts), "validation": "validation"},
        "strategy": {
            "name": "lp_ft",
            "epochs": 4,
            "head_learning_rate": 1e-2,
            "learning_rate": 5e-5,
        },
        "training": {"per_device_train_batch_size": 8},
        "output_dir": str(tmp_path / "run"),
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    result = hfft.train(config)
    assert result.metrics["eval"]["accuracy"] > 0.85  # by chance: a third
    assert json.loads((result.model_dir / "config.json").read_text())["pooling"] == "mean"
    script = (
        "import sys; from transformers import pipeline\n"
        "run = pipeline('text-classification', model=sys.argv[1], trust_remote_code=True)\n"
        "assert 'hfft' not in sys.modules\n"
        "print([one['label'] for one in run(sys.argv[2:])])"
    )
    given = ["They rode in a taxi.", "We ate the pancakes.", "The goat was hungry."]
    done = subprocess.run(
        [sys.executable, "-c", script, str(result.model_dir), *given],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "['vehicle', 'food', 'animal']"
