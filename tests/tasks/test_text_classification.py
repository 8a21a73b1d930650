from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional

from hfft.models.pooled import PooledConfig, PooledForSequenceClassification
from hfft.sections import ModelConfig
from hfft.source import load_weights, read_model_config
from hfft.task import IGNORED, InputError, Split
from hfft.tasks.text_classification import ClassificationOptions, TextClassification
from tests.text_models import SIZES, WORDS, causal_folder, classifier_folder, tokenizer

LABELS = ["bad", "good", "1", "10"]
MULTI, NUMBER = "multi_label_classification", "regression"
TEXTS = ["a good film", "bad", "seen by many people", "was a film"]
PAIRS = ["bad film", "many", "a", "few people was seen by a good film"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose tokenizer tells the texts of a pair apart, as the Hub's do."""
    folder = classifier_folder(tmp_path_factory.mktemp("bert"))
    own = tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    own.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as the Hub's, without a padding token; its tokenizer was used to generate."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
    ends = {"bos_token_id": 3, "eos_token_id": 3}
    config = hf.GPT2Config(vocab_size=len(WORDS), **sizes, **ends)
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        eos_token="[SEP]",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def made(**options: Any) -> TextClassification:
    return TextClassification(ClassificationOptions.model_validate(options))


def prepared(folder: Path, **options: Any) -> tuple[TextClassification, Any, Any]:
    """A task on a model: the task, the model's config, the processor."""
    task = made(**options)
    source = ModelConfig(name=str(folder))
    labels = [] if options.get("problem_type") == NUMBER else LABELS
    config = task.configure(read_model_config(source), labels)
    return task, config, task.load_processor(source, config)


def model_of(folder: Path, task: TextClassification, config: Any) -> Any:
    return load_weights(task.auto_model, ModelConfig(name=str(folder)), config).model.eval()


def batch_of(
    task: TextClassification, config: Any, processor: Any, rows: dict[str, list[Any]]
) -> dict[str, Any]:
    """What the engine makes of rows: encoded, transformed one by one, collated."""
    encode = task.encode(processor, config)
    assert encode is not None
    columns = encode({**rows, "index": list(range(len(rows["text"])))})
    transform = task.transform(processor, training=True)
    singles = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return task.collator(processor, config)([transform(single) for single in singles])


def split(labels: Any = LABELS) -> Split:
    return Split(None, None, labels)


@pytest.mark.parametrize("folder", ["bert", "llama"])
@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_inputs_are_the_tokenizers_own(
    folder: str, pairs: list[str] | None, request: pytest.FixtureRequest
) -> None:
    task, config, processor = prepared(request.getfixturevalue(folder))
    rows = {"text": TEXTS, "label": [0, 1, 2, 3]} | ({"text_pair": pairs} if pairs else {})
    batch = batch_of(task, config, processor, rows)
    assert batch.pop("labels").tolist() == [0, 1, 2, 3]
    own = processor(TEXTS, pairs, padding=True, return_tensors="pt")
    assert batch.keys() == own.keys()
    assert all(torch.equal(batch[name], own[name]) for name in own)


def test_native_logits_are_those_of_transformers_bit_for_bit(bert: Path) -> None:
    task, config, processor = prepared(bert)
    torch.manual_seed(1)
    model = model_of(bert, task, config)
    assert type(model) is hf.BertForSequenceClassification
    torch.manual_seed(1)
    own = hf.BertForSequenceClassification.from_pretrained(bert, num_labels=len(LABELS)).eval()
    batch = batch_of(task, config, processor, {"text": TEXTS, "label": [0, 1, 2, 3]})
    labels = batch.pop("labels")
    output = model(**batch)
    wanted = own(**processor(TEXTS, padding=True, return_tensors="pt"), labels=labels)
    assert torch.equal(output.logits, wanted.logits)
    assert torch.allclose(task.loss(output, labels), wanted.loss)
    assert config.id2label == dict(enumerate(LABELS))
    assert config.label2id == {label: number for number, label in enumerate(LABELS)}


@pytest.mark.parametrize(
    ("folder", "pooling"),
    [(name, how) for name in ("gpt2", "llama", "bert") for how in ("auto", "mean", "max", "last")],
)
def test_padding_changes_no_logits(
    folder: str, pooling: str, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    task, config, processor = prepared(source, head={"pooling": pooling})
    model = model_of(source, task, config)
    rows = {"text": TEXTS, "label": [0, 1, 2, 3]}
    batch = batch_of(task, config, processor, rows)
    del batch["labels"]
    assert (batch["attention_mask"] == 0).any()
    together = model(**batch).logits
    for number, text in enumerate(TEXTS):
        alone = model(**processor(text, return_tensors="pt")).logits[0]
        assert torch.allclose(together[number], alone, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("folder", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_what_is_saved_works_in_a_pipeline_of_batches(
    folder: str, pooling: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(folder)
    task, config, processor = prepared(source, head={"pooling": pooling})
    model_of(source, task, config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    run = hf.pipeline("text-classification", model=str(tmp_path))
    one, many = (run(TEXTS, batch_size=size, top_k=None) for size in (1, 4))
    for alone, together in zip(one, many, strict=True):
        assert {s["label"] for s in alone} == set(LABELS)
        assert [s["score"] for s in alone] == pytest.approx(
            [s["score"] for s in together], abs=1e-6
        )


def test_padding_number_of_a_decoder_is_its_tokenizers(gpt2: Path, tmp_path: Path) -> None:
    hf.AutoTokenizer.from_pretrained(gpt2).save_pretrained(tmp_path)
    model = hf.GPT2LMHeadModel.from_pretrained(gpt2)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    _, config, processor = prepared(tmp_path)
    assert config.pad_token_id == processor.pad_token_id == 3


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [("auto", hf.BertForSequenceClassification), ("mean", PooledForSequenceClassification)],
)
def test_pooling_decides_on_the_class_of_the_model(bert: Path, pooling: str, kind: Any) -> None:
    task, config, _ = prepared(bert, head={"pooling": pooling})
    model = model_of(bert, task, config)
    assert type(model) is kind
    assert model.config.problem_type == "single_label_classification"
    assert model.config.id2label == dict(enumerate(LABELS))


def test_saved_pooled_model_is_a_source_with_its_own_head(bert: Path, tmp_path: Path) -> None:
    task, config, processor = prepared(bert, head={"pooling": "max"})
    model_of(bert, task, config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    task, config, _ = prepared(tmp_path)
    assert isinstance(config, PooledConfig)
    assert config.pooling == "max"
    assert not load_weights(task.auto_model, ModelConfig(name=str(tmp_path)), config).new_head


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_longer_texts_are_cut_as_the_tokenizer_does_and_marked(
    bert: Path, pairs: list[str] | None
) -> None:
    task, config, processor = prepared(bert, max_length=5)
    encode = task.encode(processor, config)
    assert encode is not None
    rows = {"text": TEXTS, "label": [0, 1, 2, 3]} | ({"text_pair": pairs} if pairs else {})
    columns = pickle.loads(pickle.dumps(encode))(rows)
    own = processor(TEXTS, pairs, truncation=True, max_length=5)
    assert columns["input_ids"] == own["input_ids"]
    assert columns["token_type_ids"] == own["token_type_ids"]
    whole = processor(TEXTS, pairs)["input_ids"]
    assert columns["truncated"] == [len(ids) > 5 for ids in whole]
    assert len(set(columns["truncated"])) == 2
    assert columns["label"] == rows["label"]


def test_overlong_says_whether_texts_may_be_cut() -> None:
    assert made().truncates
    assert not made(overlong="error").truncates


def test_more_tokens_than_the_model_takes_are_refused(bert: Path) -> None:
    task, config, processor = prepared(bert, max_length=33)
    with pytest.raises(InputError, match=r"task\.max_length: 33 tokens are more"):
        task.encode(processor, config)


@pytest.mark.parametrize(
    ("problem_type", "role", "kind", "metric"),
    [
        ("single_label_classification", "label", "label", "accuracy"),
        (MULTI, "labels", "labels", "macro_f1"),
        (NUMBER, "label", "number", "spearman"),
    ],
)
def test_problem_type_decides_on_column_and_metric(
    problem_type: str, role: str, kind: str, metric: str
) -> None:
    task = made(problem_type=problem_type)
    assert list(task.columns) == ["text", "text_pair", role]
    assert task.columns[role].kind == kind
    assert [r for r, column in task.columns.items() if column.optional] == ["text_pair"]
    assert task.metric == task.metric_names[0] == metric
    assert ("mse" in task.lower_is_better) == (problem_type == NUMBER)


def test_several_labels_become_ones_and_zeros(bert: Path) -> None:
    task, config, processor = prepared(bert, problem_type=MULTI)
    rows = {"text": TEXTS, "labels": [[0, 3], [], [1], [3]]}
    labels = batch_of(task, config, processor, rows)["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_regression_has_one_output_whose_name_stays(bert: Path, tmp_path: Path) -> None:
    task, config, processor = prepared(bert, problem_type=NUMBER)
    assert config.num_labels == 1
    model = model_of(bert, task, config)
    rows = {"text": TEXTS, "label": [0.5, -2.0, 1.0, 3.0]}
    batch = batch_of(task, config, processor, rows)
    labels = batch.pop("labels")
    assert labels.dtype == torch.float32
    assert model(**batch).logits.shape == (4, 1)
    model.config.id2label = {0: "similarity"}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, again, _ = prepared(tmp_path, problem_type=NUMBER)
    assert again.id2label == {0: "similarity"}


@pytest.mark.parametrize("problem_type", ["single_label_classification", MULTI, NUMBER])
def test_loss_is_transformers_own_whatever_the_micro_batches(bert: Path, problem_type: str) -> None:
    task, config, processor = prepared(bert, problem_type=problem_type)
    model = model_of(bert, task, config)
    labels: list[Any] = {MULTI: [[0, 3], [], [1], [3]], NUMBER: [0.5, -2.0, 1.0, 3.0]}.get(
        problem_type, [0, 1, 2, 3]
    )
    role = "labels" if problem_type == MULTI else "label"
    batch = batch_of(task, config, processor, {"text": TEXTS, role: labels})
    wanted = model(**batch).loss
    targets = batch.pop("labels")
    output = model(**batch)
    assert torch.allclose(task.loss(output, targets), wanted)
    items = (targets != IGNORED).sum()
    parts = [
        task.loss(SimpleNamespace(logits=logits), part, items)
        for logits, part in zip(output.logits.split([1, 3]), targets.split([1, 3]), strict=True)
    ]
    assert torch.allclose(sum(parts), wanted)
    padded = torch.cat([targets, torch.full_like(targets[:1], IGNORED)])
    more = SimpleNamespace(logits=torch.cat([output.logits, output.logits[:1] + 5]))
    assert torch.allclose(task.loss(more, padded), wanted)
    assert torch.allclose(task.loss(output, targets, 2 * int(items)), wanted / 2)


def test_smoothing_pulls_each_class_to_a_half() -> None:
    task = made(problem_type=MULTI)
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    wanted = functional.binary_cross_entropy_with_logits(logits, torch.tensor([[0.95, 0.05]]))
    assert torch.allclose(task.loss(SimpleNamespace(logits=logits), labels, None, 0.1), wanted)


def test_numbers_are_not_smoothed() -> None:
    assert not made(problem_type=NUMBER).smooths
    assert made(problem_type=MULTI).smooths


def test_number_that_means_no_label_is_a_flaw() -> None:
    rows: dict[str, list[Any]] = {"text": ["a", "b"], "label": [-100.0, -99.5]}
    first, second = made(problem_type=NUMBER).flaws(rows)
    assert "-100" in first
    assert second == ""
    assert made().flaws({"text": ["a", "b"], "label": [0, 1]}) == ["", ""]


def test_single_label_metrics_agree_with_counting(tmp_path: Path) -> None:
    task, names = made(), ["a", "b"]
    logits, labels = np.eye(2)[[0, 0, 1, 1, 1, 0]], np.array([0, 1, 1, 1, 1, 0])
    scores = task.metrics(logits, labels, split(names))
    assert scores["accuracy"] == pytest.approx(5 / 6)
    # F1: 2*2/(3+2), 2*3/(3+4)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 6 / 7) / 2)
    # TP 3, TN 2, FP 0, FN 1
    assert scores["matthews"] == pytest.approx(6 / np.sqrt(3 * 4 * 2 * 3))
    assert [row["examples"] for row in task.scores_by_label(logits, labels, split(names))] == [2, 4]
    [picture] = task.draw(tmp_path, logits, labels, split(names))
    assert Image.open(picture).size[0] > 100


def test_constant_guesses_have_no_matthews_correlation() -> None:
    scores = made().metrics(np.eye(2)[[0, 0, 0]], np.array([0, 1, 0]), split())
    assert scores["matthews"] == 0


def test_multi_label_metrics_agree_with_counting(tmp_path: Path) -> None:
    task, names = made(problem_type=MULTI), ["a", "b", "c"]
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=np.float32)
    logits = np.array([[2, -1, -1], [1, -2, -1], [3, -1, -0.1]])
    scores = task.metrics(logits, labels, split(names))
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 0 + 0) / 3)
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    rows = task.scores_by_label(logits, labels, split(names))
    assert [(row["label"], row["examples"]) for row in rows] == [("a", 2), ("b", 1), ("c", 0)]
    assert task.draw(tmp_path, logits, labels, split(names)) == []


def test_regression_metrics_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    task = made(problem_type=NUMBER)
    random = np.random.default_rng(0)
    guesses = random.integers(0, 9, 40).astype(np.float32)  # with ties
    labels = guesses + random.normal(0, 3, 40)
    scores = task.metrics(guesses[:, None], labels, split([]))
    assert scores["pearson"] == pytest.approx(stats.pearsonr(guesses, labels).statistic)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(guesses, labels).statistic)
    assert scores["mse"] == pytest.approx(np.mean((guesses - labels) ** 2))
    assert task.scores_by_label(guesses[:, None], labels, split([])) == []


@pytest.mark.parametrize("guesses", [[0.1, 0.1, 0.1], [0.2], [np.nan, np.nan, np.nan]])
def test_without_spread_there_is_no_correlation(guesses: list[float]) -> None:
    task = made(problem_type=NUMBER)
    labels = np.arange(len(guesses), dtype=np.float64)
    scores = task.metrics(np.array(guesses, dtype=np.float32)[:, None], labels, split([]))
    assert scores["pearson"] == 0
    assert scores["spearman"] == 0


def answers(folder: Path, given: list[str], tmp_path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """A saved model's predictor and answers, and the model with its processor."""
    task, config, processor = prepared(folder, **options)
    model = model_of(folder, task, config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = task.predictor(tmp_path)
    found = [answer(value) for _, value in task.read_inputs(given)]
    return task, found, lambda *texts: model(**processor(*texts, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_predictions_are_every_class_the_likeliest_first(
    bert: Path, tmp_path: Path, pooling: str
) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"text": "bad", "text_pair": "a good film"}) + "\n")
    given = ["a good film", str(records)]
    head = {"pooling": pooling}
    task, (text, pair), logits = answers(bert, given, tmp_path / "model", head=head)
    for found, own in ((text, logits("a good film")), (pair, logits("bad", "a good film"))):
        wanted = dict(zip(LABELS, own.softmax(-1).tolist(), strict=True))
        scores = {s["label"]: s["score"] for s in found["scores"]}
        assert scores == pytest.approx(wanted, abs=1e-6)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    first = text["scores"][0]
    assert task.told(text).startswith(f"{first['label']} {first['score']:.4f}  ")


def test_several_labels_are_predicted_each_by_itself(bert: Path, tmp_path: Path) -> None:
    _, [found], logits = answers(bert, ["a film"], tmp_path, problem_type=MULTI)
    wanted = dict(zip(LABELS, logits("a film").sigmoid().tolist(), strict=True))
    assert {s["label"]: s["score"] for s in found["scores"]} == pytest.approx(wanted, abs=1e-6)


def test_number_is_predicted_as_it_is(bert: Path, tmp_path: Path) -> None:
    task, [found], logits = answers(bert, ["a film"], tmp_path, problem_type=NUMBER)
    assert found == {"score": pytest.approx(logits("a film").item(), abs=1e-6)}
    assert task.told(found) == f"{found['score']:.4f}"


@pytest.mark.parametrize("options", [{}, {"max_length": 6}])
def test_predictions_cut_long_texts_as_training_does(
    bert: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    words = ["good", "film"] * SIZES["max_position_embeddings"]
    _, [found], logits = answers(bert, [" ".join(words)], tmp_path, **options)
    kept = options.get("max_length", SIZES["max_position_embeddings"]) - 2
    wanted = logits(" ".join(words[:kept])).softmax(-1).max().item()
    assert found["scores"][0]["score"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"problem_type": "binary"}, {"head": {"pooling": "median"}}, {"head": {"dropout": 0.1}}],
)
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"problem_type|pooling|dropout"):
        ClassificationOptions.model_validate(options)
