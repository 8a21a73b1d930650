"""Text to summary, or to any other text: T5, BART, Pegasus and other encoder-decoders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig

from hfft.registry import register
from hfft.task import Collate, Column, Encode, InputError, ModelConfig, Row, Split, Task, Transform
from hfft.text.inputs import IGNORED, Padding, TextOptions, load_tokenizer, longest, read_texts
from hfft.text.language_scores import language_metrics, score_tokens

USUAL_LENGTH = 1024
"""Tokens of a text where neither the user nor the model sets a limit."""
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class SummarizationOptions(TextOptions):
    """The task's own keys."""

    max_length: int | None = Field(
        None,
        gt=0,
        description=f"tokens of a text; default: as many as the model takes, else {USUAL_LENGTH}",
    )
    max_target_length: int = Field(128, gt=1, description="tokens of a summary to learn from")
    prefix: str | None = Field(
        None,
        description="what every text begins with; default: what the model's config names for "
        'summarization (T5: "summarize: "), else nothing',
    )
    num_beams: int = Field(1, gt=0, description="of beam search; 1: the likeliest token each time")
    max_new_tokens: int | None = Field(
        None, gt=0, description="tokens of a summary that is generated; default: max_target_length"
    )


@register("summarization")
class Summarization(Task):
    """The next token of a summary, given the text, by cross-entropy.

    Generated summaries are scored against whole ones, whatever was cut off to learn from them.
    ROUGE is its authors' (stemmed, English letters and digits only), F-measures between 0 and 1.
    """

    columns: Mapping[str, Column] = {
        "text": Column("text", ("text", "document", "article", "source", "input", "dialogue")),
        "summary": Column("text", ("summary", "highlights", "target", "output", "abstract")),
    }
    Options = SummarizationOptions
    metric_names = (*ROUGE, "gen_length")
    metric = "rougeLsum"  # what papers call ROUGE-L of summaries with several sentences
    auto_model = AutoModelForSeq2SeqLM
    model_suffix = ("ForConditionalGeneration", "MarianMTModel", "EncoderDecoderModel")
    generates = True

    @property
    def _own(self) -> SummarizationOptions:
        """The options, of this task's type."""
        return cast(SummarizationOptions, self.options)

    @property
    def _new_tokens(self) -> int:
        return self._own.max_new_tokens or self._own.max_target_length

    @property
    def augments(self) -> bool:
        """Never."""
        return False

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Write the prefix into the config, in T5's own form, so that the model keeps it."""
        if not config.is_encoder_decoder:
            raise InputError(
                f"model: a {config.model_type} is no encoder-decoder; take T5, BART or the like, "
                f"or, for GPT-like models, task: text-generation"
            )
        _start(config)
        room = _decoder_positions(config)
        for name, asked in (
            ("max_target_length", self._own.max_target_length),
            ("max_new_tokens", self._own.max_new_tokens or 0),
        ):
            if room is not None and asked > room:
                raise InputError(f"task.{name}: {asked} tokens are more than the model's {room}")
        if self._own.prefix is not None:
            uses = dict(getattr(config, "task_specific_params", None) or {})
            config.task_specific_params = uses | {
                "summarization": {**uses.get("summarization", {}), "prefix": self._own.prefix}
            }
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the model's tokenizer."""
        return load_tokenizer(source, config)

    def encode(self, processor: Any, config: PretrainedConfig) -> Encode:
        """Return text and summary to `input_ids` and `labels`."""
        read = self._reader(processor, config)
        most = self._own.max_target_length
        if most <= (special := processor.num_special_tokens_to_add()):
            raise InputError(
                f"task.max_target_length: {most} tokens leave no room for a summary beside the "
                f"{special} special ones; give more"
            )

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            texts, texts_cut = read(rows["text"])
            labels, labels_cut = _tokens(processor, rows["summary"], most, "text_target")
            return {
                "index": rows["index"],
                "input_ids": texts,
                "labels": labels,
                "truncated": [any(cut) for cut in zip(texts_cut, labels_cut, strict=True)],
            }

        return encode

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return encoded example to `input_ids`, T numbers, and `labels`, S numbers."""

        def inputs(row: Row) -> dict[str, Any]:
            return {"input_ids": row["input_ids"], "labels": row["labels"]}

        return inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Return what pads texts to (B, T) and summaries to (B, S), on the right.

        The decoder reads each summary one token late, as transformers' models do it themselves if
        they are given labels. What it reads beyond a summary's end comes after all that counts.
        """
        pad = Padding.of(processor)
        pad_labels = Padding("right", {"input_ids": IGNORED})
        start = _start(config)

        def collate(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            batch = pad(inputs)
            if "labels" not in inputs[0]:
                return batch
            labels = pad_labels([{"input_ids": one["labels"]} for one in inputs])["input_ids"]
            late = labels.roll(1, dims=1)
            late[:, 0] = start
            late = late.masked_fill(late == IGNORED, processor.pad_token_id)
            return {**batch, "decoder_input_ids": late, "labels": labels}

        return collate

    def generate(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the summaries' tokens, (B, S); the source's own rules of generation are off."""
        of_decoder = ("decoder_input_ids", "labels")
        made = model.generate(
            **{name: value for name, value in inputs.items() if name not in of_decoder},
            decoder_start_token_id=_start(model.config),
            max_new_tokens=self._new_tokens,
            max_length=None,
            num_beams=self._own.num_beams,
            do_sample=False,
            # BART's and others' generation_config.json sets these for the data of its authors
            min_length=None,
            min_new_tokens=None,
            no_repeat_ngram_size=0,
            encoder_no_repeat_ngram_size=0,
            repetition_penalty=1.0,
            length_penalty=1.0,
            early_stopping=False,
            use_cache=True,
        )
        return cast(Tensor, made[:, 1:])  # without the token that starts the decoder

    def reduce(self, outputs: Any, labels: Tensor) -> Tensor:
        """Return each example's loss, tokens, and tokens that were likeliest, (B, 3)."""
        return score_tokens(outputs.logits, labels)

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Score generated summaries, (N, S), by ROUGE, and count their tokens.

        The loss is the mean over all tokens to learn from, whichever batches they came in.
        """
        from rouge_score.rouge_scorer import RougeScorer  # slow to import

        tokenizer, (generated, losses) = split.processor, predictions
        made = np.where(generated == IGNORED, tokenizer.pad_token_id, generated)
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        summaries = list(split.rows["summary"])
        wanted = [summaries[index] for index in split.encoded["index"]]
        scorer = RougeScorer(ROUGE, use_stemmer=True)
        scores = [
            scorer.score(_lines(one), _lines(text)) for one, text in zip(wanted, texts, strict=True)
        ]
        lengths = (~np.isin(made, tokenizer.all_special_ids)).sum(axis=-1)
        rouge = {name: float(np.mean([one[name].fmeasure for one in scores])) for name in ROUGE}
        loss = language_metrics(losses)["loss"]
        return {"loss": loss, **rouge, "gen_length": float(lengths.mean())}

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield texts."""
        return read_texts(given)

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[str], dict[str, Any]]:
        """Return text to summary: transformers 5 has no pipeline for it."""
        source = ModelConfig(name=str(folder), trust_remote_code=trust_remote_code)
        model = self.auto_model.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        tokenizer = self.load_processor(source, model.config)
        read = self._reader(tokenizer, model.config)
        collate = self.collator(tokenizer, model.config)

        def answer(text: str) -> dict[str, Any]:
            [tokens], _ = read([text])
            inputs = collate([{"input_ids": tokens}])
            made = self.generate(model, {k: v.to(model.device) for k, v in inputs.items()})
            return {"summary": tokenizer.decode(made[0], skip_special_tokens=True).strip()}

        return answer

    def told(self, answer: Mapping[str, Any]) -> str:
        """Return the summary."""
        return str(answer["summary"])

    def _reader(
        self, tokenizer: Any, config: PretrainedConfig
    ) -> Callable[[Sequence[str]], tuple[list[list[int]], list[bool]]]:
        """Return texts to their tokens, behind the prefix, and whether any were cut off."""
        limit = longest(tokenizer, config, self._own.max_length) or USUAL_LENGTH
        uses = getattr(config, "task_specific_params", None) or {}
        named = uses.get("summarization", {}).get("prefix", "")
        prefix = named if self._own.prefix is None else self._own.prefix
        if limit <= len(tokenizer(prefix)["input_ids"]):
            raise InputError(
                f"task.max_length: {limit} tokens leave no room for text behind the prefix "
                f"{prefix!r}; give more"
            )

        def read(texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
            return _tokens(tokenizer, [prefix + text for text in texts], limit, "text")

        return read


def _tokens(
    tokenizer: Any, texts: Sequence[str], limit: int, kind: str
) -> tuple[list[list[int]], list[bool]]:
    """Return texts' tokens, at most `limit` with the special ones, and whether any were cut off.

    Args:
        tokenizer: of any kind, those included that don't say what they cut off.
        texts: the texts.
        limit: the most tokens.
        kind: "text", or "text_target", which some tokenizers treat otherwise.
    """
    tokens = tokenizer(**{kind: list(texts)}, verbose=False)["input_ids"]
    cut = [len(one) > limit for one in tokens]
    for place, too_long in enumerate(cut):
        if too_long:
            short = tokenizer(**{kind: texts[place]}, truncation=True, max_length=limit)
            tokens[place] = short["input_ids"]
    return tokens, cut


def _start(config: PretrainedConfig) -> int:
    """Return the token that the decoder begins with; where none is named, the first of texts."""
    own = getattr(config, "decoder_start_token_id", None)
    start = getattr(config.get_text_config(), "bos_token_id", None) if own is None else own
    if start is None:
        raise InputError(
            "model: its config.json names no decoder_start_token_id, which summaries begin with; "
            "set it as the model's authors describe it"
        )
    return int(start)


def _decoder_positions(config: PretrainedConfig) -> int | None:
    """Return how many tokens the decoder takes; None: any number."""
    for name in ("max_decoder_position_embeddings", "max_position_embeddings"):
        if (found := getattr(config.get_text_config(), name, None)) is not None:
            return int(found)
    return None


def _lines(text: str) -> str:
    """Put each sentence on a line, where ROUGE-Lsum wants it."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())
