from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers.trainer_pt_utils import nested_concat

from hfft.sections import ModelConfig
from hfft.source import read_model_config
from hfft.task import IGNORED, InputError, Split
from hfft.tasks.question_answering import (
    QuestionAnswering,
    QuestionAnsweringOptions,
    Windows,
    best_spans,
)
from tests import text_models

NAMES = ["anna", "bert", "carl", "dora", "emil", "fred", "gina", "hugo"]
PLACES = ["rome", "oslo", "bern", "cairo", "delhi", "lima", "quito", "paris"]
OTHERS = ["who", "is", "in", "where", "lives", ".", ",", "?", "##s", "and", "the"]
WORDS = [*text_models.SPECIAL, "[MASK]", *NAMES, *PLACES, *OTHERS]
NOTHING: dict[str, list[Any]] = {"text": [], "answer_start": []}
SIZES = text_models.SIZES | {"vocab_size": len(WORDS), "initializer_range": 0.02}


def tokenizer(**options: Any) -> Any:
    return hf.BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}, **options)


def byte_tokenizer() -> Any:
    """Every byte is a token, and none is added."""
    vocab = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    return hf.GPT2Tokenizer(vocab={piece: n for n, piece in enumerate(vocab)}, merges=[])


def task(**options: Any) -> QuestionAnswering:
    return QuestionAnswering(QuestionAnsweringOptions.model_validate(options))


def example(question: str, context: str, answer: str | None = None) -> dict[str, Any]:
    given = {"text": [answer], "answer_start": [context.index(answer)]} if answer else NOTHING
    return {"question": question, "context": context, "answers": given}


def columns(*examples: Mapping[str, Any]) -> dict[str, list[Any]]:
    rows = {role: [one[role] for one in examples] for role in ("question", "context", "answers")}
    return rows | {"index": list(range(len(examples)))}


def cut(words: Any, length: int, stride: int, *examples: Mapping[str, Any]) -> dict[str, list[Any]]:
    return Windows.of(words, length, stride)(columns(*examples))


def random_contexts(count: int, words: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice([*NAMES, "annas", ",", "  oslo"], words)) for _ in range(count)]


def positions_by_run_qa(encoded: Any, number: int, answers: dict[str, Any], cls: int) -> list[int]:
    """`prepare_train_features` of transformers' examples/pytorch/question-answering/run_qa.py."""
    offsets, ids = encoded["offset_mapping"][number], encoded["input_ids"][number]
    sequence_ids = encoded.sequence_ids(number)
    cls_index = ids.index(cls)
    if not answers["answer_start"]:
        return [cls_index, cls_index]
    start_char = answers["answer_start"][0]
    end_char = start_char + len(answers["text"][0])
    token_start_index = sequence_ids.index(1)
    token_end_index = len(ids) - 1 - sequence_ids[::-1].index(1)
    if offsets[token_start_index][0] > start_char or offsets[token_end_index][1] < end_char:
        return [cls_index, cls_index]
    while token_start_index < len(offsets) and offsets[token_start_index][0] <= start_char:
        token_start_index += 1
    while offsets[token_end_index][1] >= end_char:
        token_end_index -= 1
    return [token_start_index - 1, token_end_index + 1]


def test_answers_stand_where_transformers_own_script_puts_them() -> None:
    random, words = np.random.default_rng(1), tokenizer()
    examples = []
    for context in random_contexts(30, 60):
        begin = random.integers(50)
        text = " ".join(context.split()[begin : begin + random.integers(1, 6)])
        examples.append(example("who is in rome ?", context, text if text in context else None))
    found = cut(words, 32, 8, *examples)
    encoded = words(
        [one["question"] for one in examples],
        [one["context"] for one in examples],
        truncation="only_second",
        max_length=32,
        stride=8,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners = encoded["overflow_to_sample_mapping"]
    assert found["index"] == owners
    assert found["input_ids"] == encoded["input_ids"]
    assert found["token_type_ids"] == encoded["token_type_ids"]
    expected = [
        positions_by_run_qa(encoded, n, examples[owner]["answers"], words.cls_token_id)
        for n, owner in enumerate(owners)
    ]
    assert found["labels"] == expected
    assert len({tuple(one) for one in expected}) > 20


def test_windows_share_the_stride_and_lose_nothing_of_the_context() -> None:
    [context] = random_contexts(1, 100)
    found = cut(tokenizer(), 24, 5, example("who ?", context))
    assert max(map(len, found["input_ids"])) == 24
    windows = [
        [place for place in zip(starts, ends, strict=True) if place[0] >= 0]
        for starts, ends in zip(found["starts"], found["ends"], strict=True)
    ]
    for one, other in pairwise(windows):
        assert one[-5:] == other[:5]
    alone = tokenizer()(context, add_special_tokens=False, return_offsets_mapping=True)
    joined = windows[0] + [place for one in windows[1:] for place in one[5:]]
    assert joined == alone["offset_mapping"]
    assert found["null"] == [0] * len(windows)


def test_answer_parted_by_a_windows_edge_is_learned_from_the_window_that_holds_it() -> None:
    context = "rome oslo bern cairo delhi lima quito paris"
    found = cut(tokenizer(), 8, 2, example("who", context, "cairo delhi"))  # four tokens a window
    held = [labels for labels in found["labels"] if labels != [0, 0]]
    assert held == [[4, 5]]
    assert found["labels"] == [[0, 0], [4, 5], [0, 0]]


def test_answer_that_is_part_of_a_word_or_has_spaces_around_takes_whole_words() -> None:
    context = "anna  is in rome , bern"
    for text, expected in (("om", [6, 6]), (" in rome ", [5, 6]), ("rome , b", [6, 8])):
        assert cut(tokenizer(), 20, 0, example("who", context, text))["labels"] == [expected]


def test_long_questions_lose_their_end_and_are_counted_once() -> None:
    [context] = random_contexts(1, 40)
    long = " ".join(NAMES + PLACES)
    found = cut(tokenizer(), 17, 4, example("who", context), example(long, context))  # room for 14
    asked = [ids.index(3) - 1 for ids in found["input_ids"]]
    assert set(asked) == {1, 5}
    assert sum(found["truncated"]) == 1
    assert found["truncated"][found["index"].index(1)]
    kept = found["input_ids"][-1][1:6]
    assert kept == tokenizer()(" ".join(NAMES[:5]), add_special_tokens=False)["input_ids"]


def test_question_is_not_cut_within_a_letter() -> None:
    words = byte_tokenizer()  # room for five bytes of a question; the fifth is half a letter
    found = cut(words, 12, 2, example("who éé", "rome, oslo"))
    assert [words.decode(ids) for ids in found["input_ids"]] == ["who rome, os", "who oslo"]
    assert found["truncated"] == [True, False]


def test_options_say_whether_cut_questions_stop_the_run() -> None:
    assert task().truncates
    assert not task(overlong="error").truncates
    assert not task().augments


def test_without_special_tokens_no_answer_is_the_first_token() -> None:
    found = cut(byte_tokenizer(), 40, 4, example("who?", "é is in oslo", "é"))
    assert found["null"] == [0]
    assert found["labels"] == [[4, 5]]  # two bytes
    assert "token_type_ids" not in found


def test_tokenizer_that_pads_left_gets_the_context_first_and_its_batches_padded_right() -> None:
    words = tokenizer(padding_side="left")
    one, other = example("who ?", "anna is in rome", "rome"), example("who ?", "bert")
    found = cut(words, 20, 0, one, other)
    assert found["labels"] == [[4, 4], [0, 0]]
    assert found["input_ids"][0] == words(one["context"], one["question"])["input_ids"]
    windows = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    transform = task().transform(words, training=True)
    batch = task().collator(words, hf.BertConfig())([transform(window) for window in windows])
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 6 + [0] * 3]
    assert batch["input_ids"][0, 4] == WORDS.index("rome")
    assert batch["labels"].tolist() == [[4, 4], [0, 0]]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_no_answer_is_the_cls_token_wherever_it_is() -> None:
    words = tokenizer(padding_side="left")
    words.backend_tokenizer.post_processor = TemplateProcessing(  # XLNet's
        pair="$A [SEP] $B [SEP] [CLS]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found = cut(words, 20, 0, example("who ?", "anna is in rome"), example("who ?", "bert"))
    assert found["null"] == [8, 5]
    assert found["labels"] == [[8, 8], [5, 5]]


def test_model_that_reads_from_left_to_right_reads_the_question_first() -> None:
    looks_back = byte_tokenizer()
    looks_back.padding_side = "left"
    found = cut(looks_back, 40, 4, example("who?", "anna", "anna"))
    assert looks_back.decode(found["input_ids"][0]) == "who?anna"


@pytest.mark.parametrize(
    ("positions", "asked", "length"), [(512, None, 384), (64, None, 64), (512, 500, 500)]
)
def test_windows_have_384_tokens_or_what_the_model_takes_or_what_is_asked_for(
    positions: int, asked: int | None, length: int
) -> None:
    config = hf.BertConfig(max_position_embeddings=positions)
    assert task(max_length=asked, stride=8).encode(tokenizer(), config).length == length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_length": 64},
            r"task\.stride: windows of 64 tokens \(task\.max_length\) can't share "
            r"128 .* take at most 59, better 20",
        ),
        ({"max_length": 4, "stride": 0}, r"task\.max_length: 4 tokens have no room"),
        ({"max_length": 600}, r"task\.max_length: 600 .* more than the model takes \(512\)"),
    ],
)
def test_lengths_that_do_not_go_together_are_named(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task(**options).encode(tokenizer(), hf.BertConfig())


def test_stride_at_its_most_still_moves_on() -> None:
    [context] = random_contexts(1, 30)
    found = cut(tokenizer(), 16, 11, example("who is in", context))  # 13 beside the special ones
    assert sum(found["truncated"]) == 1
    assert max(map(len, found["input_ids"])) == 16
    assert max(map(max, found["ends"])) == len(context)


def test_tokenizer_that_does_not_know_places_is_refused(tmp_path: Path) -> None:
    config = hf.T5Config()  # ByT5, whose tokenizer is Python's
    config.save_pretrained(tmp_path)
    hf.ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model: /.*: its tokenizer .* one \(tokenizer\.json\)"):
        task().load_processor(ModelConfig(name=str(tmp_path)), config)


def test_flaws_are_first_answers_that_cannot_be_found() -> None:
    context = "anna is in rome , bert is in oslo"
    answers = [
        {"text": ["anna"], "answer_start": [0]},
        {"text": ["oslo"], "answer_start": [3]},  # elsewhere, but there alone
        {"text": [], "answer_start": []},
        {"text": ["anna", "carl"], "answer_start": [0, 0]},  # the second is not learned
        {"text": ["is in"], "answer_start": [4]},
        {"text": ["Carl"], "answer_start": [0]},
    ]
    rows = {"context": [context] * 6, "answers": answers, "question": ["who"] * 6}
    assert task().flaws(rows) == [
        *[""] * 4,
        'its answer "is in" occurs 2 times in the context, but not at 4',
        'its answer "Carl" does not occur in the context',
    ]
    moved = {"question": "where", "context": context, "answers": answers[1]}
    assert cut(tokenizer(), 30, 0, moved)["labels"] == [[11, 11]]
    assert task().needs.flaws is not None


def qa_model() -> Any:
    torch.manual_seed(0)
    return hf.BertForQuestionAnswering(hf.BertConfig(**SIZES, **text_models.STILL)).eval()


def random_batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(WORDS), (6, 12), generator=random)
    labels = torch.randint(0, 12, (6, 2), generator=random)
    labels[0] = torch.tensor([0, 11])  # the outermost
    return {"input_ids": ids}, labels


def test_loss_is_the_models_own() -> None:
    model = qa_model()
    inputs, labels = random_batch()
    own = model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1])
    assert task().loss(model(**inputs), labels).item() == pytest.approx(own.loss.item(), abs=1e-6)
    # a position past the window counts nothing with transformers, an ignored one with us
    starts, ends = labels.clone(), labels.clone()
    starts[:, 1] = ends[:, 0] = starts[1, 0] = IGNORED
    own = model(**inputs, start_positions=starts[:, 0].abs(), end_positions=ends[:, 1])
    apart = task().loss(own, starts) + task().loss(own, ends)
    assert apart.item() / 2 == pytest.approx(own.loss.item(), abs=1e-6)


def test_losses_of_micro_batches_add_up_to_that_of_the_step() -> None:
    model, (inputs, labels) = qa_model(), random_batch()
    labels[4, 1] = IGNORED
    items = (labels != IGNORED).sum()
    assert items == 11
    parts = [
        task().loss(model(inputs["input_ids"][part]), labels[part], items)
        for part in (slice(0, 4), slice(4, 6))
    ]
    whole = task().loss(model(**inputs), labels)
    assert (parts[0] + parts[1]).item() == pytest.approx(whole.item(), abs=1e-6)


def test_smoothing_is_torchs_own() -> None:
    model, (inputs, labels) = qa_model(), random_batch()
    outputs = model(**inputs)
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    own = smooth(outputs.start_logits, labels[:, 0]) + smooth(outputs.end_logits, labels[:, 1])
    assert task().loss(outputs, labels, smoothing=0.1).item() == pytest.approx(own.item() / 2)


def test_configure_gives_two_outputs_and_keeps_a_head_that_has_them() -> None:
    three = task().configure(hf.BertConfig(num_labels=3), [])
    assert (three.num_labels, three.id2label[1]) == (2, "LABEL_1")
    assert task().configure(qa_model().config, []).id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("config", [hf.BertConfig(), hf.XLNetConfig(), hf.LlamaConfig()])
def test_model_classes_end_as_the_task_says(config: Any) -> None:
    with torch.device("meta"):
        model = task().auto_model.from_config(config)
    assert type(model).__name__.endswith(task().model_suffix)


def facts() -> list[dict[str, Any]]:
    """Who lives where: two of the answers stand late in long contexts; two questions have none."""
    told = [f"{name} lives in {place} ." for name, place in zip(NAMES, PLACES, strict=True)]
    examples = [
        example(f"where lives {name} ?", f"{told[n]} {told[n - 1]}", place)
        for n, (name, place) in enumerate(zip(NAMES, PLACES, strict=True))
    ]
    filler = "the , and " * 20
    examples[0] = example("where lives anna ?", f"{filler} {told[0]}", "rome")
    examples[1] = example("where lives bert ?", f"{filler} {told[1]} {filler}", "oslo")
    unanswerable = [("anna", told[3]), ("bert", told[5])]
    return examples + [example(f"where lives {one} ?", said) for one, said in unanswerable]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tiny BERT that knows the facts by heart, in a folder; what scores it."""
    folder = tmp_path_factory.mktemp("qa")
    qa_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    job, source = task(stride=8), ModelConfig(name=str(folder))
    config = job.configure(read_model_config(source), [])
    words = job.load_processor(source, config)
    model = job.auto_model.from_pretrained(folder, config=config)
    rows = datasets.Dataset.from_list(facts())
    encoded = rows.map(
        lambda batch, index: job.encode(words, config)({**batch, "index": index}),
        batched=True,
        batch_size=4,
        with_indices=True,
        remove_columns=rows.column_names,
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    encoded = encoded.select(np.argsort(lengths)[::-1])  # as the engine sorts them
    transform, collate = job.transform(words, training=True), job.collator(words, config)
    inputs = [transform(row) for row in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(120):
        batch = collate(inputs)
        labels = batch.pop("labels")
        loss = job.loss(model(**batch), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    reduced, kept = [], []
    for first in range(0, len(inputs), 3):  # batches of several lengths, the longest first
        batch = collate(inputs[first : first + 3])
        labels = batch.pop("labels")
        with torch.no_grad():
            reduced.append(job.reduce(model(**batch), labels))
        kept.append(labels)
    together = reduce(lambda one, other: nested_concat(one, other, IGNORED), reduced)
    return folder, {
        "predictions": tuple(one.numpy() for one in together),
        "labels": torch.cat(kept).numpy(),
        "split": Split(rows, encoded, (), words),
    }


def test_tiny_model_learns_its_answers_by_heart(learned: tuple[Path, dict[str, Any]]) -> None:
    scored = learned[1]
    assert len(scored["split"].encoded) > len(scored["split"].rows) + 4
    assert set(scored["split"].encoded["null"]) == {0}
    found = task(stride=8).metrics(**scored)
    assert set(found) == set(QuestionAnswering.metric_names)
    assert found["exact_match"] == found["f1"] == found["best_f1"] == 1
    assert found["has_answer_f1"] == found["no_answer_accuracy"] == 1


def test_threshold_decides_what_goes_unanswered(learned: tuple[Path, dict[str, Any]]) -> None:
    eager = task(stride=8, no_answer_threshold=None).metrics(**learned[1])
    assert (eager["has_answer_f1"], eager["no_answer_accuracy"]) == (1, 0)
    shy = task(stride=8, no_answer_threshold=-1000).metrics(**learned[1])
    assert (shy["has_answer_f1"], shy["no_answer_accuracy"]) == (0, 1)
    assert shy["best_f1"] == 1


def test_answerable_questions_are_answered_whatever_the_threshold(
    learned: tuple[Path, dict[str, Any]],
) -> None:
    split = learned[1]["split"]
    known = [n for n, index in enumerate(split.encoded["index"]) if index < 8]
    alone = Split(split.rows.select(range(8)), split.encoded.select(known), (), split.processor)
    predictions = tuple(one[known] for one in learned[1]["predictions"])
    shy = task(stride=8, no_answer_threshold=-1000)
    found = shy.metrics(predictions, learned[1]["labels"][known], alone)
    assert found == {"exact_match": 1, "f1": 1}


def test_predictor_answers_as_evaluation_does(learned: tuple[Path, dict[str, Any]]) -> None:
    answer = task(stride=8).predictor(learned[0])
    windows = learned[1]["split"].encoded[:]
    spans = best_spans(*learned[1]["predictions"], windows, 10, 30)
    for number, one in enumerate(facts()):
        found = answer({"question": one["question"], "context": one["context"]})
        wanted = next(iter(one["answers"]["text"]), "")
        assert found["answer"] == wanted
        assert one["context"][found["start"] : found["end"]] == wanted
        chance = spans.chance[number] if wanted else spans.no_chance[number]
        assert found["score"] == pytest.approx(chance, abs=1e-5)
        assert json.loads(json.dumps(found)) == found
    eager = task(stride=8, no_answer_threshold=None).predictor(learned[0])
    assert eager({"question": "where lives anna ?", "context": "dora lives in cairo ."})["answer"]


def test_long_context_is_predicted_in_parts(
    learned: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {role: facts()[1][role] for role in ("question", "context")}
    whole = task(stride=8).predictor(learned[0])(long)
    monkeypatch.setattr(sys.modules[QuestionAnswering.__module__], "WINDOWS_AT_ONCE", 2)
    parts = task(stride=8).predictor(learned[0])(long)
    assert parts["answer"] == whole["answer"] == "oslo"
    assert parts["score"] == pytest.approx(whole["score"], abs=1e-5)


def test_answers_are_told_in_a_line() -> None:
    found = {"answer": "Santa Clara", "score": 0.97531, "start": 3, "end": 14}
    assert task().told(found) == "Santa Clara  0.9753"
    assert task().told(found | {"answer": ""}) == "(no answer)  0.9753"


def test_inputs_are_two_texts_or_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"question": "who ?", "context": "anna"}

    def read(*given: str) -> list[dict[str, str]]:
        return [one for _, one in task().read_inputs(given)]

    assert read("who ?", "anna") == [record]
    assert read("who ?", "x" * 5000) == [{"question": "who ?", "context": "x" * 5000}]
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps(record | {"id": 3}) + "\n" + json.dumps(record) + "\n")
    assert read(str(path)) == [record] * 2
    assert read(str(path), str(path)) == [record] * 4
    assert read(json.dumps(record), json.dumps(record)) == [record] * 2
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(record)))
    assert read("-") == [record]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["who ?"], "expected JSON Lines"),
        (["who ?", "missing.jsonl"], "expected JSON Lines"),
        (["who ?", "anna", "bert"], "expected JSON Lines"),
        (['{"question": "who ?"}'], "has no context"),
        (["who ?", " "], "expected JSON Lines"),
        (['{"question": 3, "context": "anna"}'], "its question is no text"),
        (['{"question": "who ?", "context": " "}'], "its context is no text"),
    ],
)
def test_inputs_of_another_form_are_named(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(task().read_inputs(given))


@pytest.mark.parametrize(
    "wrong", [{"stride": -1}, {"max_answer_length": 0}, {"overlong": "drop"}, {"top": 20}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        task(**wrong)
