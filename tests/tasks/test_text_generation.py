from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from hfft.sections import ModelConfig
from hfft.source import read_model_config
from hfft.task import IGNORED, InputError, Split
from hfft.tasks.text_generation import TextGeneration, TextGenerationOptions
from tests import text_models
from tests.byte_models import END, byte_tokenizer, gpt2, gpt2_folder
from tests.text.test_conversations import CHAT, CHATML

TEXTS = ["a tale of ab and b", "ab", "one more, with a few words more"]
PAIRS = {
    "prompt": ["2+2?", "x a", "", "say"],
    "completion": [" 4", "b.", "ab", " a word that is long, so long that it is cut off " * 2],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"))


def prepared(folder: Path, **options: Any) -> tuple[TextGeneration, Any, Any]:
    """A task on a model: the task, the model's config, the tokenizer."""
    task = TextGeneration(TextGenerationOptions.model_validate(options))
    source = ModelConfig(name=str(folder))
    config = task.configure(read_model_config(source), [])
    return task, config, task.load_processor(source, config)


def encoded(
    given: tuple[TextGeneration, Any, Any], rows: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    task, config, tokenizer = given
    number = len(next(iter(rows.values())))
    columns = task.encode(tokenizer, config)({**rows, "index": list(range(number))})
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def batched(
    given: tuple[TextGeneration, Any, Any], rows: list[dict[str, Any]], packed: bool = False
) -> dict[str, Any]:
    task, config, tokenizer = given
    if packed:
        lengths = np.array([len(row["input_ids"]) for row in rows])
        members = task.pack(lengths, config)
        assert members is not None
        rows = [{"packed": [rows[number] for number in row]} for row in members]
    transform = task.transform(tokenizer, training=True)
    return task.collator(tokenizer, config)([transform(row) for row in rows])


def learned(tokenizer: Any, example: dict[str, Any]) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


# Texts


def test_loss_is_transformers_own(folder: Path) -> None:
    given = prepared(folder, packing=False)
    task, _, tokenizer = given
    model = hf.GPT2LMHeadModel.from_pretrained(folder).eval()
    batch = batched(given, encoded(given, {"text": TEXTS}))
    labels = batch.pop("labels")
    tokens, total = 0, 0.0
    for text in TEXTS:  # one by one: transformers' mean is over tokens, of unlike numbers here
        ids = torch.tensor([tokenizer(text + END)["input_ids"]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    outputs = model(**batch)
    assert task.loss(outputs, labels).item() == pytest.approx(total / tokens, rel=1e-6)
    scores = task.reduce(outputs, labels).detach().numpy()
    found = task.metrics(scores, labels.numpy(), Split(None, None))
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert tuple(found) == task.metric_names
    assert task.metric in task.lower_is_better


def test_end_of_text_is_learned_though_it_pads(folder: Path) -> None:
    given = prepared(folder)
    tokenizer = given[2]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = batched(given, encoded(given, {"text": TEXTS}))
    for row, text in enumerate(TEXTS):
        kept = batch["labels"][row] != IGNORED
        assert (
            tokenizer.decode(batch["labels"][row][kept]) == text[1 + text.startswith("ab") :] + END
        )
        assert batch["attention_mask"][row].sum() == kept.sum()


def test_each_label_is_the_token_after(folder: Path) -> None:
    [example] = encoded(prepared(folder), {"text": ["some words"]})
    assert example["labels"][:-1].tolist() == example["input_ids"][1:].tolist()


def test_long_text_is_cut_into_windows_and_every_token_is_learned_once(folder: Path) -> None:
    given = prepared(folder, max_length=16)
    text = "0123456789" * 5
    examples = encoded(given, {"text": ["x", text]})[1:]
    assert [len(example["input_ids"]) for example in examples] == [16, 16, 16, 2]
    inputs, labels = (
        np.concatenate([example[name] for example in examples]) for name in ("input_ids", "labels")
    )
    assert given[2].decode(inputs) == text
    assert given[2].decode(labels) == text[1:] + END
    assert "truncated" not in examples[0]


def test_blank_texts_come_out_empty(folder: Path) -> None:
    examples = encoded(prepared(folder), {"text": ["", " \n", "a"]})
    assert [len(example["input_ids"]) for example in examples] == [0, 0, 1]


def test_limit_is_the_models_or_less(folder: Path) -> None:
    text = {"text": ["b" * 3000]}
    assert len(encoded(prepared(folder), text)[0]["input_ids"]) == 64
    with pytest.raises(InputError, match=r"task\.max_length: 65 tokens are more"):
        encoded(prepared(folder, max_length=65), text)
    task, config, tokenizer = prepared(folder)
    config.n_positions = config.max_position_embeddings = 10**5
    assert len(encoded((task, config, tokenizer), text)[0]["input_ids"]) == 1024


def test_encoder_can_be_sent_to_processes(folder: Path) -> None:
    task, config, tokenizer = prepared(folder)
    sent = pickle.loads(pickle.dumps(task.encode(tokenizer, config)))
    assert [len(ids) for ids in sent({"text": TEXTS, "index": [0, 1, 2]})["input_ids"]] == [
        len(tokenizer(text)["input_ids"]) for text in TEXTS
    ]


# Prompts and completions


def test_completion_is_learned_with_its_end_and_nothing_of_the_prompt(folder: Path) -> None:
    given = prepared(folder)
    tokenizer = given[2]
    examples = encoded(given, PAIRS)
    for example, prompt, text in zip(examples[:2], *PAIRS.values(), strict=False):
        assert tokenizer.decode(example["input_ids"]) == prompt + text
        assert learned(tokenizer, example) == text + END
        assert not example["truncated"]


def test_no_token_spans_the_boundary(folder: Path) -> None:
    given = prepared(folder)
    example = encoded(given, PAIRS)[1]  # "x a" and "b.", jointly "x", " ", "ab", "."
    start = given[2]("x a")["input_ids"]
    assert example["input_ids"][: len(start)].tolist() == start
    assert (example["labels"] != IGNORED).tolist() == [False, False, True, True, True]


def test_without_a_prompt_the_first_token_has_nothing_to_follow(folder: Path) -> None:
    given = prepared(folder)
    assert learned(given[2], encoded(given, PAIRS)[2]) == END


def test_long_completions_lose_their_end_and_say_so(folder: Path) -> None:
    given = prepared(folder)
    example = encoded(given, PAIRS)[3]
    assert example["truncated"]
    assert len(example["input_ids"]) == 64
    assert learned(given[2], example) == PAIRS["completion"][3][:62]
    assert given[0].truncates
    assert not prepared(folder, overlong="error")[0].truncates


def test_prompt_that_leaves_no_room_comes_out_empty(folder: Path) -> None:
    [example] = encoded(prepared(folder), {"prompt": ["x" * 80], "completion": ["y"]})
    assert len(example["input_ids"]) == len(example["labels"]) == 0
    assert example["truncated"]


def test_context_stands_below_the_prompt(folder: Path) -> None:
    given = prepared(folder)
    rows = {"prompt": ["sum", "sum"], "context": ["1, 2", " "], "completion": [" 3", " 0"]}
    texts = [given[2].decode(example["input_ids"]) for example in encoded(given, rows)]
    assert texts == ["sum\n\n1, 2 3", "sum 0"]


def test_all_of_it_is_learned_where_asked(folder: Path) -> None:
    given = prepared(folder, loss_on="all")
    assert learned(given[2], encoded(given, PAIRS)[0]) == "+2? 4" + END


# Chats


def test_assistants_turns_of_a_chat_are_learned(folder: Path) -> None:
    given = prepared(folder, chat_template=CHATML)
    chat = CHAT[1:4]
    [example] = encoded(given, {"messages": [chat]})
    text = given[2].apply_chat_template(chat[:2], tokenize=False)
    # inputs end where the last that is learned begins: its own end is a label alone
    assert given[2].decode(example["input_ids"]) == text.removesuffix("<|im_end|>\n")
    assert learned(given[2], example) == "héllo 🙂<|im_end|>"


def test_chat_template_may_be_missing_but_for_chats(folder: Path) -> None:
    given = prepared(folder)
    assert len(encoded(given, PAIRS)) == 4
    with pytest.raises(InputError, match=r"no chat template"):
        encoded(given, {"messages": [CHAT]})


def test_chat_template_is_saved_with_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    prepared(folder, chat_template=CHATML)[2].save_pretrained(tmp_path)
    assert hf.AutoTokenizer.from_pretrained(tmp_path).chat_template == CHATML


# What is learned from


@pytest.mark.parametrize(
    ("found", "roles"),
    [
        (["text", "messages", "prompt"], ["messages"]),
        (["completion", "text", "context", "prompt"], ["prompt", "context", "completion"]),
        (["completion", "prompt"], ["prompt", "completion"]),
        (["text", "context", "prompt"], ["text"]),
    ],
)
def test_chats_come_before_prompts_before_texts(found: list[str], roles: list[str]) -> None:
    assert list(TextGeneration(TextGenerationOptions()).roles(found)) == roles


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], r"no text to learn from.*data\.columns"),
        (["prompt", "context"], r"a prompt column alone"),
        (["completion"], r"a completion column alone"),
    ],
)
def test_data_that_suffice_for_nothing_are_an_error(found: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextGeneration(TextGenerationOptions()).roles(found)


def test_flaws_are_of_what_is_learned() -> None:
    task = TextGeneration(TextGenerationOptions())
    assert task.checked
    assert task.flaws({"messages": [CHAT, CHAT[:2]]}) == ["", "has no assistant turn"]
    rows = {"prompt": ["", "a"], "completion": ["b", "\n"]}
    assert task.flaws(rows) == ["", "has an empty completion"]
    assert task.flaws({"text": ["", "a"]}) == ["", ""]


# Packing


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_logits_and_gradients_are_those_of_each_text_alone(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    source = folder if kind == "gpt2" else text_models.causal_folder(tmp_path)
    given = prepared(source, max_length=30)
    task = given[0]
    model = hf.AutoModelForCausalLM.from_pretrained(source).eval()
    others = [f"{'good ' * n}film" for n in (1, 5, 9, 14, 20)]
    rows = encoded(given, {"text": TEXTS * 2 if kind == "gpt2" else others})

    def learn(batch: dict[str, Any]) -> tuple[dict[int, Any], list[torch.Tensor]]:
        labels = batch.pop("labels")
        model.zero_grad()
        outputs = model(**batch)
        task.loss(outputs, labels).backward()
        logits = outputs.logits[labels != IGNORED].detach()
        return logits, [parameter.grad.clone() for parameter in model.parameters()]

    lengths = np.array([len(row["input_ids"]) for row in rows])
    members = task.pack(lengths, given[1])
    assert members is not None
    assert 1 < len(members) < len(rows)
    alone, gradients = learn(batched(given, [rows[n] for row in members for n in row]))
    packed = batched(given, rows, packed=True)
    assert "attention_mask" not in packed
    assert (packed["labels"] == IGNORED).any()  # a row of them is padded
    together, packed_gradients = learn(packed)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for one, other in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_hold_as_many_tokens_as_an_example_may_have(folder: Path) -> None:
    lengths = np.full(8, 16)
    task, config, _ = prepared(folder, max_length=32)
    assert [len(row) for row in task.pack(lengths, config) or []] == [2] * 4
    task, config, _ = prepared(folder)
    assert [len(row) for row in task.pack(lengths, config) or []] == [4, 4]
    task, config, _ = prepared(folder, packing=False)
    assert task.pack(lengths, config) is None


def test_evaluation_is_not_packed(folder: Path) -> None:
    given = prepared(folder)
    batch = batched(given, encoded(given, {"text": TEXTS}))
    assert list(batch) == ["input_ids", "attention_mask", "labels"]


def test_padding_is_on_the_right_whatever_the_tokenizer_does(folder: Path) -> None:
    given = prepared(folder)
    given[2].padding_side = "left"
    assert batched(given, encoded(given, {"text": TEXTS}))["attention_mask"][1].tolist()[0] == 1


def test_model_that_fills_gaps_is_refused_before_its_weights_are_read() -> None:
    task = TextGeneration(TextGenerationOptions())
    config = hf.BertConfig(**text_models.SIZES)
    with pytest.raises(InputError, match=r"model: bert fills gaps .*task: fill-mask"):
        task.configure(config, [])
    config.is_decoder = True
    assert task.configure(config, []) is config


def test_models_that_can_not_be_packed_or_read_ahead_are_refused() -> None:
    sizes = {**text_models.SIZES, "state_size": 4}
    mamba = hf.MambaForCausalLM(hf.MambaConfig(**sizes))
    task = TextGeneration(TextGenerationOptions())
    task.check_model(gpt2())
    with pytest.raises(InputError, match=r"task\.packing: Mamba.*set task\.packing: false"):
        task.check_model(mamba)
    unpacked = TextGeneration(TextGenerationOptions(packing=False))
    unpacked.check_model(mamba)
    bert = hf.BertLMHeadModel(hf.BertConfig(**text_models.SIZES, **text_models.STILL))
    with pytest.raises(InputError, match=r"model: BertLMHeadModel reads ahead.*task: fill-mask"):
        unpacked.check_model(bert)


# Tokenizers


def test_tokenizer_that_ends_texts_leaves_them_open(tmp_path: Path) -> None:
    folder = text_models.causal_folder(tmp_path / "llama")
    given = prepared(folder)
    tokenizer = given[2]
    assert hf.AutoTokenizer.from_pretrained(folder)("good film")["input_ids"] == [2, 5, 7, 3]
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, hf.AutoTokenizer.from_pretrained(tmp_path)):
        assert one("good film")["input_ids"] == [2, 5, 7]
    [example] = encoded(given, {"prompt": ["good"], "completion": [" film"]})
    assert example["input_ids"].tolist() == [2, 5, 7]
    assert example["labels"].tolist() == [IGNORED, 7, 3]


def test_tokenizer_without_an_end_is_an_error(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = None, "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no end-of-text token.*eos_token"):
        prepared(tmp_path)


# Predictions


def test_inputs_are_texts_prompts_and_chats(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    asked = [{"role": "user", "content": "hi"}]
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"messages": asked}) + "\n")
    task = TextGeneration(TextGenerationOptions())
    found = [value for _, value in task.read_inputs(["once upon", str(file)])]
    assert found == ["once upon", "a", asked]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"text": "a"}', r'expected \{"prompt"'),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "one of the two"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "no turn that asks"),
    ],
)
def test_inputs_of_another_form_are_an_error(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(TextGeneration(TextGenerationOptions()).read_inputs([given]))


def test_prediction_is_the_pipelines_new_text(folder: Path, tmp_path: Path) -> None:
    model = hf.GPT2LMHeadModel.from_pretrained(folder)
    task, _, tokenizer = prepared(folder, chat_template=CHATML, max_new_tokens=7)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    run = hf.pipeline("text-generation", model=str(tmp_path))
    predict = task.predictor(tmp_path)
    for value in ("hello", [{"role": "user", "content": "hi"}]):
        [own] = run(value, do_sample=False, max_new_tokens=7, return_full_text=False)
        assert predict(value) == predict(value) == {"generated_text": own["generated_text"]}
    assert task.told({"generated_text": " a\n\nb "}) == "a b"


def test_prediction_ends_where_the_models_positions_do(folder: Path) -> None:
    predict = prepared(folder)[0].predictor(folder)
    assert predict("b" * 62)["generated_text"]
    with pytest.raises(InputError, match=r"has 64 tokens, and the model takes 64"):
        predict("b" * 64)
    with pytest.raises(InputError, match=r"no chat template"):
        predict([{"role": "user", "content": "hi"}])


def test_predictions_vary_with_a_temperature(folder: Path) -> None:
    predict = prepared(folder, temperature=5.0, max_new_tokens=8)[0].predictor(folder)
    torch.manual_seed(0)
    assert len({predict("a")["generated_text"] for _ in range(4)}) > 1
