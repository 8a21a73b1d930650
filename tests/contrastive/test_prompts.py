from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hfft.contrastive.prompts import PairEncoder, Prompts, padding, tokenized
from hfft.identities import identity
from tests.pair_models import siglip, tokenizer

TEMPLATES = ("a photo of a {} square.", "the {} square.")
CLASSES = ("red", "green")


def encoder(classes: tuple[str, ...] = (), limit: int | None = 16) -> PairEncoder:
    templates = TEMPLATES if classes else ()
    return PairEncoder(tokenizer(), Prompts(classes, templates, limit), "image")


def ids(text: str) -> list[int]:
    found: list[int] = tokenizer()(text)["input_ids"]
    return found


def test_each_caption_of_an_image_makes_a_pair() -> None:
    rows = {"index": [4, 5], "image": [11, 12], "caption": [["a red square", "red"], ["blue"]]}
    found = encoder()(rows)
    assert found["input_ids"] == [ids("a red square"), ids("red"), ids("blue")]
    assert found["row"] == [4, 4, 5]
    assert found["image_key"] == [11, 11, 12]
    assert found["truncated"] == [False] * 3
    assert "prompts" not in found


def test_captions_of_the_same_tokens_are_the_same() -> None:
    rows = {"index": [0, 1, 2], "image": [1, 2, 3], "caption": [["a  red"], ["a red"], ["red a"]]}
    one, other, third = encoder()(rows)["text_key"]
    assert one == other == identity(repr(ids("a red")))
    assert third != one


def test_a_class_is_named_by_every_template() -> None:
    rows = {"index": [0, 1, 2], "image": [1, 2, 3], "label": [1, 0, 1]}
    found = encoder(CLASSES)(rows)
    named = [[ids(template.replace("{}", name)) for template in TEMPLATES] for name in CLASSES]
    assert found["prompts"] == [named[1], named[0], named[1]]
    assert found["input_ids"] == [named[1][0], named[0][0], named[1][0]]  # scored by the first
    assert found["text_key"][0] == found["text_key"][2] != found["text_key"][1]


def test_captions_of_their_own_come_before_prompts() -> None:
    rows = {"index": [0], "image": [1], "caption": [["blue"]], "label": [0]}
    found = encoder(CLASSES)(rows)
    assert found["input_ids"] == [ids("blue")]
    assert "prompts" not in found


def test_a_text_longer_than_the_tower_reads_loses_its_end_and_is_told() -> None:
    texts = ["red", "the red square is on the left ."]
    found, longer = tokenized(tokenizer(), texts, 6)
    assert longer == [False, True]
    assert found == [ids("red"), [*ids(texts[1])[:5], 3]]  # it ends as texts do
    assert tokenized(tokenizer(), texts, None) == ([ids(text) for text in texts], [False] * 2)
    assert tokenized(tokenizer(), [], 6) == ([], [])


def test_prompts_come_class_by_class_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfft.contrastive.prompts._TEXTS_AT_ONCE", 3)
    config: Any = hf.CLIPConfig()
    batches = list(Prompts(CLASSES, TEMPLATES, 16).batches(tokenizer(), config))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    rows = [row[mask.bool()].tolist() for b in batches for row, mask in _rows(b)]
    assert rows == [ids(t.replace("{}", name)) for name in CLASSES for t in TEMPLATES]


def _rows(batch: dict[str, torch.Tensor]) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


def test_a_class_is_the_mean_of_its_prompts_at_length_one() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    half = 0.5**0.5
    found = Prompts(CLASSES, TEMPLATES, None).by_class(embeddings)
    torch.testing.assert_close(found, torch.tensor([[half, half], [1.0, 0.0]]))


def test_other_classes_are_named_by_the_same_templates() -> None:
    known = Prompts(CLASSES, TEMPLATES, 16)
    assert known.naming([]) is known
    assert known.naming(["blue"]) == Prompts(("blue",), TEMPLATES, 16)
    assert Prompts((), (), 16).naming(["blue"]).of("blue") == ["blue"]


def test_siglip_reads_texts_at_full_length_and_without_a_mask() -> None:
    pad = padding(tokenizer(), siglip().config)
    batch = pad([{"input_ids": ids("red")}, {"input_ids": ids("a red square")}])
    assert batch.keys() == {"input_ids"}
    assert batch["input_ids"].shape == (2, 16)
    short = padding(tokenizer(), hf.CLIPConfig())([{"input_ids": ids("red")}])
    assert short["input_ids"].shape == (1, 3)
    assert short["attention_mask"].tolist() == [[1, 1, 1]]
