"""An image classifier whose head was made of the names of its classes, by a text tower.

An image tower as a pair of towers (CLIP, Radford et al. 2021) was pretrained with, its projection,
and a linear classifier of what they embed an image as. Classes that are rows of scaled text
embeddings make it the zero-shot classifier that the pair is, from where it can be fine-tuned
(WiSE-FT, Wortsman et al. 2022).

A copy of this file, of `tower.py` and of `pooling.py` travels with every model that is saved, so
that transformers loads it where hfft isn't installed (`trust_remote_code=True`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .tower import TowerPooling, make_tower, pooled, width_of


class ZeroShotHeadConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The config of an image tower, and how its output becomes an embedding.

    Args:
        vision_config: of the tower, or its fields.
        vision_pooling: how its output becomes a vector.
        projection_dim: what that is projected to; None: it isn't, as in SigLIP.
        prompt_templates: sentences that the classes' names were put into.
        others: fields that every config has: labels, dtype.
    """

    model_type = "zero-shot-head"
    sub_configs = {"vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_pooling: TowerPooling = "pooler",
        projection_dim: int | None = None,
        prompt_templates: list[str] | None = None,
        **others: Any,
    ) -> None:
        if isinstance(vision_config, dict):
            vision_config = AutoConfig.for_model(**vision_config)
        self.vision_config = vision_config
        self.vision_pooling = vision_pooling
        self.projection_dim = projection_dim
        self.prompt_templates = prompt_templates
        super().__init__(**others)

    @classmethod
    def of_pair(cls, pair: PretrainedConfig, templates: list[str]) -> ZeroShotHeadConfig:
        """Return the config of a classifier with a pair's image tower, whose config it takes.

        Args:
            pair: with a `vision_config`.
            templates: sentences for the classes' names.
        """
        config = cls(
            cast(Any, pair).vision_config,
            getattr(pair, "vision_pooling", "pooler"),
            getattr(pair, "projection_dim", None),
            templates,
            dtype=pair.dtype,
            attn_implementation=pair._attn_implementation,
        )
        config.name_or_path = pair.name_or_path
        return config


class ImageEncoder(nn.Module):
    """An image tower and its projection, under the names that they have in a pair.

    Args:
        config: of the tower.
        tower: that is there already; None: one with fresh weights.
    """

    def __init__(self, config: ZeroShotHeadConfig, tower: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.pooling = config.vision_pooling
        self.vision_model = tower or make_tower(cast(Any, config.vision_config), self.pooling)
        width = width_of(self.vision_model, self.pooling)
        self.width = config.projection_dim or width
        self.visual_projection = nn.Linear(width, self.width, bias=False)
        if config.projection_dim is None:
            self.visual_projection = cast(Any, nn.Identity())

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """Return the tower's output; its `pooler_output` is the embedding (B, D), of length 1.

        Args:
            pixel_values: (B, C, H, W).
            options: the tower's own.
        """
        output = self.vision_model(pixel_values=pixel_values, **options)
        vector = pooled(self.vision_model, output, None, self.pooling)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=functional.normalize(self.visual_projection(vector), dim=-1),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )


class ZeroShotHeadForImageClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """An image encoder, and a linear classifier of its embeddings.

    Args:
        config: of both.
        tower: an image tower that is there already, such as one with pretrained weights.
    """

    config_class = ZeroShotHeadConfig
    base_model_prefix = "image_encoder"
    main_input_name = "pixel_values"
    # what the tower can't do, it refuses itself
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # the loss is a batch's mean: what a Trainer says of other batches it would have to ignore
    accepts_loss_kwargs = False

    def __init__(self, config: ZeroShotHeadConfig, tower: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.image_encoder = ImageEncoder(config, tower)
        self.classifier = nn.Linear(self.image_encoder.width, cast(int, config.num_labels))
        self.supports_gradient_checkpointing = self._tower.supports_gradient_checkpointing
        cast(Any, self).post_init()

    @property
    def _tower(self) -> Any:
        return self.image_encoder.vision_model

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any
    ) -> ImageClassifierOutput:
        """Return logits (B, K) and, with labels, the mean loss.

        Args:
            pixel_values: (B, C, H, W).
            labels: (B,) classes.
            options: the tower's own.
        """
        output = self.image_encoder(pixel_values, **options)
        logits = self.classifier(output.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def get_input_embeddings(self) -> Any:
        """Return the tower's embedding of patches."""
        return self._tower.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the tower's embedding of patches."""
        self._tower.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise projection and classifier; the tower looks after itself."""
        if isinstance(module, nn.Linear):  # as CLIP's
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)

    def _set_gradient_checkpointing(self, *args: Any, **options: Any) -> None:
        """Turn it on or off in the tower, in its own way, as timm's."""
        self._tower._set_gradient_checkpointing(*args, **options)


AutoConfig.register(ZeroShotHeadConfig.model_type, ZeroShotHeadConfig, exist_ok=True)
AutoModelForImageClassification.register(
    ZeroShotHeadConfig, ZeroShotHeadForImageClassification, exist_ok=True
)
for _kind, _auto in (  # whose code and name are saved with a model
    (ZeroShotHeadConfig, "AutoConfig"),
    (ZeroShotHeadForImageClassification, "AutoModelForImageClassification"),
):
    cast(Any, _kind).register_for_auto_class(_auto)
