"""Text with gaps to the words that fill them: masked language models, as they were pretrained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForMaskedLM, PretrainedConfig, pipeline

from hfft.registry import register
from hfft.task import (
    Collate,
    Column,
    Encode,
    InputError,
    ModelConfig,
    Row,
    Section,
    Split,
    Task,
    Transform,
)
from hfft.text.inputs import IGNORED, Padding, load_tokenizer, longest, read_texts
from hfft.text.language_scores import LANGUAGE_METRICS, language_metrics, score_tokens

# BERT's rule (Devlin et al. 2019) for a token that is to be predicted: what it is replaced by. The
# rest stay as they are, so that the model can't take what it sees for granted.
_MASK, _RANDOM = 0.8, 0.1

Tokens = npt.NDArray[np.int64]


class FillMaskOptions(Section):
    """The fill-mask task's own keys."""

    max_length: int | None = Field(
        None,
        gt=0,
        description="tokens of a window, of which longer texts give several; default: as many as "
        "the model takes",
    )
    mask_probability: float = Field(
        0.15,
        gt=0,
        le=1,
        description="share of the tokens that are predicted, at least one an example; 80% of them "
        "are masked, 10% replaced at random, 10% left",
    )
    whole_words: bool = Field(
        False, description="a word's tokens are predicted all together or not at all"
    )


@register("fill-mask")
class FillMask(Task):
    """Text with gaps to what fills them, by the cross-entropy of each token that is missing."""

    columns: Mapping[str, Column] = {
        "text": Column("text", ("text", "sentence", "content", "document", "body"))
    }
    Options = FillMaskOptions
    metric_names = LANGUAGE_METRICS
    metric = "perplexity"
    lower_is_better = ("loss", "perplexity")
    auto_model = AutoModelForMaskedLM
    model_suffix = "ForMaskedLM"

    @property
    def _own(self) -> FillMaskOptions:
        """The options, of this task's type."""
        return cast(FillMaskOptions, self.options)

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Return the config as it is: the head is the pretrained one."""
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the tokenizer, which must have a mask token."""
        tokenizer = load_tokenizer(source, config, mask_token=True)
        if not tokenizer.is_fast:
            raise InputError(
                f"model: {source.name}: its tokenizer can't cut long texts into windows; convert "
                f"it to a fast one (tokenizer.json)"
            )
        return tokenizer

    def encode(self, processor: Any, config: PretrainedConfig) -> Encode:
        """Return what makes `input_ids`, of long texts in several windows; nothing is cut off.

        With whole words there is `words` too: the number of each token's word, -1 for none.
        """
        limit = longest(processor, config, self._own.max_length)
        how = {} if limit is None else {"truncation": True, "max_length": limit}
        special, with_words = _special(processor), self._own.whole_words

        def encoded(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            found = processor(
                list(rows["text"]), return_overflowing_tokens=limit is not None, **how
            )
            ids = [np.array(window, dtype=np.int32) for window in found["input_ids"]]
            # windows in which there is nothing to predict come out empty
            kept = [window[: 0 if np.isin(window, special).all() else None] for window in ids]
            if not with_words:
                return {"input_ids": kept}
            words = [
                np.array([-1 if word is None else word for word in found.word_ids(number)])
                for number in range(len(ids))
            ]
            return {"input_ids": kept, "words": words}

        return encoded

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return encoded example to `input_ids` with gaps, and `labels`, what was there."""
        return _Masking.of(processor, self._own)

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Return what pads a batch."""
        return Padding.of(processor, labels=IGNORED)

    def reduce(self, outputs: Any, labels: Tensor) -> Tensor:
        """Return each example's loss, tokens, and tokens that were likeliest, (B, 3)."""
        return score_tokens(outputs.logits, labels)

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Return the loss a gap, its exponential, and how often the right token was likeliest."""
        return language_metrics(predictions)

    def read_inputs(self, given: Sequence[str]) -> Iterable[tuple[str, Any]]:
        """Yield texts, each with a mask token."""
        return read_texts(given)

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[Any], dict[str, Any]]:
        """Return what fills the gap in a text: the likeliest tokens, each with its score."""
        run: Any = pipeline("fill-mask", model=str(folder), trust_remote_code=trust_remote_code)
        mask = run.tokenizer.mask_token
        limit = longest(run.tokenizer, run.model.config, None)

        def fill(text: str) -> dict[str, Any]:
            ids = run.tokenizer(text)["input_ids"]
            if (gaps := ids.count(run.tokenizer.mask_token_id)) != 1:
                raise InputError(
                    f'"{text[:40]}": has {gaps} gaps; write {mask} once, where a word is missing'
                )
            if limit is not None and len(ids) > limit:
                raise InputError(
                    f'"{text[:40]}": has {len(ids):,} tokens, the model takes {limit:,}; shorten it'
                )
            found = run(text)
            return {"scores": [{"label": s["token_str"], "score": s["score"]} for s in found]}

        return fill


@dataclass(frozen=True)
class _Masking:
    """Draws which tokens are predicted, and what stands in their place, from numpy's generator.

    Attributes:
        probability: of each token's, or word's, being predicted.
        mask: the mask token.
        special: tokens that are never predicted.
        others: tokens to replace one by at random.
    """

    probability: float
    mask: int
    special: Tokens
    others: Tokens

    @classmethod
    def of(cls, tokenizer: Any, options: FillMaskOptions) -> _Masking:
        special = _special(tokenizer)
        others = np.setdiff1d(list(tokenizer.get_vocab().values()), special)
        return cls(options.mask_probability, tokenizer.mask_token_id, special, others)

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return `input_ids` and `labels` of shape (T,)."""
        ids = np.array(row["input_ids"], dtype=np.int64)
        places = np.flatnonzero(~np.isin(ids, self.special))
        units = np.array(row["words"])[places] if "words" in row else places
        places = places[np.isin(units, self._drawn(np.unique(units)))]
        labels = np.full_like(ids, IGNORED)
        labels[places] = ids[places]
        fate = np.random.random(len(places))
        ids[places[fate < _MASK]] = self.mask
        replaced = places[(fate >= _MASK) & (fate < _MASK + _RANDOM)]
        ids[replaced] = np.random.choice(self.others, len(replaced))
        return {"input_ids": ids, "labels": labels}

    def _drawn(self, units: Tokens) -> Tokens:
        """Return those of the tokens or words that are predicted, one if chance has it none."""
        drawn = units[np.random.random(len(units)) < self.probability]
        return drawn if len(drawn) else np.random.choice(units, 1)


def _special(tokenizer: Any) -> Tokens:
    """Return the tokens that stand for no word: [CLS], [SEP], [PAD], [MASK], [UNK]."""
    return np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
