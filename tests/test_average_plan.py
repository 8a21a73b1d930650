"""What is found wrong with an average before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from hfft.config import Config
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.folder import RunFolder
from hfft.plan import Plan, make_plan
from hfft.report import plan_report

from .text_runs import SIZES, STILL, bert_folder, gpt_folder, save, write_config, write_texts

LORA = {"name": "lora", "r": 2}
GRADUAL = {"name": "gradual", "epochs_per_group": 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), train=16, validation=6)


def finished(folder: Path, labels: tuple[str, ...] = ("bad", "good"), **changes: Any) -> Path:
    """A run's folder with a model of text classification in it."""
    config = hf.BertConfig(**{**SIZES, **STILL, **changes}, id2label=dict(enumerate(labels)))
    save(hf.BertForSequenceClassification(config), folder / "model")
    (folder / "config.yaml").write_text("model: elsewhere\n")
    return folder


def planned(folder: Path, bert: Path, texts: Path, **sections: Any) -> Plan:
    return make_plan(load_config(write_config(folder / "run.yaml", bert, texts, **sections)))


def refused(folder: Path, bert: Path, texts: Path, **sections: Any) -> str:
    with pytest.raises(InputError) as raised:
        planned(folder, bert, texts, **sections)
    [message] = raised.value.messages
    return message


@pytest.mark.parametrize(
    ("average", "line"),
    [
        ("wise_ft", "wise_ft, the best of 11 weights between the source's and the fine-tuned ones"),
        ("uniform_soup", "uniform_soup of the last 2 checkpoints that stage whole keeps"),
        ("greedy_soup", "of the last 2 checkpoints that stage whole keeps, by accuracy on valid"),
        ("ema", "ema of stage whole, decay 0.999, reached by warmup"),
        ({"kind": "ema", "decay": 0.5, "warmup": False}, "ema of stage whole, decay 0.5"),
    ],
)
def test_the_plan_tells_the_average_in_a_line(
    average: Any, line: str, tmp_path: Path, bert: Path, texts: Path
) -> None:
    plan = planned(tmp_path, bert, texts, average=average, strategy={"name": "lp_ft", "epochs": 8})
    [told] = [one for one in plan_report(plan).splitlines() if one.startswith("Average: ")]
    assert line in told


def test_a_run_without_one_tells_nothing(tmp_path: Path, bert: Path, texts: Path) -> None:
    assert "Average" not in plan_report(planned(tmp_path, bert, texts))


def test_interpolation_needs_more_than_a_new_head(tmp_path: Path, bert: Path, texts: Path) -> None:
    message = refused(tmp_path, bert, texts, average="wise_ft", strategy="frozen")
    assert "average: wise_ft: no stage changes a weight of the source" in message
    assert "let more than a new head learn" in message


def test_a_head_of_the_sources_own_is_enough(tmp_path: Path, texts: Path) -> None:
    own = finished(tmp_path / "own") / "model"
    planned(tmp_path, own, texts, average="wise_ft", strategy="frozen")


@pytest.mark.parametrize(
    "average", ["wise_ft", {"kind": "uniform_soup"}, {"kind": "ema", "decay": 0.9}]
)
def test_adapter_that_is_kept_apart_is_refused(
    average: Any, tmp_path: Path, bert: Path, texts: Path
) -> None:
    sections = {"average": average, "training": {"num_train_epochs": 2}}
    message = refused(tmp_path, bert, texts, strategy=LORA, **sections)
    assert "average: the adapter of stage lora is kept apart" in message
    assert "merge: true" in message
    planned(tmp_path, bert, texts, strategy={**LORA, "merge": True, "epochs": 3}, **sections)


@pytest.mark.parametrize(
    ("training", "kept"),
    [
        ({"save_strategy": "no"}, "keeps 0"),
        ({"save_strategy": "epoch"}, "keeps 1"),
        ({"save_strategy": "steps"}, "keeps 1"),
        ({"save_strategy": "steps", "save_steps": 0.9}, None),
        ({"save_strategy": "steps", "save_steps": 1}, None),
        ({"num_train_epochs": 2}, None),
    ],
)
def test_soup_of_less_than_two_checkpoints_is_refused(
    training: dict[str, Any], kept: str | None, tmp_path: Path, bert: Path, texts: Path
) -> None:
    epochs = training.get("num_train_epochs", 1)
    sections = {"average": "uniform_soup", "strategy": {"name": "full", "epochs": epochs}}
    if kept is None:
        planned(tmp_path, bert, texts, training=training, **sections)
    else:
        message = refused(tmp_path, bert, texts, training=training, **sections)
        assert f"average.of: checkpoints: stage whole, the last one, {kept}," in message


def of_runs(*folders: Path) -> dict[str, Any]:
    return {"kind": "greedy_soup", "of": [str(folder) for folder in folders]}


def test_runs_of_the_same_architecture_are_taken(tmp_path: Path, bert: Path, texts: Path) -> None:
    one, other = finished(tmp_path / "a"), finished(tmp_path / "b")
    plan = planned(tmp_path, bert, texts, average=of_runs(one, other / "model"))
    report = plan_report(plan)
    assert f"Average: greedy_soup of this run and {one}, {other / 'model'}, by accuracy" in report


def test_a_run_from_another_source_is_noted(tmp_path: Path, bert: Path, texts: Path) -> None:
    one = finished(tmp_path / "a")
    plan = planned(tmp_path, bert, texts, average=of_runs(one))
    [note] = [note for note in plan.notes if note.startswith("average")]
    assert f"{one} was fine-tuned from elsewhere, this run from {bert}" in note
    (one / "config.yaml").write_text(json.dumps({"model": {"name": str(bert)}}))
    assert not planned(tmp_path, bert, texts, average=of_runs(one)).notes


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"hidden_size": 32}, "bert.embeddings.word_embeddings.weight is (23, 32) there, and (23,"),
        ({"num_hidden_layers": 1}, "lacks bert.encoder.layer.1."),
        ({"num_hidden_layers": 3}, "has bert.encoder.layer.2."),
        ({"labels": ("bad", "good", "neither")}, "has other classes than this run's: bad, good, n"),
        ({"labels": ("good", "bad")}, "has other classes than this run's: good, bad"),
    ],
)
def test_a_run_of_another_architecture_is_named_with_what_differs(
    changes: dict[str, Any], difference: str, tmp_path: Path, bert: Path, texts: Path
) -> None:
    same, other = finished(tmp_path / "a"), finished(tmp_path / "b", **changes)
    message = refused(tmp_path, bert, texts, average=of_runs(same, other))
    assert f"average.of.1: {other}" in message
    assert difference in message


def test_a_model_of_another_kind_is_refused(tmp_path: Path, bert: Path, texts: Path) -> None:
    other = gpt_folder(tmp_path / "gpt")
    message = refused(tmp_path, bert, texts, average=of_runs(other))
    assert message.endswith(f"average.of.0: {other} holds a gpt2, not a bert")


def test_folders_without_a_model_are_all_named(tmp_path: Path, bert: Path, texts: Path) -> None:
    begun = finished(tmp_path / "begun")
    shutil.rmtree(begun / "model")
    nothing, pickled = tmp_path / "nothing", finished(tmp_path / "pickled")
    (pickled / "model" / "model.safetensors").rename(pickled / "model" / "pytorch_model.bin")
    with pytest.raises(InputError) as raised:
        planned(tmp_path, bert, texts, average=of_runs(begun, nothing, pickled))
    messages = raised.value.messages
    assert len(messages) == 3
    assert f"average.of.0: {begun}: the run has no model yet" in messages[0]
    assert f"average.of.1: {nothing}: is neither a run folder (config.yaml) nor" in messages[1]
    assert f"average.of.2: {pickled / 'model'} holds pickled weights only" in messages[2]


def test_an_average_of_mostly_the_start_is_noted(tmp_path: Path, bert: Path, texts: Path) -> None:
    slow = {"kind": "ema", "decay": 0.999, "warmup": False}
    [note] = planned(tmp_path, bert, texts, average=slow).notes
    assert "average: after 2 steps at a decay of 0.999, 100% of the average is what" in note
    assert not planned(tmp_path, bert, texts, average="ema").notes


def test_overwriting_a_run_that_is_averaged_is_refused(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    own = finished(tmp_path / "run")
    (own / "environment.json").write_text('{"num_processes": 1}')
    config: Config = load_config(
        write_config(tmp_path / "run.yaml", bert, texts, average=of_runs(own))
    )
    with pytest.raises(InputError, match=r"--overwrite: average\.of .*lies in the run"):
        RunFolder(config.output_dir).check(config, 1, resume=False, overwrite=True)


@pytest.mark.parametrize(
    ("average", "message"),
    [
        ("wise_fd", "average: 'wise_fd' is none of its values; did you mean 'wise_ft'?"),
        ({"of": "checkpoints"}, "average.kind: is missing"),
        ({"kind": "wise_ft", "alpha": 0.5}, "average.alpha: unknown key; did you mean 'alphas'?"),
        ({"kind": "wise_ft", "alphas": [0, 1.5]}, "average.alphas.1: "),
        ({"kind": "wise_ft", "alphas": [0.5, 0.5]}, "alphas: one of them stands twice"),
        ({"kind": "ema", "decay": 1.0}, "average.decay: "),
        ({"kind": "greedy_soup", "of": "a"}, "average.of: expected checkpoints, or a list of run"),
        ({"kind": "greedy_soup", "of": []}, "average.of: expected checkpoints, or a list of run"),
        ({"kind": "greedy_soup", "of": ["a", "a"]}, "average.of: a run folder stands twice"),
    ],
)
def test_bad_sections_are_told_with_their_place(
    average: Any, message: str, tmp_path: Path, bert: Path, texts: Path
) -> None:
    assert message in refused(tmp_path, bert, texts, average=average)
