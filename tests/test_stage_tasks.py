"""Stages with tasks of their own on one body: adapt on unlabelled text, then classify."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

import hfft
from hfft.config_file import load_config
from hfft.plan import make_plan
from hfft.report import plan_report, result_report
from hfft.trainer import StageTrainer

from .runs import log, losses, metrics, same_weights, weights
from .test_run import kill
from .text_runs import bert_folder, write_config, write_corpus, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_corpus(folder / "corpus.txt", 40)
    return write_texts(folder / "labelled", train=32, validation=12, test=12)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


def stages(texts: Path, **whole: Any) -> list[dict[str, Any]]:
    corpus = {"path": str(texts.parent / "corpus.txt")}
    return [
        {"name": "adapt", "task": "fill-mask", "data": corpus, "epochs": 1, "learning_rate": 5e-3},
        {"name": "head", "freeze": "backbone", "epochs": 1},
        {"name": "whole", **({} if "steps" in whole else {"epochs": 1}), **whole},
    ]


def config_of(tmp_path: Path, bert: Path, texts: Path, **sections: Any) -> Path:
    sections = {"stages": stages(texts), **sections}
    return write_config(tmp_path / "run.yaml", bert, texts, **sections)


def body(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if n.startswith("bert.") and "pooler" not in n}


def trained_from(config: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Run a config; return the tensors that each stage starts with."""
    kept: dict[str, dict[str, torch.Tensor]] = {}
    train = StageTrainer.train

    def keep(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        tensors = {n: t.clone() for n, t in self._bare_model().state_dict().items()}
        kept[Path(str(self.args.output_dir)).name] = tensors
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "train", keep)
        hfft.train(config)
    return kept


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in body(one))


def test_one_run_adapts_then_trains_the_head_then_everything(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    data = {"path": str(texts), "validation": "validation", "test": "test"}
    result = hfft.train(config_of(tmp_path, bert, texts, data=data, baselines=["frozen"]))
    adapt, head, whole = result.stages
    assert (adapt["task"], "task" in head, "task" in whole) == ("fill-mask", False, False)
    assert set(adapt["eval"]) >= {"perplexity", "token_accuracy"}
    assert set(result.metrics["test"]) >= {"accuracy", "macro_f1"}
    # 36 of the 40 texts, by eights
    assert adapt["steps"] == 5
    assert {e["stage"] for e in log(tmp_path / "run")} == {"adapt", "head", "whole", "frozen"}
    model = pipeline("text-classification", model=str(result.model_dir))
    assert model("a fine film")[0]["label"] in ("bad", "good")
    text = result_report(result.task, result.metrics, result.model_dir)
    assert "perplexity" in text


def test_the_adapted_body_is_what_the_head_is_trained_on(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    """What a stage ends with is kept until the next has ended, so a run is stopped there."""
    config = config_of(tmp_path, bert, texts)

    def stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        stage = {"adapt": 0, "head": 1, "whole": 2}[name]
        kill(config, monkeypatch, lambda t: f"{stage:02d}-{name}" in str(t.args.output_dir))

    with pytest.MonkeyPatch.context() as patch:
        stopped("head", patch)
    adapted = load_file(tmp_path / "run/checkpoints/main/00-adapt/finished/model.safetensors")
    original = AutoModelForSequenceClassification.from_pretrained(bert).state_dict()
    assert far(adapted, original) > 1e-3
    hfft.train(config, ["stages.2.learning_rate=0.0"], overwrite=True)
    final = weights(tmp_path / "run")
    assert far(adapted, final) == 0
    assert not any(name.startswith("cls.") for name in final)


@pytest.mark.parametrize("steps_survived", [2, 5, 7, 9, 10, 12])
def test_a_run_killed_in_any_stage_goes_on_as_if_it_had_not_been(
    steps_survived: int,
    tmp_path: Path,
    bert: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Adapting takes 5 steps, each stage after it 4."""
    config = config_of(
        tmp_path,
        bert,
        texts,
        stages=stages(texts, penalty={"kind": "l2_sp", "strength": 0.5, "source": "adapted"}),
        training={"save_strategy": "steps", "save_steps": 2},
    )
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > steps_survived)
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    whole, run = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert [s["eval"] for s in whole["stages"]] == [s["eval"] for s in run["stages"]]
    assert whole["eval"] == run["eval"]


@pytest.mark.parametrize("source", ["original", "adapted"])
def test_a_penalty_pulls_to_the_original_or_to_the_adapted_weights(
    source: str, tmp_path: Path, bert: Path, texts: Path
) -> None:
    """A pull that is all there is draws the body to its source, and not to the other."""
    strong = {"kind": "l2_sp", "strength": 1.0, "mode": "decoupled", "source": source}
    whole = {"penalty": strong, "learning_rate": 0.5, "steps": 40}
    sgd = {"optim": "sgd", "max_grad_norm": 1e-9, "lr_scheduler_type": "constant"}
    config = config_of(tmp_path, bert, texts, stages=stages(texts, **whole), training=sgd)
    config_text = yaml.safe_load(config.read_text())
    config_text["stages"][0]["learning_rate"] = 1e8  # against the clipping: it moves by 0.1 a step
    config_text["stages"][1]["learning_rate"] = 0.0
    config.write_text(yaml.safe_dump(config_text))
    kept = trained_from(config)
    original, adapted = kept["00-adapt"], kept["02-whole"]
    final = weights(tmp_path / "run")
    assert far(adapted, original) > 1e-2
    near, other = (original, adapted) if source == "original" else (adapted, original)
    assert far(final, near) < 1e-4
    assert far(final, other) > 1e-2


def test_stages_of_one_task_share_its_head(tmp_path: Path, bert: Path, texts: Path) -> None:
    first, head, whole = stages(texts)
    second = {**first, "name": "adapt-more"}
    config = config_of(tmp_path, bert, texts, stages=[first, second, head, whole])
    plan = make_plan(load_config(config))
    subjects = [stage.subject for stage in plan.main.stages]
    assert subjects[0] is subjects[1]
    assert subjects[2] is subjects[3] is plan.subject
    result = hfft.train(config)
    one, other = (stage["eval"]["loss"] for stage in result.stages[:2])
    assert other < one


def test_a_stage_without_data_of_its_own_reads_the_runs(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    adapt, head, whole = stages(texts)
    del adapt["data"]
    columns = {"text": "text", "label": "label"}
    data = {"path": str(texts), "validation": "validation", "test": "test", "columns": columns}
    config = config_of(tmp_path, bert, texts, stages=[adapt, head, whole], data=data)
    plan = make_plan(load_config(config))
    adapting = plan.main.stages[0].subject
    assert {name: len(e) for name, e in adapting.examples.items()} == {
        "train": 32,
        "validation": 12,
    }
    text = plan_report(plan)
    assert "task    fill-mask" in text
    assert "task    text-classification" in text
    pasted = yaml.safe_load(text.partition("The stages as YAML:")[2])
    assert pasted["stages"][0]["task"] == {"name": "fill-mask"}


def test_baselines_are_of_the_runs_task_and_as_long_as_its_stages(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    config = config_of(tmp_path, bert, texts, baselines=["scratch", "frozen"])
    plan = make_plan(load_config(config))
    assert [stage.steps for stage in plan.main.stages] == [5, 4, 4]
    assert [trial.stages[0].steps for trial in plan.baselines] == [8, 8]
    assert all(trial.stages[0].subject is plan.subject for trial in plan.baselines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s.reverse(),
            "stages: the last one has a task of its own",
        ),
        (
            lambda s: s[0].pop("task"),
            r"stages.0: data goes with task",
        ),
        (
            lambda s: s[0].update(task="fill-masks"),
            r"stages.0.task: .*did you mean 'fill-mask'",
        ),
        (
            lambda s: s[0].update(task={"name": "fill-mask", "mask_probabilty": 0.3}),
            r"stages.0.task.mask_probabilty: unknown key; did you mean 'mask_probability'",
        ),
        (
            lambda s: s[0].update(data={"path": "nowhere.txt"}),
            r"stages.0: data.path: there is no file or folder \"nowhere.txt\"",
        ),
        (
            lambda s: s[0].update(penalty={"kind": "l2_sp", "strength": 1.0, "source": "adapted"}),
            r"stages.0.penalty.source: adapted: no stage before it has another task",
        ),
        (
            lambda s: s[2].update(penalty={"kind": "l2_sp", "strength": 1.0, "source": "adaptd"}),
            r"stages.2.penalty.source: .*did you mean 'adapted'",
        ),
    ],
)
def test_what_is_wrong_with_a_stages_task_is_named(
    change: Any, said: str, tmp_path: Path, bert: Path, texts: Path
) -> None:
    own = stages(texts)
    change(own)
    config = config_of(tmp_path, bert, texts, stages=own)
    with pytest.raises(hfft.InputError, match=said):
        hfft.train(config)
    assert not (tmp_path / "run").exists()


def test_stages_of_one_task_on_other_data_go_on_with_the_head(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    adapt, head, whole = stages(texts)
    more = write_corpus(tmp_path / "more.txt", 24)
    second = {**adapt, "name": "again", "data": {"path": str(more)}, "learning_rate": 0.0}
    config = config_of(tmp_path, bert, texts, stages=[adapt, second, head, whole])
    kept = trained_from(config)
    name = "cls.predictions.transform.dense.weight"
    original = load_file(bert / "model.safetensors")[name]
    assert (kept["01-again"][name] - original).abs().max() > 1e-3
    plan = make_plan(load_config(config))
    assert plan.main.stages[0].subject is not plan.main.stages[1].subject


def test_a_default_that_is_spelt_out_makes_no_other_task(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    _, head, whole = stages(texts)
    head["task"] = {"name": "text-classification", "overlong": "truncate"}
    plan = make_plan(load_config(config_of(tmp_path, bert, texts, stages=[head, whole])))
    assert plan.main.stages[0].subject is plan.main.stages[1].subject


def test_what_the_source_lacks_learns_with_the_head(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    """A masked language model has no pooler, which a classifier looks through."""
    plan = make_plan(load_config(config_of(tmp_path, bert, texts)))
    head = plan.main.stages[1]
    assert {name for name in head.subject.sizes if "pooler" in name} <= head.subject.new
    assert not any("pooler" in name for name in head.frozen)
    assert head.trainable_parameters == 16 * 16 + 16 + 16 * 2 + 2


def test_what_is_said_of_a_stages_own_data_names_the_stage(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    plan = make_plan(load_config(config_of(tmp_path, bert, texts)))
    [held_out] = [note for note in plan.notes if "held out" in note]
    assert held_out.startswith("stages.0: data.validation is left out")
    with pytest.raises(hfft.InputError, match=r"stages.0: batch_tokens: 5 tokens hold no example"):
        hfft.train(config_of(tmp_path, bert, texts, batch_tokens=5))


@pytest.mark.parametrize("better", [{}, {"greater_is_better": True}])
def test_stages_of_another_task_keep_their_best_by_the_loss(
    better: dict[str, Any], tmp_path: Path, bert: Path, texts: Path
) -> None:
    training = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", **better}
    result = hfft.train(config_of(tmp_path, bert, texts, training=training))
    assert "accuracy" in result.metrics["eval"]
