"""A classifier on pooled hidden states, on any base model of transformers.

A copy of this file, and of `pooling.py`, travels with every model that is saved, so that
transformers loads it where hfft isn't installed (`trust_remote_code=True`).
"""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from .pooling import Pooling, pool, without_pooler


class PooledConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The config of a base model, and how its hidden states become one vector.

    Args:
        text_config: the base model's, or the fields of it.
        pooling: how the hidden states of an example's tokens are pooled.
        classifier_dropout: of the pooled vector.
        others: fields that every config has: labels, problem_type, dtype.
    """

    model_type = "pooled-text-classifier"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        pooling: Pooling = "mean",
        classifier_dropout: float = 0.0,
        **others: Any,
    ) -> None:
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling: {pooling!r} is none of {', '.join(get_args(Pooling))}")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.pooling = pooling
        self.classifier_dropout = classifier_dropout
        super().__init__(**others)

    @classmethod
    def around(cls, base: PretrainedConfig, pooling: Pooling) -> PooledConfig:
        """Return the config of a pooled classifier on a base model, whose own config it takes."""
        inner = base.get_text_config()
        names = ("classifier_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout")
        found = [getattr(inner, name, None) for name in names]
        dropout = next((value for value in found if isinstance(value, float)), 0.0)
        if getattr(inner, "use_cache", False):
            inner.use_cache = False  # keys and values are of use for generation only
        asked = base._attn_implementation
        config = cls(base, pooling, dropout, dtype=base.dtype, attn_implementation=asked)
        config.name_or_path, base.name_or_path = base.name_or_path, ""  # it would be saved inside
        return config


class PooledForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A base model, pooling over its tokens, and a linear classifier.

    The base model stands under the name that its own family gives it (`bert`, `transformer`,
    `model`), so that the weights of any model of the family load.

    Args:
        config: of the base model and the pooling.
    """

    config_class = PooledConfig
    supports_gradient_checkpointing = True
    # what the base model can't do, it refuses itself
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # the loss is a batch's mean: what a Trainer says of other batches it would have to ignore
    accepts_loss_kwargs = False

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)
        inner: Any = config.text_config
        base = cast(Any, AutoModel).from_config(
            inner, dtype=torch.get_default_dtype(), **without_pooler(inner)
        )
        self.base_model_prefix = base.base_model_prefix or "model"
        setattr(self, self.base_model_prefix, base)
        self.num_labels = config.num_labels
        self.supports_gradient_checkpointing = base.supports_gradient_checkpointing
        self.dropout = nn.Dropout(config.classifier_dropout)
        width = inner.get_text_config().hidden_size
        self.classifier = nn.Linear(width, cast(int, config.num_labels))
        cast(Any, self).post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Return logits (B, K) and, with labels, the mean loss.

        Args:
            input_ids: (B, T); or `inputs_embeds`.
            attention_mask: (B, T), 0 for padding; left out: there is none.
            token_type_ids: (B, T), for base models that know them.
            position_ids: (B, T), for base models that know them.
            inputs_embeds: (B, T, D).
            labels: (B,) classes or numbers, or (B, K) for several labels at once.
            return_dict: False: return a tuple of them.
            options: the base model's own.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        given = {name: value for name, value in given.items() if value is not None}
        output = self.base_model(**given, **options)
        pooled = pool(output.last_hidden_state, attention_mask, self.config.pooling)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        found = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )
        return found.to_tuple() if return_dict is False else found


AutoConfig.register(PooledConfig.model_type, PooledConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    PooledConfig, PooledForSequenceClassification, exist_ok=True
)
for _kind, _auto in (  # whose code and name are saved with a model
    (PooledConfig, "AutoConfig"),
    (PooledForSequenceClassification, "AutoModelForSequenceClassification"),
):
    cast(Any, _kind).register_for_auto_class(_auto)
