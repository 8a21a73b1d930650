from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hfft.examples import seeded
from hfft.sections import ModelConfig
from hfft.source import read_model_config
from hfft.task import IGNORED, InputError, Split
from hfft.tasks.fill_mask import FillMask, FillMaskOptions
from tests import text_models

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
MASK = SPECIAL.index("[MASK]")
TEXTS = ["abc de f", "g", "hg fed cba ab cd ef gh a b c"]


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """BERT's, in small: words are of several pieces."""
    numbers = {piece: number for number, piece in enumerate(PIECES)}
    pieces = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=pieces, **dict(zip(names, SPECIAL, strict=True))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {**text_models.SIZES, **text_models.STILL, "vocab_size": len(PIECES)}
    torch.manual_seed(0)
    hf.BertForMaskedLM(hf.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prepared(folder: Path, **options: Any) -> tuple[FillMask, Any, Any]:
    """A task on a model: the task, the model's config, the tokenizer."""
    task = FillMask(FillMaskOptions.model_validate(options))
    source = ModelConfig(name=str(folder))
    config = task.configure(read_model_config(source), [])
    return task, config, task.load_processor(source, config)


def encoded(given: tuple[FillMask, Any, Any], texts: list[str]) -> list[dict[str, Any]]:
    task, config, processor = given
    columns = task.encode(processor, config)({"text": texts, "index": list(range(len(texts)))})
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def drawn(
    given: tuple[FillMask, Any, Any], text: str, times: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text's tokens, (T,), and, of many drawings, inputs and labels of shape (times, T)."""
    [row] = encoded(given, [text])
    transform = given[0].transform(given[2], training=True)
    with seeded(0):
        made = [transform(row) for _ in range(times)]
    inputs, labels = (np.stack([one[name] for one in made]) for name in ("input_ids", "labels"))
    return row["input_ids"], inputs, labels


def test_loss_is_transformers_own(folder: Path) -> None:
    given = prepared(folder)
    task, config, processor = given
    model = hf.BertForMaskedLM.from_pretrained(folder).eval()
    transform = task.transform(processor, training=False)
    with seeded(0):
        batch = task.collator(processor, config)([transform(r) for r in encoded(given, TEXTS)])
    labels = batch.pop("labels")
    assert batch["attention_mask"].sum(1).tolist() == [8, 3, 21]
    outputs = model(**batch)
    wanted = model(**batch, labels=labels).loss.item()
    assert task.loss(outputs, labels).item() == pytest.approx(wanted, rel=1e-6)
    scores = task.reduce(outputs, labels).detach().numpy()
    found = task.metrics(scores, labels.numpy(), Split(None, None))
    assert found["loss"] == pytest.approx(wanted, rel=1e-6)
    assert tuple(found) == task.metric_names
    assert task.metric in task.lower_is_better
    assert task.augments


def test_tokens_are_predicted_by_berts_rule(folder: Path) -> None:
    tokens, inputs, labels = drawn(prepared(folder), "abcdefgh " * 3, 4000)
    picked = labels != IGNORED
    assert np.array_equal(labels[picked], np.broadcast_to(tokens, labels.shape)[picked])
    assert np.array_equal(inputs[~picked], np.broadcast_to(tokens, labels.shape)[~picked])
    assert picked[:, 1:-1].mean() == pytest.approx(0.15, abs=0.005)
    assert picked[:, 1:-1].mean(axis=0) == pytest.approx(0.15, abs=0.03)
    masked = inputs[picked] == MASK
    same = inputs[picked] == labels[picked]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert same.mean() == pytest.approx(0.1 + 0.1 / 16, abs=0.01)  # some are replaced by themselves
    replaced = inputs[picked][~masked & ~same]
    counts = np.bincount(replaced, minlength=len(PIECES)) / len(replaced)
    assert counts[: len(SPECIAL)].max() == 0
    assert counts[len(SPECIAL) :] == pytest.approx(1 / 16, abs=0.03)


def test_special_tokens_are_never_predicted(folder: Path) -> None:
    given = prepared(folder, mask_probability=1.0)
    tokens, _, labels = drawn(given, "a é [MASK] b [SEP]", 20)
    assert tokens.tolist() == [2, 5, 1, 4, 6, 3, 3]  # [UNK] among them
    assert (labels != IGNORED).tolist() == [[False, True, False, False, True, False, False]] * 20


def test_something_is_predicted_of_the_shortest_text(folder: Path) -> None:
    for words in (False, True):
        given = prepared(folder, mask_probability=1e-9, whole_words=words)
        _, _, labels = drawn(given, "a b", 400)
        assert ((labels != IGNORED).sum(axis=1) == 1).all()
        assert (labels[:, 1] != IGNORED).mean() == pytest.approx(0.5, abs=0.1)


def test_whole_words_are_predicted_all_together_or_not_at_all(folder: Path) -> None:
    given = prepared(folder, whole_words=True, mask_probability=0.3)
    _, inputs, labels = drawn(given, "abcd ef g habc", 3000)
    picked = labels != IGNORED
    words = [slice(1, 5), slice(5, 7), slice(7, 8), slice(8, 12)]
    for word in words:
        assert (picked[:, word].all(axis=1) == picked[:, word].any(axis=1)).all()
    share = np.stack([picked[:, word.start] for word in words])
    assert share.sum() / share.size == pytest.approx(0.3 + 0.7**4 / 4, abs=0.02)
    assert (inputs[picked] == MASK).mean() == pytest.approx(0.8, abs=0.02)


def test_masks_are_drawn_from_the_examples_seed(folder: Path) -> None:
    given = prepared(folder)
    row = encoded(given, ["abcdefgh " * 3])[0]
    before = row["input_ids"].copy()
    transform = given[0].transform(given[2], training=False)

    def made(seed: int) -> list[int]:
        with seeded(seed):
            return [int(label) for label in transform(row)["labels"]]

    assert made(1) == made(1) != made(2)
    assert np.array_equal(row["input_ids"], before)


@pytest.mark.parametrize("whole_words", [False, True])
def test_long_texts_are_cut_into_windows_that_lose_nothing(folder: Path, whole_words: bool) -> None:
    given = prepared(folder, max_length=10, whole_words=whole_words)
    rows = encoded(given, ["a", "abcdefgh abcdefgh abcd"])
    assert [len(row["input_ids"]) for row in rows] == [3, 10, 10, 6]
    assert all(row["input_ids"][[0, -1]].tolist() == [2, 3] for row in rows)
    pieces = np.concatenate([row["input_ids"][1:-1] for row in rows[1:]])
    assert pieces.tolist() == tokenizer()("abcdefgh abcdefgh abcd")["input_ids"][1:-1]
    if whole_words:
        words = np.concatenate([row["words"] for row in rows[1:]])
        assert words.tolist() == [-1, *[0] * 8, -1, -1, *[1] * 8, -1, -1, *[2] * 4, -1]


def test_texts_in_which_nothing_can_be_predicted_come_out_empty(folder: Path) -> None:
    rows = encoded(prepared(folder), ["", " ", "é", "a"])
    assert [len(row["input_ids"]) for row in rows] == [0, 0, 0, 3]


def test_limit_is_the_models_and_leaves_room_for_text(folder: Path) -> None:
    assert len(encoded(prepared(folder), ["a " * 40])[0]["input_ids"]) == 32
    with pytest.raises(InputError, match=r"task\.max_length: 33 tokens are more"):
        encoded(prepared(folder, max_length=33), ["a"])
    with pytest.raises(
        InputError, match=r"task\.max_length: 2 tokens leave no room .*the 2 special"
    ):
        encoded(prepared(folder, max_length=2), ["a"])


def test_tokenizer_without_a_mask_token_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no mask token"):
        prepared(text_models.classifier_folder(tmp_path))


def test_gap_is_filled_as_by_the_pipeline(folder: Path) -> None:
    task = prepared(folder)[0]
    [(_, text)] = task.read_inputs(["abc [MASK] de"])
    found = task.predictor(folder)(text)
    own = hf.pipeline("fill-mask", model=str(folder))(text)
    assert found["scores"] == [{"label": o["token_str"], "score": o["score"]} for o in own]
    assert task.told(found).startswith(f"{own[0]['token_str']} {own[0]['score']:.4f}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", r'"abc": has 0 gaps; write \[MASK\] once'),
        ("[MASK] a [MASK]", "has 2 gaps"),
        ("a " * 40 + "[MASK]", "has 43 tokens, the model takes 32"),
    ],
)
def test_text_that_can_not_be_filled_is_an_error(folder: Path, text: str, message: str) -> None:
    predict = prepared(folder)[0].predictor(folder)
    with pytest.raises(InputError, match=message):
        predict(text)


@pytest.mark.parametrize("probability", [0.0, 1.1])
def test_probability_that_masks_nothing_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="mask_probability"):
        FillMaskOptions.model_validate({"mask_probability": probability})
