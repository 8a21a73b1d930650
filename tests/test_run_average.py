"""Averages at a run's end: which candidate is chosen, and what the run leaves."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import hfft
from hfft.averaging import interpolate, load_weights_into, uniform, weights_of
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.plan import make_plan
from hfft.report import plan_report, result_report
from hfft.run_average import RunAverage
from hfft.sections import EmaAverage, SoupAverage, WiseFtAverage
from hfft.trial import TrialRun

from . import pair_models
from .runs import metrics, same_weights, weights
from .runs import write_config as write_images
from .task_runs import CASES, write_case
from .test_processes import train_on_two
from .test_run import kill
from .text_runs import bert_folder, write_config, write_texts

# Choosing, with one weight as the model and scores that are functions of it


class Weight(nn.Module):
    """A model of one number in the body and one in a new head."""

    def __init__(self, body: float, head: float = 7.0) -> None:
        super().__init__()
        self.body = nn.Parameter(torch.tensor([body]))
        self.head = nn.Parameter(torch.tensor([head]))


class HeldBack:
    metric = "kept"

    def score(self, model: Any) -> dict[str, float]:
        return {"loss": 0.0, "kept": 1 - abs(model.body.item())}


def averaged(
    average: Any,
    model: Weight,
    metric: Callable[[float], float],
    *,
    lower: Sequence[str] = (),
    held_back: Any = None,
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """Average with the source at 0, the test split's scores being the opposite of validation's."""
    task = SimpleNamespace(metric="m", lower_is_better=tuple(lower))
    stage = SimpleNamespace(lora=None)
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(average=average, output_dir="run"),
        task=task,
        main=SimpleNamespace(stages=[SimpleNamespace(stage=stage)]),
    )
    kept: Any = SimpleNamespace(
        folder=checkpoints, whole=lambda: sorted((checkpoints or Path()).glob("checkpoint-*"))
    )
    models: Any = SimpleNamespace(
        checkpoints=lambda number: kept,
        source=lambda number, which: {"body": torch.tensor([0.0])},
        untouched=lambda number: frozenset(),
    )

    def score(split: str) -> dict[str, float]:
        sign = 1 if split == "validation" else -1
        return {"loss": 1.0, "m": sign * metric(model.body.item())}

    return RunAverage(plan, models, model, score, held_back).run()  # type: ignore[arg-type]


def wise_ft(*alphas: float) -> WiseFtAverage:
    return WiseFtAverage(kind="wise_ft", alphas=alphas)


def test_the_alpha_that_is_best_on_validation_is_chosen_and_in_the_model() -> None:
    model = Weight(1.0)
    found = averaged(wise_ft(0, 0.25, 0.5, 1), model, lambda body: -abs(body - 0.3))
    assert found["chosen"] == 0.25
    assert model.body.item() == 0.25
    assert model.head.item() == 7.0  # new in the source
    assert [one["alpha"] for one in found["candidates"]] == [0, 0.25, 0.5, 1]
    assert found["before"]["eval"]["m"] == pytest.approx(-0.7)
    assert found["before"]["test"]["m"] == pytest.approx(0.7)
    assert all(one.keys() == {"alpha", "eval", "held_back"} for one in found["candidates"])


@pytest.mark.parametrize("order", [(1, 0.5, 0), (0, 0.5, 1)])
def test_of_equal_ones_the_one_nearest_to_the_source_is_chosen(order: tuple[float, ...]) -> None:
    assert averaged(wise_ft(*order), Weight(1.0), lambda body: float(body > 0.2))["chosen"] == 0.5


def test_a_metric_of_which_less_is_better_is_honoured() -> None:
    found = averaged(wise_ft(0, 0.5, 1), Weight(1.0), lambda body: 1 - body, lower=["m"])
    assert found["chosen"] == 1


def test_a_score_that_is_no_number_is_never_chosen() -> None:
    found = averaged(wise_ft(0, 1), Weight(1.0), lambda body: -5.0 if body else float("nan"))
    assert found["chosen"] == 1


def test_what_is_held_back_is_scored_for_each_and_chooses_nothing() -> None:
    found = averaged(wise_ft(0, 0.5, 1), Weight(1.0), lambda body: body, held_back=HeldBack())
    assert found["chosen"] == 1
    assert found["held_back_metric"] == "kept"
    assert [one["held_back"] for one in found["candidates"]] == [1, 0.5, 0]
    assert found["before"]["held_back"] == 0


def test_without_it_there_is_no_held_back_score() -> None:
    found = averaged(wise_ft(0, 1), Weight(1.0), lambda body: body)
    assert found["held_back_metric"] is None
    assert {one["held_back"] for one in found["candidates"]} == {None}


def checkpoints(folder: Path, *bodies: float) -> Path:
    for number, body in enumerate(bodies, start=1):
        (folder / f"checkpoint-{number}").mkdir()
        tensors = {"body": torch.tensor([body]), "head": torch.tensor([1.0])}
        save_file(tensors, folder / f"checkpoint-{number}" / "model.safetensors")
    return folder


def test_uniform_soup_is_the_mean_of_all_checkpoints(tmp_path: Path) -> None:
    model = Weight(9.0)
    soup = SoupAverage(kind="uniform_soup")
    found = averaged(soup, model, lambda _: 0.0, checkpoints=checkpoints(tmp_path, 1.0, 2.0, 6.0))
    assert found["chosen"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert len(found["candidates"]) == 1
    assert model.body.item() == pytest.approx(3)
    assert model.head.item() == pytest.approx(1)


def test_greedy_soup_starts_from_the_best_and_keeps_what_does_not_harm(tmp_path: Path) -> None:
    model = Weight(9.0)
    folder = checkpoints(tmp_path, 4.0, -2.0, 1.5, 0.75)
    soup = SoupAverage(kind="greedy_soup")
    found = averaged(soup, model, lambda body: -abs(body - 1), checkpoints=folder)
    members = [one["members"] for one in found["candidates"]]
    alone = [[f"checkpoint-{number}"] for number in (1, 2, 3, 4)]
    assert members[:4] == alone
    # from the best, 0.75: with 1.5 it is 1.125, better; with 4 2.08, worse; with -2 0.08, worse
    best = ["checkpoint-4", "checkpoint-3"]
    assert members[4:] == [best, [*best, "checkpoint-1"], [*best, "checkpoint-2"]]
    assert found["chosen"] == best
    assert model.body.item() == pytest.approx(1.125)


def test_greedy_soup_takes_in_what_changes_nothing(tmp_path: Path) -> None:
    model = Weight(9.0)
    soup = SoupAverage(kind="greedy_soup")
    found = averaged(soup, model, lambda _: 0.5, checkpoints=checkpoints(tmp_path, 1.0, 3.0))
    assert len(found["chosen"]) == 2
    assert model.body.item() == 2


def test_moving_average_is_what_the_stage_left(tmp_path: Path) -> None:
    model = Weight(9.0)
    save_file({"body": torch.tensor([4.0])}, tmp_path / "ema.safetensors")
    ema = EmaAverage(kind="ema")
    found = averaged(ema, model, lambda body: body, checkpoints=tmp_path)
    assert model.body.item() == 4
    assert (found["chosen"], found["before"]["eval"]["m"]) == (0.999, 9)
    assert [one["eval"]["m"] for one in found["candidates"]] == [4]


# Whole runs

LEARNING = {"learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 4}
ADAPT = {"name": "adapt", "task": "fill-mask", "epochs": 1}
MERGED = {"name": "adapted", "freeze": "backbone", "lora": {"r": 2, "merge": True}, "epochs": 2}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    return write_texts(folder, train=40, validation=16, test=10)


def of_texts(folder: Path, bert: Path, texts: Path, **sections: Any) -> Path:
    data = {"path": str(texts), "validation": "validation", "test": "test"}
    values = {"data": data, "training": LEARNING, **sections}
    if "stages" not in sections:
        values.setdefault("strategy", {"name": "full", "epochs": 2})
    return write_config(folder / "run.yaml", bert, texts, **values)


def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Collect the weights that runs end their training with, before averages."""
    found: list[dict[str, Tensor]] = []
    average = TrialRun._average

    def noted(self: TrialRun, trainer: Any, model: Any) -> dict[str, Any]:
        found.append({name: tensor.clone() for name, tensor in weights_of(model).items()})
        return average(self, trainer, model)

    monkeypatch.setattr(TrialRun, "_average", noted)
    return found


def model_of(run: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(run / "model")


@pytest.mark.slow
def test_model_folder_holds_the_interpolation_and_its_scores(
    tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = in_memory(monkeypatch)
    average = {"kind": "wise_ft", "alphas": [0.5]}
    result = hfft.train(of_texts(tmp_path, bert, texts, average=average))
    found = result.metrics["average"]
    assert found["chosen"] == 0.5
    assert result.metrics["eval"] == found["candidates"][0]["eval"]
    assert result.metrics["eval"] != found["before"]["eval"]
    assert found["before"]["eval"] == pytest.approx(result.stages[-1]["eval"], abs=1e-6)
    plain = hfft.train(of_texts(tmp_path, bert, texts), [f"output_dir={tmp_path / 'plain'}"])
    assert plain.metrics["test"] == pytest.approx(found["before"]["test"], abs=1e-6)
    assert "average" not in plain.metrics
    source = weights_of(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2))
    source = {n: t for n, t in source.items() if not n.startswith(("classifier", "bert.pooler"))}
    [end] = ends
    expected = interpolate(source, end, 0.5)
    own = weights_of(model_of(tmp_path / "run"))
    assert own.keys() == expected.keys()
    for name in own:
        torch.testing.assert_close(own[name], expected[name], rtol=0, atol=1e-7)
    assert torch.equal(own["classifier.weight"], end["classifier.weight"])


@pytest.mark.slow
def test_a_run_tells_its_average_everywhere(tmp_path: Path, bert: Path, texts: Path) -> None:
    config = of_texts(tmp_path, bert, texts, average="wise_ft")
    plan = plan_report(make_plan(load_config(config)))
    assert "Average: wise_ft, the best of 11 weights" in plan
    result = hfft.train(config)
    found = result.metrics["average"]
    told = f"wise_ft at alpha {found['chosen']:g}"
    assert told in result_report(result.task, result.metrics, result.model_dir)
    assert told in (result.model_dir / "README.md").read_text()
    with (tmp_path / "run" / "average.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["alpha"] for row in rows] == [*(str(n / 10) for n in range(11)), "before"]
    [chosen] = [row for row in rows if row["chosen"] == "yes"]
    assert float(chosen["alpha"]) == found["chosen"]
    assert float(chosen["accuracy"]) == result.metrics["eval"]["accuracy"]
    Image.open(tmp_path / "run" / "average.png").verify()
    hfft.train(config, overwrite=True)  # its files are the run's own


@pytest.mark.slow
def test_a_run_with_retention_draws_one_metric_against_the_other(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    corpus = {"path": str(texts), "validation": "validation"}
    config = of_texts(
        tmp_path,
        bert,
        texts,
        average={"kind": "wise_ft", "alphas": [0, 0.5, 1]},
        retention={"task": "fill-mask", "data": corpus},
    )
    result = hfft.train(config)
    found, retained = result.metrics["average"], result.metrics["retention"]
    assert found["held_back_metric"] == retained["metric"]
    by_alpha = {one["alpha"]: one["held_back"] for one in found["candidates"]}
    assert by_alpha[0] == pytest.approx(retained["before"][retained["metric"]], rel=1e-5)
    assert by_alpha[1] == pytest.approx(found["before"]["held_back"], rel=1e-5)
    assert by_alpha[found["chosen"]] == pytest.approx(retained["after"][retained["metric"]])
    assert f"held-back {retained['metric']}" in (tmp_path / "run" / "average.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform_soup", "greedy_soup"])
def test_soup_of_checkpoints_is_of_those_that_are_kept(
    kind: str, tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    average = TrialRun._average

    def noted(self: TrialRun, trainer: Any, model: Any) -> dict[str, Any]:
        for path in self._models.checkpoints(0).whole():
            kept[path.name] = load_file(path / "model.safetensors")
        return average(self, trainer, model)

    monkeypatch.setattr(TrialRun, "_average", noted)
    result = hfft.train(of_texts(tmp_path, bert, texts, average=kind))
    assert list(kept) == ["checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-10"]
    chosen = result.metrics["average"]["chosen"]
    assert set(chosen) <= kept.keys()
    expected = uniform(kept[name] for name in chosen)
    own = weights_of(model_of(tmp_path / "run"))
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-7)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_soup_of_runs_is_of_their_models_and_this_one(
    tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [tmp_path / "a", tmp_path / "b"]
    config = of_texts(tmp_path, bert, texts)
    for seed, folder in enumerate(others, start=1):
        hfft.train(config, [f"output_dir={folder}", f"seed={seed}"])
    ends = in_memory(monkeypatch)
    average = {"kind": "uniform_soup", "of": [str(others[0]), str(others[1] / "model")]}
    result = hfft.train(of_texts(tmp_path, bert, texts, average=average))
    assert result.metrics["average"]["chosen"] == [str(tmp_path / "run"), *average["of"]]
    expected = uniform([ends[0], *(weights_of(model_of(folder)) for folder in others)])
    own = weights_of(model_of(tmp_path / "run"))
    for name in own:
        torch.testing.assert_close(own[name], expected[name], rtol=0, atol=1e-7)
    card = (result.model_dir / "README.md").read_text()
    assert "uniform_soup of run, a, model" in card
    assert str(tmp_path) not in card


AVERAGES: dict[str, dict[str, Any]] = {
    "wise_ft": {"average": "wise_ft"},
    "soup": {"average": "greedy_soup"},
    "ema": {"average": {"kind": "ema", "decay": 0.9}},
    "ema of an adapter": {
        "average": {"kind": "ema", "decay": 0.9},
        "stages": [ADAPT, MERGED],
    },
    "soup of an adapter": {"average": "uniform_soup", "stages": [ADAPT, MERGED]},
    "wise_ft over cached features": {
        "average": {"kind": "wise_ft", "alphas": [0.3]},
        "stages": [ADAPT, {"name": "top", "freeze": 2, "epochs": 2}],
        "feature_cache": "on",
    },
    "ema over cached features": {
        "average": {"kind": "ema", "decay": 0.9},
        "stages": [ADAPT, {"name": "top", "freeze": 2, "epochs": 2}],
        "feature_cache": "on",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AVERAGES)
def test_resumed_run_ends_at_the_same_average_bit_for_bit(
    name: str, tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_texts(tmp_path, bert, texts, **AVERAGES[name])
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    last = 5 if "stages" in AVERAGES[name] else 0  # steps before the last stage
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > last + 7)
    with monkeypatch.context() as patch:  # and once more, after the last stage
        patch.setattr(TrialRun, "_average", stopped)
        with pytest.raises(KeyboardInterrupt):
            hfft.train(config, resume=True)
    hfft.train(config, resume=True)
    whole, again = tmp_path / "whole", tmp_path / "run"
    assert same_weights(whole, again)
    one, other = metrics(whole), metrics(again)
    for key in ("eval", "test", "average"):
        assert one[key] == other[key]


def stopped(self: TrialRun, trainer: Any, model: Any) -> dict[str, Any]:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", AVERAGES)
def test_saved_model_has_the_scores_that_the_run_tells(
    name: str, tmp_path: Path, bert: Path, texts: Path
) -> None:
    """So that features of other weights, or an adapter left out, would show."""
    from hfft.inference import evaluate, open_finished

    config = of_texts(tmp_path, bert, texts, **AVERAGES[name])
    result = hfft.train(config)
    again = evaluate(open_finished(tmp_path / "run"), None, "test")
    assert again["metrics"] == pytest.approx(result.metrics["test"], abs=1e-5)
    average = result.metrics["average"]
    [key] = average["candidates"][0].keys() - {"eval", "held_back"}
    [chosen] = [one for one in average["candidates"] if one[key] == average["chosen"]]
    assert chosen["eval"] == pytest.approx(result.metrics["eval"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["wise_ft", "greedy_soup", "ema"])
@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_images_are_averaged_too_statistics_included(
    average: str, folder: str, tmp_path: Path, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    from hfft.inference import evaluate, open_finished

    source = request.getfixturevalue(folder)
    config = write_images(
        tmp_path / "c.yaml",
        source,
        image_folder,
        average=average,
        strategy={"name": "full", "epochs": 2},
        training={"save_total_limit": 3},
    )
    result = hfft.train(config)
    again = evaluate(open_finished(tmp_path / "run"), None, "validation")
    assert again["metrics"] == pytest.approx(result.metrics["eval"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["wise_ft", "greedy_soup", "ema"])
def test_pairs_of_images_and_texts_are_averaged_too(average: str, tmp_path: Path) -> None:
    model = pair_models.save(pair_models.clip(), tmp_path / "clip")
    pairs = pair_models.write_pairs(tmp_path / "pairs")
    config = pair_models.write_config(tmp_path / "c.yaml", model, pairs, average=average)
    result = hfft.train(config)
    found = result.metrics["average"]
    assert found["metric"] == result.task.metric
    best = [one["eval"][found["metric"]] for one in found["candidates"]]
    if average != "ema":
        assert result.metrics["eval"][found["metric"]] == max(best)


@pytest.mark.slow
def test_a_head_that_the_text_tower_makes_is_interpolated_with_the_rest(tmp_path: Path) -> None:
    """As in the paper: alpha 0 is the zero-shot classifier, bit for bit."""
    model = pair_models.save(pair_models.clip(), tmp_path / "clip")
    colours = pair_models.write_classes(tmp_path / "colours")
    config = pair_models.write_config(
        tmp_path / "c.yaml",
        model,
        colours,
        task={"name": "image-classification", "head": "zero-shot", "augmentation": "none"},
        average={"kind": "wise_ft", "alphas": [0]},
    )
    result = hfft.train(config)
    still = [f"output_dir={tmp_path / 'still'}", "average=null", "training.learning_rate=0.0"]
    hfft.train(config, still)
    assert same_weights(tmp_path / "run", tmp_path / "still")
    assert result.metrics["eval"] == metrics(tmp_path / "still")["eval"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gaps", "texts to go on", "tags", "numbers", "summaries"])
def test_every_kind_of_text_task_goes_by_its_own_metric(case: str, tmp_path: Path) -> None:
    config = write_case(CASES[case], tmp_path, average={"kind": "wise_ft", "alphas": [0, 0.5, 1]})
    result = hfft.train(config)
    found = result.metrics["average"]
    scores = [one["eval"][found["metric"]] for one in found["candidates"]]
    best = min(scores) if found["metric"] in result.task.lower_is_better else max(scores)
    assert result.metrics["eval"][found["metric"]] == pytest.approx(best)
    if case == "texts to go on":  # a new head, if any, or tied weights: the source as it was
        start = weights(tmp_path / "run")
        assert start.keys() == load_file(tmp_path / "source" / "model.safetensors").keys()


@pytest.mark.slow
def test_tied_weights_come_out_as_one_average(tmp_path: Path) -> None:
    """With alpha 0 the model is the source, both ends of the tie included."""
    case = CASES["texts to go on"]
    config = write_case(case, tmp_path, average={"kind": "wise_ft", "alphas": [0]})
    hfft.train(config)
    own, source = weights(tmp_path / "run"), load_file(tmp_path / "source" / "model.safetensors")
    assert own.keys() == source.keys()
    assert all(torch.equal(own[name], source[name]) for name in own)


@pytest.mark.slow
def test_baselines_are_not_averaged(tmp_path: Path, bert: Path, texts: Path) -> None:
    sections: dict[str, Any] = {"baselines": ["scratch", "frozen"]}
    plain = hfft.train(of_texts(tmp_path, bert, texts, **sections))
    sections["average"] = {"kind": "wise_ft", "alphas": [0.5]}
    again = [f"output_dir={tmp_path / 'averaged'}"]
    found = hfft.train(of_texts(tmp_path, bert, texts, **sections), again)
    assert found.metrics["baselines"] == plain.metrics["baselines"]


@pytest.mark.slow
def test_a_run_of_other_weights_than_it_says_is_refused_by_name(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    """A member whose file lacks its head, though its config has it."""
    config = of_texts(tmp_path, bert, texts)
    hfft.train(config, [f"output_dir={tmp_path / 'a'}"])
    path = tmp_path / "a" / "model" / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if not n.startswith("classifier")}
    save_file(kept, path, metadata={"format": "pt"})
    average = {"kind": "uniform_soup", "of": [str(tmp_path / "a")]}
    with pytest.raises(InputError, match=r"average\.of\.0: .*a: .*head is new"):
        hfft.train(of_texts(tmp_path, bert, texts, average=average))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, bert: Path, texts: Path) -> dict[str, Path]:
    """Runs of one process, and of two in one launch, by average."""
    found, commands = {}, []
    sgd = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, **LEARNING}
    names = ("wise_ft", "soup", "ema", "soup of an adapter", "wise_ft over cached features")
    for name in names:
        folder = found[name] = tmp_path_factory.mktemp("run")
        sections = {**AVERAGES[name], "training": {**sgd, "learning_rate": 0.05}}
        config = of_texts(folder, bert, texts, **sections)
        halved = "training.per_device_train_batch_size=4"
        commands.append([str(config), f"output_dir={folder / 'two'}", halved])
    train_on_two(commands, tmp_path_factory.mktemp("list"))
    for name in names:
        hfft.train(found[name] / "run.yaml")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["wise_ft", "soup", "ema", "soup of an adapter", "wise_ft over cached features"]
)
def test_two_processes_average_as_one(name: str, two: dict[str, Path]) -> None:
    own, other = weights(two[name] / "run"), weights(two[name] / "two")
    for key in own:
        torch.testing.assert_close(own[key], other[key], rtol=0, atol=1e-4)
    one, both = metrics(two[name] / "run"), metrics(two[name] / "two")
    assert both["average"]["chosen"] == one["average"]["chosen"]
    for first, second in zip(
        one["average"]["candidates"], both["average"]["candidates"], strict=True
    ):
        assert first["eval"] == pytest.approx(second["eval"], abs=1e-4)
    environment = json.loads((two[name] / "two" / "environment.json").read_text())
    assert environment["num_processes"] == 2


def test_loading_and_reading_weights_agree() -> None:
    model, other = Weight(1.0), Weight(2.0, 3.0)
    load_weights_into(model, weights_of(other))
    assert (model.body.item(), model.head.item()) == (2, 3)
