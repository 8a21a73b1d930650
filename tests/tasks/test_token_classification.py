from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

from hfft.sections import ModelConfig
from hfft.task import IGNORED, InputError, Split
from hfft.tasks.token_classification import TokenClassification, TokenOptions

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
VOCABULARY = [
    *SPECIAL.values(),
    *("john", "smith", "##son", "##ville", "lives", "in", "par", "##is", "near", "york", ",", "."),
]
BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
BIOES = ["O", *(f"{mark}-{kind}" for kind in ("PER", "LOC") for mark in "BIES")]
BILOU = ["O", *(f"{mark}-{kind}" for kind in ("PER", "LOC") for mark in "BILU")]
SENTENCES = [
    ("John Smithson lives in Paris , York .", "B-PER I-PER O O B-LOC O B-LOC O"),
    ("Parisville near York", "B-LOC O B-LOC"),
    ("near Smithsonville , John", "O B-PER O B-PER"),
    ("York Paris John Smith", "B-LOC I-LOC B-PER I-PER"),
]


def wordpiece() -> Any:
    pieces = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=pieces, **SPECIAL, model_input_names=["input_ids", "token_type_ids"]
    )


def byte_level(kind: str) -> Any:
    """A tokenizer that knows words by the space before them: ModernBERT's, Llama's or RoBERTa's."""
    alone = pre.ByteLevel(add_prefix_space=False)
    parts = [
        pre.Split(Regex(r"\s?\w+|[^\w\s]"), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre.Sequence(parts) if kind == "sequence" else alone
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [text for text, _ in SENTENCES] * 20
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=marks,
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    special = dict(zip(("cls", "pad", "sep", "unk", "mask"), marks, strict=True))
    named = {f"{name}_token": token for name, token in special.items()} | {"eos_token": "</s>"}
    if kind != "roberta":
        return hf.PreTrainedTokenizerFast(tokenizer_object=made, **named)
    whole = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in whole["merges"]]
    return hf.RobertaTokenizer(vocab=whole["vocab"], merges=merges, **named)


def save(folder: Path, tokenizer: Any = None, **sizes: Any) -> Path:
    config = hf.BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        **sizes,
    )
    torch.manual_seed(0)
    hf.BertModel(config).save_pretrained(folder)
    (tokenizer or wordpiece()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"))


def prepared(
    folder: Path, labels: list[str] = BIO, **options: Any
) -> tuple[TokenClassification, Any, Any]:
    """A task on a model: the task, the model's config, the tokenizer."""
    task = TokenClassification(TokenOptions.model_validate(options))
    config = task.configure(hf.AutoConfig.from_pretrained(folder), labels)
    return task, config, task.load_processor(ModelConfig(name=str(folder)), config)


def rows_of(
    sentences: list[tuple[str, str]], labels: list[str] = BIO
) -> tuple[datasets.Dataset, dict[str, list[Any]]]:
    """The rows of a split, and what `encode` is given of them."""
    columns = {
        "words": [words.split(" ") for words, _ in sentences],
        "tags": [[labels.index(tag) for tag in tags.split(" ")] for _, tags in sentences],
    }
    return datasets.Dataset.from_dict(columns), columns | {"index": list(range(len(sentences)))}


def padded(rows: list[list[int]]) -> Any:
    width = max(map(len, rows)) + 2
    return np.array([row + [IGNORED] * (width - len(row)) for row in rows])


def scored(
    truth: list[str], guesses: list[str], folder: Path, **options: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The scores of tags, one a word, each word a piece of its own."""
    task, config, tokenizer = prepared(folder, **options)
    rows, batch = rows_of([(" ".join("john" for _ in tags.split(" ")), tags) for tags in truth])
    encoded = task.encode(tokenizer, config)(batch)
    guessed = padded([[0, *(BIO.index(tag) for tag in tags.split(" ")), 0] for tags in guesses])
    split = Split(rows, datasets.Dataset.from_dict(dict(encoded)), BIO, tokenizer)
    found = guessed, np.ones((len(truth), 3))
    scores = task.metrics(found, guessed, split)
    del scores["loss"]
    return scores, task.scores_by_label(found, guessed, split)


def test_first_piece_of_each_word_carries_its_tag(folder: Path) -> None:
    task, config, tokenizer = prepared(folder)
    encoded = task.encode(tokenizer, config)(rows_of(SENTENCES[:1])[1])
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    named = [BIO[n] if n != IGNORED else "" for n in encoded["labels"][0]]
    assert list(zip(pieces, named, strict=True)) == [
        ("[CLS]", ""),
        ("john", "B-PER"),
        ("smith", "I-PER"),
        ("##son", ""),
        ("lives", "O"),
        ("in", "O"),
        ("par", "B-LOC"),
        ("##is", ""),
        (",", "O"),
        ("york", "B-LOC"),
        (".", "O"),
        ("[SEP]", ""),
    ]
    assert encoded["truncated"] == [False]


@pytest.mark.parametrize(
    ("labels", "tag", "pieces"),
    [
        (BIO, "B-PER", ["B-PER", "I-PER", "I-PER"]),
        (BIO, "I-PER", ["I-PER", "I-PER", "I-PER"]),
        (BIO, "O", ["O", "O", "O"]),
        (["O", "B-PER"], "B-PER", ["B-PER", "B-PER", "B-PER"]),
        (BIOES, "B-PER", ["B-PER", "I-PER", "I-PER"]),
        (BIOES, "S-PER", ["B-PER", "I-PER", "E-PER"]),
        (BIOES, "E-PER", ["I-PER", "I-PER", "E-PER"]),
        (["O", "B-PER", "E-PER", "S-PER"], "S-PER", ["B-PER", "S-PER", "E-PER"]),
        (BILOU, "U-LOC", ["B-LOC", "I-LOC", "L-LOC"]),
        (["NOUN", "VERB"], "VERB", ["VERB", "VERB", "VERB"]),
    ],
)
def test_all_pieces_of_a_word_carry_tags_of_its_entity(
    labels: list[str], tag: str, pieces: list[str], folder: Path
) -> None:
    task, config, tokenizer = prepared(folder, labels, label_subwords="all")
    encoded = task.encode(tokenizer, config)(rows_of([("Smithsonville", tag)], labels)[1])
    assert [labels[n] for n in encoded["labels"][0][1:-1]] == pieces


@pytest.mark.parametrize("label_subwords", ["first", "all"])
@pytest.mark.parametrize(
    ("labels", "tags"),
    [
        (BIO, "B-PER I-PER O O B-LOC O B-LOC O"),
        (BIOES, "B-PER E-PER O O S-LOC O B-LOC E-LOC"),
        (BIOES, "S-PER S-PER O B-LOC I-LOC I-LOC E-LOC O"),
        (BILOU, "U-PER U-PER O B-LOC I-LOC I-LOC L-LOC O"),
        (["X", "Y"], "X Y X X Y Y X X"),
    ],
)
def test_predicting_the_labels_gives_the_words_tags(
    labels: list[str], tags: str, label_subwords: str, folder: Path
) -> None:
    task, config, tokenizer = prepared(folder, labels, label_subwords=label_subwords)
    rows, batch = rows_of([(SENTENCES[0][0], tags)], labels)
    encoded = task.encode(tokenizer, config)(batch)
    split = Split(rows, datasets.Dataset.from_dict(dict(encoded)), labels, tokenizer)
    right = padded(encoded["labels"])
    chance = np.random.default_rng(0).integers(len(labels), size=right.shape)
    predictions = np.where(right == IGNORED, chance, right)  # what has no label may be anything
    losses = np.array([[2.0, 4, 3], [1.0, 2, 0], [0.0, 6, 6]][: len(right)] + [[0, 1, 1]] * 9)
    scores = task.metrics((predictions, losses), right, split)
    assert scores.pop("loss") == losses[:, 0].sum() / losses[:, 1].sum()
    assert scores == dict.fromkeys(task.metric_names, 1.0)


def test_word_without_a_piece_shifts_no_label_and_is_predicted_o(folder: Path) -> None:
    task, config, tokenizer = prepared(folder)
    rows, batch = rows_of([("john \u0000 smith york", "B-PER B-LOC O B-LOC")])
    encoded = task.encode(tokenizer, config)(batch)
    assert encoded["word_ids"] == [[-1, 0, 2, 3, -1]]
    assert encoded["labels"] == [[IGNORED, 1, 0, 3, IGNORED]]
    split = Split(rows, datasets.Dataset.from_dict(dict(encoded)), BIO, tokenizer)
    scores = task.metrics(
        (np.array([[0, 1, 0, 3, 0]]), np.ones((1, 3))), padded(encoded["labels"]), split
    )
    assert (scores["precision"], scores["recall"]) == (1.0, pytest.approx(2 / 3))
    assert scores["accuracy"] == 3 / 4


def test_entities_that_were_cut_off_count_as_missed(folder: Path) -> None:
    task, config, tokenizer = prepared(folder, max_length=5)
    rows, batch = rows_of(
        [("lives in york", "O O B-LOC"), ("john lives in york", "B-PER O O B-LOC")]
    )
    encoded = task.encode(tokenizer, config)(batch)
    assert encoded["truncated"] == [False, True]
    assert [len(row) for row in encoded["input_ids"]] == [5, 5]
    # predictions come in another order than the rows
    turned = {name: column[::-1] for name, column in encoded.items()}
    split = Split(rows, datasets.Dataset.from_dict(turned), BIO, tokenizer)
    right = padded(turned["labels"])
    scores = task.metrics((right.clip(0), np.ones((2, 3))), right, split)
    assert scores["precision"] == 1
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == 6 / 7


@pytest.mark.parametrize("scheme", ["bio", "bioes", "bilou"])
def test_scheme_that_the_tags_are_not_of_is_refused(scheme: str, folder: Path) -> None:
    prepared(folder, {"bio": BIO, "bioes": BIOES, "bilou": BILOU}[scheme], scheme=scheme)
    with pytest.raises(InputError, match=rf"scheme: {scheme} needs tags .* the data has N, V"):
        prepared(folder, ["N", "V"], scheme=scheme)


def test_scores_go_by_the_scheme_that_is_asked_for(folder: Path) -> None:
    truth, guesses = ["B-PER I-PER O"], ["B-PER O O"]
    entities, rows = scored(truth, guesses, folder)
    assert entities["f1"] == 0
    assert [row["label"] for row in rows] == ["PER"]
    plain, rows = scored(truth, guesses, folder, scheme="none")
    assert plain["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert [row["label"] for row in rows] == ["B-PER", "I-PER", "O"]


def test_words_and_tags_of_other_numbers_are_flaws(folder: Path) -> None:
    task, _, _ = prepared(folder)
    rows = {"words": [["a"], [], ["a", "b"]], "tags": [[0], [], [0]]}
    assert task.checked
    assert task.flaws(rows) == ["", "has no words", "has 2 words and 1 tags"]


def test_tokenizer_that_does_not_tell_words_is_named(tmp_path: Path) -> None:
    save(tmp_path, hf.ByT5Tokenizer())
    with pytest.raises(InputError, match=r"ByT5Tokenizer doesn't tell which word"):
        prepared(tmp_path)


@pytest.mark.parametrize("kind", ["alone", "sequence", "roberta"])
def test_byte_level_words_have_their_space(kind: str, tmp_path: Path) -> None:
    task, config, tokenizer = prepared(save(tmp_path, byte_level(kind)))
    encoded = task.encode(tokenizer, config)(rows_of(SENTENCES[:1])[1])
    [pieces] = [tokenizer.convert_ids_to_tokens(row) for row in encoded["input_ids"]]
    firsts = [pieces[encoded["word_ids"][0].index(word)] for word in range(8)]
    assert [piece[0] for piece in firsts] == ["Ġ"] * 8
    text = SENTENCES[0][0]
    whole = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    assert [n for n in encoded["input_ids"][0] if n > 4] == whole  # beyond special tokens
    if kind == "roberta":
        spaced = hf.AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
        own = spaced(text.split(" "), is_split_into_words=True)
        assert encoded["input_ids"] == [own["input_ids"]]


def test_tokenizer_that_adds_the_space_gets_no_other(tmp_path: Path) -> None:
    spaced = hf.RobertaTokenizer(
        vocab=byte_level("roberta").get_vocab(), merges=[], add_prefix_space=True
    )
    task, config, tokenizer = prepared(save(tmp_path, spaced, pad_token_id=1))
    encoded = task.encode(tokenizer, config)(rows_of([("John York", "B-PER B-LOC")])[1])
    own = tokenizer(["John", "York"], is_split_into_words=True)
    assert encoded["input_ids"] == [own["input_ids"]]


def batch_of(
    task: TokenClassification, config: Any, tokenizer: Any, sentences: Any = SENTENCES
) -> dict[str, Any]:
    encoded = datasets.Dataset.from_dict(
        dict(task.encode(tokenizer, config)(rows_of(sentences, list(config.label2id))[1]))
    )
    transform = task.transform(tokenizer, training=True)
    return task.collator(tokenizer, config)([transform(row) for row in encoded])


def test_loss_is_transformers_own(folder: Path) -> None:
    task, config, tokenizer = prepared(folder)
    batch = batch_of(task, config, tokenizer)
    model = task.auto_model.from_pretrained(folder, config=config).eval()
    own = model(**batch)
    labels = batch.pop("labels")
    outputs = model(**batch)
    torch.testing.assert_close(task.loss(outputs, labels), own.loss)
    tags, scores = task.reduce(outputs, labels)
    assert torch.equal(tags, own.logits.argmax(-1))
    torch.testing.assert_close(scores[:, 0].sum() / scores[:, 1].sum(), own.loss)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}


def test_batches_are_padded_on_the_right(tmp_path: Path) -> None:
    left = wordpiece()
    left.padding_side = "left"
    task, config, tokenizer = prepared(save(tmp_path, left))
    batch = batch_of(task, config, tokenizer)
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert (batch["attention_mask"].sum(1) == torch.tensor([12, 7, 8, 7])).all()
    assert (batch["labels"][1, 7:] == IGNORED).all()


def trained(source: Path, folder: Path, labels: list[str], sentences: Any, **options: Any) -> Any:
    """A task whose model has learnt some sentences, in a folder."""
    task, config, tokenizer = prepared(source, labels, **options)
    batch = batch_of(task, config, tokenizer, sentences)
    targets = batch.pop("labels")
    torch.manual_seed(0)
    model = task.auto_model.from_pretrained(source, config=config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = task.loss(model(**batch), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return task


@pytest.fixture(scope="module")
def learnt(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("learnt")
    return trained(folder, path, BIO, SENTENCES), path


@pytest.mark.parametrize("text", [text for text, _ in SENTENCES])
def test_predictions_are_those_of_transformers_pipeline(text: str, learnt: Any) -> None:
    task, path = learnt
    run = hf.pipeline("token-classification", model=str(path), aggregation_strategy="first")
    own = [
        {
            "label": found["entity_group"],
            "text": text[found["start"] : found["end"]],
            "start": found["start"],
            "end": found["end"],
            "score": pytest.approx(float(found["score"]), rel=1e-4),
        }
        for found in run(text)
    ]
    answer = task.predictor(path)
    assert own
    assert answer(text) == {"entities": own}
    assert answer(text.split(" ")) == {"entities": own}


def test_punctuation_is_apart_from_words(learnt: Any) -> None:
    task, path = learnt
    found = task.predictor(path)("John  Smithson lives in Paris, York.")["entities"]
    assert [(one["label"], one["text"]) for one in found] == [
        ("PER", "John  Smithson"),
        ("LOC", "Paris"),
        ("LOC", "York"),
    ]


def test_answer_is_told_in_a_line(learnt: Any) -> None:
    task, _ = learnt
    one, other = ({"label": label, "text": label.lower(), "score": 0.987} for label in ("A", "B"))
    assert task.told({"entities": [one, other]}) == "A[a] 0.99  B[b] 0.99"
    assert task.told({"entities": []}) == "no entities"


def test_text_of_spaces_has_no_entities(learnt: Any) -> None:
    task, path = learnt
    assert task.predictor(path)(" ") == {"entities": []}


def test_longer_texts_than_the_model_takes_are_read_to_the_end(learnt: Any) -> None:
    task, path = learnt
    text = " ".join([SENTENCES[0][0]] * 8)
    found = task.predictor(path)(text)["entities"]
    assert found[-1]["end"] > 0.8 * len(text)
    assert all(text[one["start"] : one["end"]] == one["text"] for one in found)


@pytest.mark.parametrize("label_subwords", ["first", "all"])
def test_neighbouring_entities_of_bioes_stay_apart(
    label_subwords: str, folder: Path, tmp_path: Path
) -> None:
    sentences = [("Paris Parisville near John Smithson", "S-LOC S-LOC O B-PER E-PER")]
    task = trained(folder, tmp_path, BIOES, sentences, label_subwords=label_subwords)
    found = task.predictor(tmp_path)(sentences[0][0])["entities"]
    assert [(one["label"], one["text"]) for one in found] == [
        ("LOC", "Paris"),
        ("LOC", "Parisville"),
        ("PER", "John Smithson"),
    ]


@pytest.mark.parametrize("kind", ["alone", "roberta"])
def test_byte_level_model_reads_texts_as_it_learnt_words(kind: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", byte_level(kind), pad_token_id=1)
    task = trained(source, tmp_path / "learnt", BIO, SENTENCES[:1])
    found = task.predictor(tmp_path / "learnt")("John Smithson lives in Paris, York.")["entities"]
    assert [one["text"] for one in found] == ["John Smithson", "Paris", "York"]


def test_plain_tags_are_answered_word_by_word(folder: Path, tmp_path: Path) -> None:
    sentences = [("John lives in Paris", "N V P N")]
    task = trained(folder, tmp_path, ["N", "P", "V"], sentences)
    found = task.predictor(tmp_path)("John lives in Paris")["entities"]
    assert [(one["label"], one["text"]) for one in found] == [
        ("N", "John"),
        ("V", "lives"),
        ("P", "in"),
        ("N", "Paris"),
    ]


def test_texts_and_cut_words_are_read(folder: Path, tmp_path: Path) -> None:
    task, _, _ = prepared(folder)
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"words": ["a", "b"]}\n{"text": "a b"}\n')
    assert list(task.read_inputs([str(lines), "c d"])) == [
        (f"{lines}, line 1", ["a", "b"]),
        (f"{lines}, line 2", "a b"),
        ("c d", "c d"),
    ]


@pytest.mark.parametrize("line", ['{"words": []}', '{"words": [1]}', '{"body": "a"}'])
def test_record_without_words_is_named(line: str, folder: Path, tmp_path: Path) -> None:
    task, _, _ = prepared(folder)
    lines = tmp_path / "a.jsonl"
    lines.write_text(line)
    with pytest.raises(InputError, match=r'a\.jsonl, line 1: expected \{"text"'):
        list(task.read_inputs([str(lines)]))
