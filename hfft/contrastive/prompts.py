"""Texts of pairs: captions as token ids, and sentences that name classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from hfft.identities import identity
from hfft.text.inputs import Padding

_TEXTS_AT_ONCE = 256


def _with_a_place(templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
        if template.count("{}") != 1 or template.replace("{}", "").count("{"):
            raise ValueError(f"{template!r} must have one {{}}, where the class's name goes")
    return templates


Templates = Annotated[tuple[str, ...], AfterValidator(_with_a_place)]
"""Sentences with one {} each, for the name of a class."""


@dataclass(frozen=True)
class Prompts:
    """Sentences that name classes (Radford et al. 2021, 3.1.4).

    Attributes:
        classes: their names.
        templates: sentences with {} where the name goes.
        limit: tokens that a text may have; None: any number.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    limit: int | None

    def naming(self, candidates: Sequence[str]) -> Prompts:
        """Return the prompts of other classes, where there are any, by the same templates."""
        if not candidates:
            return self
        return replace(self, classes=tuple(candidates), templates=self.templates or ("{}",))

    def of(self, name: str) -> list[str]:
        """Return the sentences for one class."""
        return [template.replace("{}", name) for template in self.templates]

    def batches(self, tokenizer: Any, config: PretrainedConfig) -> Iterator[dict[str, Tensor]]:
        """Yield all sentences as token ids (B, T), class by class."""
        texts = [text for name in self.classes for text in self.of(name)]
        pad = padding(tokenizer, config)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = tokenized(tokenizer, texts[start : start + _TEXTS_AT_ONCE], self.limit)[0]
            yield pad([{"input_ids": ids} for ids in some])

    def by_class(self, embeddings: Tensor) -> Tensor:
        """Return one embedding of length 1 a class, (K, D), of those of all sentences."""
        each = embeddings.view(len(self.classes), len(self.templates), -1)
        return functional.normalize(each.mean(dim=1), dim=-1)


@dataclass(frozen=True)
class PairEncoder:
    """Makes a pair of each caption, or of a class's name; a class, since it is pickled.

    Attributes:
        tokenizer: the model's.
        prompts: of the classes.
        other: the role beside the captions; its values are identities here.
    """

    tokenizer: Any
    prompts: Prompts
    other: str

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return token ids, both identities, and the example that each pair is of."""
        if "caption" in rows:
            captions = rows["caption"]
            places = [n for n, own in enumerate(captions) for _ in own]
            texts = [text for own in captions for text in own]
        else:
            places = list(range(len(rows["label"])))
            texts = [self.prompts.of(self.prompts.classes[label])[0] for label in rows["label"]]
        ids, truncated = tokenized(self.tokenizer, texts, self.prompts.limit)
        found: dict[str, list[Any]] = {
            "input_ids": ids,
            "truncated": truncated,
            "row": [rows["index"][n] for n in places],
            f"{self.other}_key": [rows[self.other][n] for n in places],
            "text_key": [identity(repr(own)) for own in ids],
        }
        if "caption" not in rows and len(self.prompts.templates) > 1:
            known: dict[int, list[list[int]]] = {}
            for label in {*rows["label"]}:
                sentences = self.prompts.of(self.prompts.classes[label])
                known[label] = tokenized(self.tokenizer, sentences, self.prompts.limit)[0]
            found["prompts"] = [known[label] for label in rows["label"]]
        return found


def tokenized(
    tokenizer: Any, texts: Sequence[str], limit: int | None
) -> tuple[list[list[int]], list[bool]]:
    """Return texts as token ids, and which of them lost their end."""
    if not texts:
        return [], []
    # texts longer than the model takes are told of by the engine
    whole = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    if limit is None:
        return whole, [False] * len(texts)
    longer = [len(ids) > limit for ids in whole]
    if any(longer):
        cut = tokenizer(
            list(texts), return_attention_mask=False, truncation=True, max_length=limit
        )["input_ids"]
        chosen = zip(whole, cut, longer, strict=True)
        whole = [short if over else own for own, short, over in chosen]
    return [list(ids) for ids in whole], longer


def padding(tokenizer: Any, config: PretrainedConfig) -> Padding:
    """Return what pads token ids as the text tower was pretrained.

    SigLIP's texts were padded to full length and read without a mask, its last token for all.
    """
    if "siglip" in config.model_type:
        width = config.get_text_config().max_position_embeddings
        return Padding(tokenizer.padding_side, {"input_ids": tokenizer.pad_token_id}, width)
    return Padding.of(tokenizer)
