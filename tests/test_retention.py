"""A second task, scored with the source and with what fine-tuning made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

import hfft
from hfft.config_file import load_config
from hfft.inference import evaluate, open_finished
from hfft.plan import make_plan
from hfft.report import plan_report, result_report
from hfft.retention import Retention
from hfft.source import load_weights

from . import pair_models, runs
from .runs import metrics, same_weights
from .test_processes import train_on_two
from .test_run import kill
from .text_runs import bert_folder, write_config, write_corpus, write_texts

ZERO_SHOT = {"name": "zero-shot-image-classification", "templates": ["a photo of a {} ."]}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_corpus(folder / "corpus.txt", 20)
    return write_texts(folder / "labelled", train=32, validation=12)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_models.write_classes(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_models.save(pair_models.clip(), tmp_path_factory.mktemp("clip"))


def of_texts(folder: Path, bert: Path, texts: Path, **sections: Any) -> Path:
    corpus = {"path": str(texts.parent / "corpus.txt")}
    retention = {"task": "fill-mask", "data": corpus}
    return write_config(folder / "run.yaml", bert, texts, **{"retention": retention, **sections})


def of_images(folder: Path, clip: Path, colours: Path, **sections: Any) -> Path:
    """Train a classifier of shapes' places; the colours are what the source knows."""
    return pair_models.write_config(
        folder / "run.yaml",
        clip,
        by_place(folder / "places"),
        **{
            "task": {"name": "image-classification", "augmentation": "none"},
            "retention": {"task": ZERO_SHOT, "data": {"path": str(colours)}},
            **sections,
        },
    )


def by_place(folder: Path) -> Path:
    for split in ("train", "validation"):
        for colour in pair_models.COLOURS:
            for place in pair_models.PLACES:
                pair_models.picture(colour, place, folder / split / place / f"{colour}.png")
    return folder


def zero_shot_accuracy(model: Any, folder: Path, names: Sequence[str]) -> float:
    """What transformers alone makes of pictures in folders by class."""
    words = pair_models.tokenizer()([f"a photo of a {n} ." for n in names], return_tensors="pt")
    ids = {name: words[name] for name in ("input_ids", "attention_mask")}
    right = []
    for number, name in enumerate(names):
        for path in sorted((folder / name).iterdir()):
            pixels = pair_models.image_processor()(Image.open(path), return_tensors="pt")
            with torch.no_grad():
                logits = model(**pixels, **ids).logits_per_image
            right.append(logits.argmax().item() == number)
    return sum(right) / len(right)


def test_a_masked_language_model_is_scored_before_and_after_it_learns_to_classify(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    result = hfft.train(of_texts(tmp_path, bert, texts, training={"learning_rate": 1e-2}))
    found = metrics(tmp_path / "run")["retention"]
    assert (found["task"], found["metric"]) == ("fill-mask", "perplexity")
    assert found["data"] == str(texts.parent / "corpus.txt")
    assert found["change"] == found["after"]["perplexity"] - found["before"]["perplexity"] != 0
    # the same by other ways: the source alone, and the source's head on the trained body
    corpus = str(texts.parent / "corpus.txt")
    alone = evaluate(open_finished(bert), corpus, None)["metrics"]
    assert found["before"] == pytest.approx(alone)
    model = hf.BertForMaskedLM.from_pretrained(bert)
    trained = hf.BertForSequenceClassification.from_pretrained(result.model_dir)
    model.bert.load_state_dict(trained.bert.state_dict(), strict=False)
    shutil.copytree(bert, tmp_path / "put-together")
    model.save_pretrained(tmp_path / "put-together")
    after = evaluate(open_finished(tmp_path / "put-together"), corpus, None)["metrics"]
    assert found["after"] == pytest.approx(after)
    said = result_report(result.task, result.metrics, result.model_dir)
    assert f"Retention, fill-mask on {corpus}: perplexity" in said
    assert "## Retention: fill-mask on corpus.txt" in (result.model_dir / "README.md").read_text()


def test_zero_shot_accuracy_before_and_after_is_that_of_transformers(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    training = {"num_train_epochs": 2, "learning_rate": 1e-2, "use_cpu": True}
    result = hfft.train(of_images(tmp_path, clip, colours, training=training))
    found = result.metrics["retention"]
    model = hf.CLIPModel.from_pretrained(clip)
    names = sorted(pair_models.COLOURS)
    expected = zero_shot_accuracy(model, colours / "validation", names)
    assert found["before"]["zero_shot_accuracy"] == pytest.approx(expected)
    trained = hf.CLIPForImageClassification.from_pretrained(result.model_dir)
    model.vision_model.load_state_dict(trained.vision_model.state_dict())
    expected = zero_shot_accuracy(model, colours / "validation", names)
    assert found["after"]["zero_shot_accuracy"] == pytest.approx(expected)
    assert found["before"]["loss"] != found["after"]["loss"]


@pytest.mark.slow
def test_a_zero_shot_model_takes_its_projections_and_scale_along(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    """The same class of model, on other data: nothing of the source is left in it."""
    places = by_place(tmp_path / "places")
    config = pair_models.write_config(
        tmp_path / "run.yaml",
        clip,
        places,
        task={**ZERO_SHOT, "augmentation": "none"},
        retention={"task": ZERO_SHOT, "data": {"path": str(colours)}},
    )
    result = hfft.train(config)
    found = result.metrics["retention"]
    again = evaluate_as(result.model_dir, colours)
    assert found["after"] == pytest.approx(again)
    assert found["before"] == pytest.approx(evaluate_as(clip, colours))


def evaluate_as(model: Path, folder: Path) -> dict[str, float]:
    """Score a model on classes of its own, as a run that learns nothing does."""
    config = pair_models.write_config(
        model.parent / "probe.yaml",
        model,
        folder,
        task={**ZERO_SHOT, "augmentation": "none"},
        output_dir=str(model.parent / "probe"),
        training={"learning_rate": 0.0, "max_steps": 1, "weight_decay": 0.0, "use_cpu": True},
    )
    chosen = ["data.validation=validation"]
    found: dict[str, float] = hfft.train(config, chosen, overwrite=True).metrics["eval"]
    return found


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory, vit_folder: Path) -> Path:
    """A ViT that has a head for the colours of `image_folder`, and one more class."""
    folder = tmp_path_factory.mktemp("knowing") / "vit"
    shutil.copytree(vit_folder, folder)
    config = hf.ViTConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(["10", "2", "1", "other"]))
    config.label2id = {name: number for number, name in config.id2label.items()}
    torch.manual_seed(0)
    hf.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def of_classes(folder: Path, model: Path, images: Path, **sections: Any) -> Path:
    data = {"path": str(images), "validation": "test"}
    retention = {"task": "image-classification", "data": data}
    places = by_place(folder / "places")
    return runs.write_config(
        folder / "run.yaml", model, places, **{"retention": retention, **sections}
    )


@pytest.mark.slow
def test_the_sources_head_scores_a_body_that_learnt_other_classes(
    tmp_path: Path, knowing: Path, image_folder: Path
) -> None:
    """The data name fewer classes than the source, in another order."""
    result = hfft.train(of_classes(tmp_path, knowing, image_folder))
    found = result.metrics["retention"]
    alone = evaluate(open_finished(knowing), str(image_folder), "test")["metrics"]
    assert found["before"] == pytest.approx(alone)
    model = hf.ViTForImageClassification.from_pretrained(knowing)
    trained = hf.ViTForImageClassification.from_pretrained(result.model_dir)
    model.vit.load_state_dict(trained.vit.state_dict())
    shutil.copytree(knowing, tmp_path / "put-together")
    model.save_pretrained(tmp_path / "put-together")
    after = evaluate(open_finished(tmp_path / "put-together"), str(image_folder), "test")
    assert found["after"] == pytest.approx(after["metrics"])
    assert found["after"]["loss"] != found["before"]["loss"]


def test_scoring_leaves_the_trained_model_and_the_generators_alone(
    tmp_path: Path, clip: Path, colours: Path
) -> None:
    plan = make_plan(load_config(of_images(tmp_path, clip, colours)))
    assert plan.retention is not None
    retention = Retention(plan.config, plan.retention, tmp_path / "kept" / "before.json")
    auto, subject = plan.task.auto_model, plan.subject
    model = load_weights(auto, plan.config.model, subject.model_config).model
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    before = retention.before()
    assert retention.score(model) == pytest.approx(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "kept" / "before.json").read_text()) == before


@pytest.mark.slow
def test_a_run_with_retention_trains_as_one_without(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    config = of_texts(tmp_path, bert, texts)
    hfft.train(config)
    hfft.train(config, ["retention=null", f"output_dir={tmp_path / 'without'}"])
    assert same_weights(tmp_path / "run", tmp_path / "without")
    assert "retention" not in metrics(tmp_path / "without")


@pytest.mark.slow
def test_the_score_before_survives_a_resumed_run(
    tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_texts(tmp_path, bert, texts, training={"save_strategy": "steps", "save_steps": 1})
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > 2)
    kept = tmp_path / "run" / "checkpoints" / "retention" / "before.json"
    before = json.loads(kept.read_text())
    assert before == metrics(tmp_path / "whole")["retention"]["before"]
    monkeypatch.setattr(Retention, "_source", refuse_once(Retention._source))
    hfft.train(config, resume=True)
    assert metrics(tmp_path / "run")["retention"] == metrics(tmp_path / "whole")["retention"]
    assert not kept.exists()


def refuse_once(source: Any) -> Any:
    """Load the source for the score after only."""
    calls = count(1)

    def load(self: Retention) -> Any:
        assert next(calls) == 1
        return source(self)

    return load


def test_the_plan_tells_what_is_scored_before_and_after(
    tmp_path: Path, bert: Path, texts: Path
) -> None:
    text = plan_report(make_plan(load_config(of_texts(tmp_path, bert, texts))))
    part = text.partition("Scored before and after")[2]
    assert "task    fill-mask" in part
    assert "20 validation" in part


@pytest.mark.slow
def test_other_data_to_be_scored_on_are_not_resumed_with(
    tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "own.txt", 8)
    retention = {"task": "fill-mask", "data": {"path": str(corpus)}}
    config = of_texts(
        tmp_path,
        bert,
        texts,
        retention=retention,
        training={"save_strategy": "steps", "save_steps": 1},
    )
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > 2)
    write_corpus(corpus, 12)
    with pytest.raises(hfft.InputError, match="the data has changed"):
        hfft.train(config, resume=True)


@pytest.mark.parametrize(
    ("retention", "said"),
    [
        (
            {"task": "fill-masks", "data": {"path": "corpus.txt"}},
            r"retention.task: .*did you mean 'fill-mask'",
        ),
        (
            {"task": {"name": "fill-mask", "mask_probabilty": 0.1}, "data": {"path": "x.txt"}},
            r"retention.task.mask_probabilty: unknown key",
        ),
        (
            {"task": "fill-mask", "data": {"path": "nowhere.txt"}},
            r"retention: data.path: there is no file or folder \"nowhere.txt\"",
        ),
        (
            {"task": "fill-mask", "data": {"path": "corpus.txt", "train": "train"}},
            r"nothing is trained on it; name its split as validation",
        ),
        (
            {"task": "fill-mask", "data": {"path": "x", "validation": "a", "test": "b"}},
            r"one split is scored; keep one of them",
        ),
        (
            {"task": "text-classification", "data": {"path": "labelled"}},
            r"retention.task: text-classification of .*bad.*lacks \d weights of a "
            r"BertForSequenceClassification.*it was trained for",
        ),
    ],
)
def test_what_cannot_be_scored_before_is_found_in_the_plan(
    retention: Any, said: str, tmp_path: Path, bert: Path, texts: Path
) -> None:
    path = texts.parent / retention["data"]["path"]
    if path.exists():
        retention = {**retention, "data": {**retention["data"], "path": str(path)}}
    with pytest.raises(hfft.InputError, match=said):
        make_plan(load_config(of_texts(tmp_path, bert, texts, retention=retention)))


def test_classes_that_the_source_has_no_head_for_are_told(
    tmp_path: Path, knowing: Path, colours: Path, image_folder: Path
) -> None:
    retention = {"task": "image-classification", "data": {"path": str(colours)}}
    config = of_classes(tmp_path, knowing, image_folder, retention=retention)
    with pytest.raises(hfft.InputError, match=r"image-classification of \S*black.*its classes"):
        make_plan(load_config(config))


def test_towers_that_have_not_met_have_nothing_to_forget(tmp_path: Path, colours: Path) -> None:
    vision = pair_models.save(pair_models.dual().vision_model, tmp_path / "vision")
    text = pair_models.save(pair_models.dual().text_model, tmp_path / "text")
    config = pair_models.write_config(
        tmp_path / "run.yaml",
        {"towers": {"image": str(vision), "text": str(text)}},
        pair_models.write_pairs(tmp_path / "pairs"),
        retention={"task": ZERO_SHOT, "data": {"path": str(colours)}},
    )
    with pytest.raises(hfft.InputError, match=r"retention.task: zero-shot-image-classification of"):
        make_plan(load_config(config))


@pytest.mark.slow
def test_two_processes_score_before_and_after_as_one(
    tmp_path: Path, bert: Path, texts: Path, clip: Path, colours: Path
) -> None:
    sgd = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "num_train_epochs": 1}
    one = {"per_device_eval_batch_size": 5, "use_cpu": True}
    made = {  # steps of examples that both can share evenly
        of_texts(tmp_path / "texts", bert, texts, training={**sgd, **one}): 8,
        of_images(tmp_path / "images", clip, colours, training={**sgd, **one}): 6,
    }
    size, given = "training.per_device_train_batch_size", "data.validation=validation"
    commands = [
        [str(config), f"output_dir={config.parent / 'two'}", given, f"{size}={of_step // 2}"]
        for config, of_step in made.items()
    ]
    train_on_two(commands, tmp_path)
    for config, of_step in made.items():
        hfft.train(config, [given, f"{size}={of_step}"])
        environment = json.loads((config.parent / "two" / "environment.json").read_text())
        assert environment["num_processes"] == 2
        two, single = (metrics(config.parent / name)["retention"] for name in ("two", "run"))
        for which in ("before", "after"):
            assert two.pop(which) == pytest.approx(single.pop(which), rel=1e-5, abs=1e-6)
        assert two.pop("change") == pytest.approx(single.pop("change"), rel=1e-3, abs=1e-5)
        assert two == single
