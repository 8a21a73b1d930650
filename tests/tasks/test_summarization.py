from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from transformers.models.bart.modeling_bart import shift_tokens_right

from hfft.sections import ModelConfig
from hfft.task import IGNORED, InputError, Split
from hfft.tasks.summarization import Summarization, SummarizationOptions
from tests.text_models import WORDS, classifier_folder, tokenizer

TEXTS = [
    "a good film was seen by many people",
    "a bad film was seen by few people",
    "many people",
    "few bad people by a good film",
]
SUMMARIES = ["good film many people", "bad film", "many", "few people a good film"]
BATCH = {"text": TEXTS, "summary": SUMMARIES, "index": [0, 1, 2, 3]}
SPECIAL_IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 3}


def t5_folder(folder: Path, **own: Any) -> Path:
    config = hf.T5Config(
        **SPECIAL_IDS,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **own,
    )
    return save(hf.T5ForConditionalGeneration, config, folder)


def bart_folder(folder: Path, **own: Any) -> Path:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = hf.BartConfig(
        **SPECIAL_IDS,
        **sides,
        bos_token_id=2,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
        d_model=16,
        dropout=0.0,
        max_position_embeddings=128,
        init_std=0.5,
        **own,
    )
    return save(hf.BartForConditionalGeneration, config, folder)


FOLDERS = {"t5": t5_folder, "bart": bart_folder}


def save(kind: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prepared(folder: Path, **options: Any) -> tuple[Summarization, Any, Any]:
    """A task on a model: the task, the model's config, the tokenizer."""
    task = Summarization(SummarizationOptions.model_validate(options))
    config = task.configure(hf.AutoConfig.from_pretrained(folder), [])
    return task, config, task.load_processor(ModelConfig(name=str(folder)), config)


def batch_of(task: Summarization, config: Any, processor: Any) -> dict[str, Any]:
    encode, transform = task.encode(processor, config), task.transform(processor, training=True)
    encoded = datasets.Dataset.from_dict(dict(encode(BATCH)))
    return task.collator(processor, config)([transform(row) for row in encoded])


def split_of(processor: Any, summaries: list[str], order: list[int]) -> Split:
    return Split({"summary": summaries}, {"index": order}, (), processor)


@pytest.mark.parametrize("family", FOLDERS)
def test_loss_is_transformers_own(family: str, tmp_path: Path) -> None:
    folder = FOLDERS[family](tmp_path)
    task, config, processor = prepared(folder)
    batch = batch_of(task, config, processor)
    labels = batch.pop("labels")
    lengths = (labels != IGNORED).sum(1)
    assert lengths.tolist() == [6, 4, 3, 7]
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids"}
    model = task.auto_model.from_pretrained(folder, config=config).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = model(**inputs, labels=labels)
    ours = model(**batch)
    torch.testing.assert_close(ours.logits, own.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(task.loss(ours, labels), own.loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FOLDERS)
def test_decoder_reads_what_transformers_gives_it(family: str, tmp_path: Path) -> None:
    folder = FOLDERS[family](tmp_path)
    task, config, processor = prepared(folder)
    batch = batch_of(task, config, processor)
    if family == "bart":
        own = shift_tokens_right(batch["labels"], 0, config.decoder_start_token_id)
    else:
        own = task.auto_model.from_pretrained(folder)._shift_right(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], own)


def test_decoder_without_a_start_of_its_own_begins_with_the_first_token(tmp_path: Path) -> None:
    task, config, processor = prepared(bart_folder(tmp_path))
    config.decoder_start_token_id = None
    starts = batch_of(task, config, processor)["decoder_input_ids"][:, 0]
    assert starts.tolist() == [config.bos_token_id] * 4


def test_model_that_names_no_first_token_is_refused(tmp_path: Path) -> None:
    _, config, _ = prepared(bart_folder(tmp_path))
    config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(InputError, match="names no decoder_start_token_id"):
        Summarization(SummarizationOptions()).configure(config, [])


def test_model_without_a_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a bert is no encoder-decoder; take T5"):
        prepared(classifier_folder(tmp_path))


@pytest.mark.parametrize("name", ["max_target_length", "max_new_tokens"])
def test_summaries_beyond_the_decoder_are_refused(name: str, tmp_path: Path) -> None:
    folder = bart_folder(tmp_path)
    prepared(folder, **{name: 128})
    with pytest.raises(InputError, match=rf"{name}: 129 tokens are more than the model's 128"):
        prepared(folder, **{name: 129})


def test_tiny_t5_learns_texts_by_heart_and_gives_them_back(tmp_path: Path) -> None:
    folder = t5_folder(tmp_path / "source")
    task, config, processor = prepared(folder, max_target_length=8)
    model = task.auto_model.from_pretrained(folder, config=config)
    batch = batch_of(task, config, processor)
    labels = batch.pop("labels")
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = task.loss(model(**batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made = task.generate(model.eval(), batch)
    assert processor.batch_decode(made, skip_special_tokens=True) == SUMMARIES
    # in another order than the rows, and wider than the batch, as several batches make it
    wide = np.pad(made.numpy()[::-1], ((0, 0), (0, 2)), constant_values=IGNORED)
    with torch.no_grad():
        outputs = model(**batch)
    losses = task.reduce(outputs, labels).numpy()
    split = split_of(processor, SUMMARIES, [3, 2, 1, 0])
    scores = task.metrics((wide, losses), labels.numpy(), split)
    assert scores == {  # one word has no pairs
        "loss": pytest.approx(task.loss(outputs, labels).item()),
        **{"rouge1": pytest.approx(1), "rouge2": pytest.approx(3 / 4)},
        **{"rougeL": pytest.approx(1), "rougeLsum": pytest.approx(1)},
        "gen_length": 3.0,
    }
    model.save_pretrained(tmp_path / "learnt")
    processor.save_pretrained(tmp_path / "learnt")
    answer = task.predictor(tmp_path / "learnt")
    assert [answer(text) for text in TEXTS] == [{"summary": one} for one in SUMMARIES]
    assert task.told(answer(TEXTS[2])) == "many"


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("min_length", 10),
        ("min_new_tokens", 10),
        ("no_repeat_ngram_size", 2),
        ("encoder_no_repeat_ngram_size", 1),
        ("repetition_penalty", 3.0),
        ("do_sample", True),
        ("num_beams", 4),
    ],
)
def test_sources_own_rule_of_generation_is_off(rule: str, value: Any, tmp_path: Path) -> None:
    folder = bart_folder(tmp_path)
    task, config, processor = prepared(folder, max_target_length=12)
    batch = batch_of(task, config, processor)
    model = task.auto_model.from_pretrained(folder, config=config).eval()
    model.final_logits_bias[0, config.eos_token_id] = 3.0  # so that summaries end before they must
    plain = task.generate(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    setattr(model.generation_config, rule, value)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=12)[:, 1:], plain)
    assert torch.equal(task.generate(model, batch), plain)


def test_sources_own_length_is_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bart_folder(tmp_path)
    task, config, processor = prepared(folder, max_target_length=12)
    model = task.auto_model.from_pretrained(folder, config=config).eval()
    model.generation_config.max_length = 5
    said: list[str] = []
    monkeypatch.setattr(hf.generation.utils.logger, "warning", said.append)
    made = task.generate(model, batch_of(task, config, processor))
    assert made.shape[1] == 12
    assert said == []


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_transformers_own(beams: int, tmp_path: Path) -> None:
    folder = bart_folder(tmp_path)
    task, config, processor = prepared(folder, num_beams=beams, max_new_tokens=7)
    batch = batch_of(task, config, processor)
    model = task.auto_model.from_pretrained(folder, config=config).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = model.generate(**inputs, num_beams=beams, max_new_tokens=7)
    assert own.shape[1] > 2
    assert torch.equal(task.generate(model, batch), own[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_length": 3, "prefix": "a good "},
            r"task\.max_length: 3 .*behind the prefix 'a good '",
        ),
        ({"max_target_length": 2}, r"task\.max_target_length: 2 .*beside the 2 special"),
    ],
)
def test_lengths_that_leave_no_room_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    task, config, processor = prepared(bart_folder(tmp_path), **options)
    with pytest.raises(InputError, match=message):
        task.encode(processor, config)


def test_texts_and_summaries_that_are_cut_short_are_counted(tmp_path: Path) -> None:
    task, config, processor = prepared(t5_folder(tmp_path), max_length=9, max_target_length=6)
    encoded = task.encode(processor, config)(BATCH)
    assert encoded["truncated"] == [True, True, False, True]  # by the text, twice, and the summary
    assert [len(row) for row in encoded["input_ids"]] == [9, 9, 4, 9]
    assert [len(row) for row in encoded["labels"]] == [6, 4, 3, 6]
    assert all(row[-1] == 3 for column in ("input_ids", "labels") for row in encoded[column])


@pytest.mark.parametrize(("family", "tokens"), [("t5", 1024), ("bart", 128)])
def test_texts_may_be_as_long_as_the_model_takes(family: str, tokens: int, tmp_path: Path) -> None:
    folder = FOLDERS[family](tmp_path)
    task, config, processor = prepared(folder, max_target_length=8)
    batch = {"text": ["film " * 2000], "summary": ["film"], "index": [0]}
    assert len(task.encode(processor, config)(batch)["input_ids"][0]) == tokens


@pytest.mark.parametrize(
    ("options", "named", "begin"),
    [
        ({}, None, ""),
        ({}, "seen by ", "seen by "),
        ({"prefix": "few "}, None, "few "),
        ({"prefix": "few "}, "seen by ", "few "),
        ({"prefix": ""}, "seen by ", ""),
    ],
)
def test_texts_begin_with_the_prefix_which_the_model_keeps(
    options: dict[str, str], named: str | None, begin: str, tmp_path: Path
) -> None:
    own = {"summarization": {"prefix": named, "num_beams": 4}, "translation": {"prefix": "x"}}
    folder = t5_folder(tmp_path / "source", **({"task_specific_params": own} if named else {}))
    task, config, processor = prepared(folder, **options)
    wanted = [processor(begin + text)["input_ids"] for text in TEXTS]
    assert task.encode(processor, config)(BATCH)["input_ids"] == wanted
    config.save_pretrained(tmp_path / "learnt")
    saved = hf.AutoConfig.from_pretrained(tmp_path / "learnt")
    later = Summarization(SummarizationOptions())  # which knows nothing of the run
    assert later.encode(processor, saved)(BATCH)["input_ids"] == wanted
    if named:
        assert saved.task_specific_params["translation"] == {"prefix": "x"}


def test_rouge_agrees_with_counting(tmp_path: Path) -> None:
    task, _, processor = prepared(t5_folder(tmp_path))
    wanted = ["many people seen a good film", "bad film"]
    made = processor(["a good film seen many people", "few people"], padding=True)["input_ids"]
    ignored = np.where(np.array(made) == processor.pad_token_id, IGNORED, made)
    scores = task.metrics((ignored, np.ones((2, 3))), ignored, split_of(processor, wanted, [0, 1]))
    # of the first: all 6 words; "many people", "a good", "good film" of 5 pairs; "a good film"
    assert scores["rouge1"] == pytest.approx(1 / 2)
    assert scores["rouge2"] == pytest.approx(3 / 5 / 2)
    assert scores["rougeL"] == pytest.approx(3 / 6 / 2)
    assert scores["gen_length"] == 4
    assert tuple(scores) == ("loss", *task.metric_names)


def test_rouge_lsum_goes_by_sentences(tmp_path: Path) -> None:
    task, _, _ = prepared(t5_folder(tmp_path))

    class Decoder:
        """A tokenizer as far as the scores need it."""

        pad_token_id, all_special_ids = 0, (0,)

        def batch_decode(self, tokens: Any, skip_special_tokens: bool) -> list[str]:
            return ["Many people came. A good film was seen!"]

    wanted = ["A good film was seen.\nMany people came"]  # the same sentences, turned round
    scores = task.metrics(
        (np.ones((1, 8)), np.ones((1, 3))), np.ones((1, 8)), split_of(Decoder(), wanted, [0])
    )
    assert scores["rougeLsum"] == 1
    assert scores["rougeL"] == pytest.approx(5 / 8)


def test_whole_summary_is_the_measure_though_its_end_was_cut(tmp_path: Path) -> None:
    task, config, processor = prepared(t5_folder(tmp_path), max_target_length=4)
    encoded = task.encode(processor, config)(BATCH)
    cut = [row + [IGNORED] * (4 - len(row)) for row in encoded["labels"]]
    predictions = np.array(cut), np.ones((4, 3))
    scores = task.metrics(predictions, np.array(cut), split_of(processor, SUMMARIES, [0, 1, 2, 3]))
    # 2 of 4, 2 of 2, 1 of 1 and 2 of 5 words, none wrong
    assert scores["rouge1"] == pytest.approx((4 / 6 + 1 + 1 + 4 / 7) / 4)


def test_texts_are_read(tmp_path: Path) -> None:
    task, _, _ = prepared(t5_folder(tmp_path))
    assert list(task.read_inputs(["a film"])) == [("a film", "a film")]
