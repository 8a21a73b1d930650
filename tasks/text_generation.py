"""Text to its continuation: any causal language model, on texts, prompts with answers, or chats."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    pipeline,
)

from hfft.registry import register
from hfft.task import Collate, Column, Encode, InputError, ModelConfig, Row, Split, Task, Transform
from hfft.text.conversations import (
    Conversations,
    apply_template,
    conversation_flaw,
    read_template,
)
from hfft.text.inputs import IGNORED, TextOptions, load_tokenizer, longest, read_records
from hfft.text.language_scores import LANGUAGE_METRICS, language_metrics, score_tokens
from hfft.text.packing import RowCollator, join_examples, pack
from hfft.text.visibility import keeps_apart, reads_ahead

_MOST_TOKENS = 1024
"""An example's, where neither options nor model say less: attention's memory grows with it."""

Tokens = npt.NDArray[np.int32]


class TextGenerationOptions(TextOptions):
    """The text generation task's own keys."""

    max_length: int | None = Field(
        None, gt=0, description=f"tokens of a row; default: the model's, at most {_MOST_TOKENS}"
    )
    packing: bool = Field(
        True,
        description="several training examples share a row of max_length tokens, none of which "
        "sees another; a batch size then counts rows",
    )
    loss_on: Literal["completion", "all"] = Field(
        "completion",
        description="what is learned of prompts and chats: completions and the assistant's turns, "
        "or every token; plain texts are learned whole",
    )
    chat_template: str | None = Field(
        None, description="Jinja, or a file of it; default: the tokenizer's own"
    )
    max_new_tokens: int = Field(128, gt=0, description="that a prediction has at most")
    temperature: float = Field(
        0, ge=0, description="of predictions; 0: the likeliest token each time"
    )


@register("text-generation")
class TextGeneration(Task):
    """Text to its continuation, by the cross-entropy of each next token."""

    columns: Mapping[str, Column] = {
        "text": Column("text", ("text", "content", "document", "body"), optional=True),
        "prompt": Column("text", ("prompt", "instruction", "question", "query"), optional=True),
        "context": Column("text", ("input", "context"), optional=True, blank=True),
        "completion": Column("text", ("completion", "response", "output", "answer"), optional=True),
        "messages": Column("messages", ("messages", "conversations", "chat"), optional=True),
    }
    Options = TextGenerationOptions
    metric_names = LANGUAGE_METRICS
    metric = "perplexity"
    lower_is_better = ("loss", "perplexity")
    auto_model = AutoModelForCausalLM
    model_suffix = ("ForCausalLM", "LMHeadModel")
    checked = True

    @property
    def _own(self) -> TextGenerationOptions:
        """The options, of this task's type."""
        return cast(TextGenerationOptions, self.options)

    @property
    def augments(self) -> bool:
        """Nothing is random."""
        return False

    def roles(self, found: Collection[str]) -> Collection[str]:
        """Return what is learned from: chats before prompts with completions before texts."""
        if "messages" in found:
            return ("messages",)
        if {"prompt", "completion"} <= set(found):
            return tuple(role for role in ("prompt", "context", "completion") if role in found)
        if "text" in found:
            return ("text",)
        half = next((role for role in ("prompt", "completion") if role in found), None)
        what = "no text" if half is None else f"a {half} column alone"
        raise InputError(
            f"data: there is {what} to learn from; name the columns that hold texts, prompts and "
            f"completions, or chats under data.columns, as in {{prompt: A, completion: B}}, "
            f"{{text: A}} or {{messages: A}}"
        )

    def flaws(self, rows: Mapping[str, list[Any]]) -> list[str]:
        """Return what keeps a conversation or a completion from being learned."""
        if "messages" in rows:
            return [conversation_flaw(one, answered=True) for one in rows["messages"]]
        if "completion" in rows:
            return [
                "" if text.strip() else "has an empty completion" for text in rows["completion"]
            ]
        return [""] * len(rows["text"])

    def configure(self, config: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
        """Return the config as it is: the head is the pretrained one."""
        looks_back = ("is_decoder", "is_encoder_decoder", "causal")
        of_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING
        if of_gaps and not any(getattr(config, name, False) for name in looks_back):
            raise InputError(
                f"model: {config.name_or_path or config.model_type} fills gaps and reads ahead; "
                f"take a causal language model, or, for this one, task: fill-mask"
            )
        return config

    def load_processor(self, source: ModelConfig, config: PretrainedConfig) -> Any:
        """Return the tokenizer, with the options' chat template; it leaves texts open."""
        tokenizer = load_tokenizer(source, config)
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"model: {source.name}: its tokenizer has no end-of-text token, which the model "
                f"has to learn to stop with; set eos_token in its tokenizer_config.json"
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"model: {source.name}: its tokenizer doesn't say which characters its tokens "
                f"stand for; convert it to a fast one (tokenizer.json)"
            )
        if self._own.chat_template is not None:
            tokenizer.chat_template = read_template(self._own.chat_template)
        _leave_open(tokenizer)
        return tokenizer

    def encode(self, processor: Any, config: PretrainedConfig) -> Encode:
        """Return what makes `input_ids` and `labels`, the token that is to follow each."""
        limit = longest(processor, config, self._own.max_length) or _MOST_TOKENS
        if self._own.max_length is None:
            limit = min(limit, _MOST_TOKENS)
        return _Encoder(processor, limit, self._own.loss_on == "all")

    def pack(self, lengths: np.ndarray, config: PretrainedConfig) -> list[np.ndarray] | None:
        """Return which examples share a row, as few rows as can be; None without packing."""
        if not self._own.packing:
            return None
        capacity = self._own.max_length
        if capacity is None:
            positions = getattr(config.get_text_config(), "max_position_embeddings", None)
            capacity = min(positions or _MOST_TOKENS, _MOST_TOKENS)
        return pack(lengths, max(capacity, int(lengths.max(initial=1))))

    def transform(self, processor: Any, *, training: bool) -> Transform:
        """Return encoded example, or several packed, to a row of inputs."""

        def inputs(row: Row) -> dict[str, Any]:
            if "packed" in row:
                return join_examples(row["packed"])
            return {name: row[name] for name in ("input_ids", "labels")}

        return inputs

    def collator(self, processor: Any, config: PretrainedConfig) -> Collate:
        """Return what pads rows; those of several examples tell them apart by `position_ids`."""
        return RowCollator.of(processor.pad_token_id, config)

    def reduce(self, outputs: Any, labels: Tensor) -> Tensor:
        """Return each example's loss, tokens, and tokens that were likeliest, (B, 3)."""
        return score_tokens(outputs.logits, labels)

    def check_model(self, model: PreTrainedModel) -> None:
        """See that no token knows the next one, and, with packing, none another example.

        Raises:
            InputError: the model reads ahead, or examples that share a row see each other.
        """
        name = type(model).__name__
        if reads_ahead(model):
            raise InputError(
                f"model: {name} reads ahead: what it says of a text changes with the words that "
                f"follow; take a causal language model, or, for this one, task: fill-mask"
            )
        if self._own.packing and not keeps_apart(model):
            raise InputError(
                f"task.packing: {name} lets examples that share a row see each other; set "
                f"task.packing: false"
            )

    def metrics(self, predictions: Any, labels: np.ndarray, split: Split) -> dict[str, float]:
        """Return the loss a token, its exponential, and how often the right one was likeliest."""
        return language_metrics(predictions)

    def read_inputs(self, given: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield prompts and chats: texts, or JSON Lines with `prompt` or `messages`."""
        records = read_records(given, (), alone="prompt", optional=("prompt", "messages"))
        for place, record in records:
            prompt, messages = record.get("prompt"), record.get("messages")
            if bool(prompt) == bool(messages):
                raise InputError(
                    f'{place}: expected {{"prompt": ...}} or {{"messages": [...]}}, one of the two'
                )
            if messages and (flaw := conversation_flaw(messages, answered=False)):
                raise InputError(f"{place}: {flaw}")
            yield place, messages or prompt

    def predictor(
        self, folder: Path, *, trust_remote_code: bool = False
    ) -> Callable[[Any], dict[str, Any]]:
        """Return what continues a text as it is, and answers a chat by the chat template."""
        run: Any = pipeline(
            "text-generation", model=str(folder), trust_remote_code=trust_remote_code
        )
        own = self._own
        how = {"temperature": own.temperature} if own.temperature else {}
        limit = longest(run.tokenizer, run.model.config, None)

        def answer(value: Any) -> dict[str, Any]:
            if isinstance(value, str):
                ids = run.tokenizer(value)["input_ids"]
            else:
                place = f'"{value[-1]["content"][:40]}"'
                chat = apply_template(run.tokenizer, value, place, add_generation_prompt=True)
                ids = chat["input_ids"]
            room = (
                own.max_new_tokens if limit is None else min(own.max_new_tokens, limit - len(ids))
            )
            if room < 1:
                raise InputError(
                    f"the prompt has {len(ids):,} tokens, and the model takes {limit:,} with its "
                    f"answer; shorten it"
                )
            [found] = run(
                value,
                return_full_text=False,
                max_new_tokens=room,
                do_sample=own.temperature > 0,
                **how,
            )
            return {"generated_text": found["generated_text"]}

        return answer

    def told(self, answer: Mapping[str, Any]) -> str:
        """Return the new text, in a line."""
        return " ".join(answer["generated_text"].split())


@dataclass(frozen=True)
class _Encoder:
    """Makes token ids of examples, and says which of them are learned.

    Attributes:
        tokenizer: leaves texts open.
        limit: tokens of an example.
        everything: whether prompts and other people's turns are learned too.
    """

    tokenizer: Any
    limit: int
    everything: bool

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        pairs: Iterable[tuple[list[int], list[bool]]]
        if "messages" in rows:
            write = Conversations(self.tokenizer, self.everything)
            pairs = [
                write(messages, f"data: example {index}")
                for messages, index in zip(rows["messages"], rows["index"], strict=True)
            ]
        elif "completion" in rows:
            pairs = self._completions(rows)
        else:
            return self._texts(rows["text"])
        found: dict[str, list[Any]] = {"input_ids": [], "labels": [], "truncated": []}
        for ids, learned in pairs:
            inputs, labels = _shifted(ids, learned)
            found["truncated"].append(len(inputs) > self.limit)
            kept = _until_last(labels[: self.limit])
            found["input_ids"].append(inputs[:kept])
            found["labels"].append(labels[:kept])
        return found

    def _texts(self, texts: Sequence[str]) -> dict[str, list[Any]]:
        """Cut long texts into windows, shifted before they are cut: no token goes unlearned."""
        found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for text, ids in zip(texts, self.tokenizer(list(texts))["input_ids"], strict=True):
            whole = [*ids, self.tokenizer.eos_token_id] if text.strip() else []
            inputs, labels = _shifted(whole, [True] * len(whole))
            for start in range(0, max(len(inputs), 1), self.limit):
                found["input_ids"].append(inputs[start : start + self.limit])
                found["labels"].append(labels[start : start + self.limit])
        return found

    def _completions(self, rows: Mapping[str, list[str]]) -> Iterator[tuple[list[int], list[bool]]]:
        """Join prompts and completions, as they are.

        The prompt's tokens are those that it has alone, since it is alone at prediction. Where the
        joint text begins with them, the completion's are the rest of it; where a token would span
        the boundary, they are those of the completion alone.
        """
        prompts = rows["prompt"]
        if "context" in rows:
            prompts = [
                f"{prompt}\n\n{context}" if context.strip() else prompt
                for prompt, context in zip(prompts, rows["context"], strict=True)
            ]
        completions = rows["completion"]
        joint = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        alone, together = (self.tokenizer(texts)["input_ids"] for texts in (prompts, joint))
        for start, whole, text in zip(alone, together, completions, strict=True):
            rest = whole[len(start) :]
            if whole[: len(start)] != start:
                rest = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [*start, *rest, self.tokenizer.eos_token_id]
            yield ids, [self.everything] * len(start) + [True] * (len(rest) + 1)


def _shifted(ids: Sequence[int], learned: Sequence[bool]) -> tuple[Tokens, Tokens]:
    """Return T tokens and, for each, the one to follow, IGNORED where that isn't learned.

    What follows the last one that is learned is left out.
    """
    tokens = np.array(ids, dtype=np.int32)
    labels = np.where(learned[1:], tokens[1:], np.int32(IGNORED))
    kept = _until_last(labels)
    return tokens[:kept], labels[:kept]


def _until_last(labels: Tokens) -> int:
    """Return how many tokens there are up to the last that has a label."""
    return int(np.flatnonzero(labels != IGNORED).max(initial=-1)) + 1


def _leave_open(tokenizer: Any) -> None:
    """Keep a tokenizer from ending each text: a prompt that is ended has no continuation."""
    found = tokenizer("a", return_special_tokens_mask=True)
    if not found["special_tokens_mask"][-1]:
        return
    ids = found["input_ids"][: found["special_tokens_mask"].index(0)]
    first = tokenizer.convert_ids_to_tokens(ids)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*first, "$A"],
        pair=[*first, "$A", "$B:1"],
        special_tokens=list(zip(first, ids, strict=True)),
    )
