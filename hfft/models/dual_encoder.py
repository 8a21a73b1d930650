"""Two towers, one of texts, and a linear map from each to the space where pairs meet.

CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023), of any two models of transformers.

A copy of this file, of `tower.py` and of `pooling.py` travels with every model that is saved, so
that transformers loads it where hfft isn't installed (`trust_remote_code=True`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput, can_return_tuple

from .tower import POOLINGS, TowerPooling, make_tower, pooled, width_of

PROJECTIONS = {
    "vision": "visual_projection",
    "audio": "audio_projection",
    "text": "text_projection",
}
"""Tower name to what its projection is called, as CLIP and CLAP have it."""
_SCALES = {"softmax": math.log(1 / 0.07), "sigmoid": math.log(10)}
"""Logarithms of what similarities are multiplied with at first, as CLIP and SigLIP have them."""
_FIRST_BIAS = -10.0
"""That SigLIP adds to them: most pairs of a batch don't belong together."""


class DualEncoderConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The configs of two towers, and how their outputs become embeddings.

    Args:
        vision_config: of the image tower, or its fields; or `audio_config`.
        audio_config: of the audio tower.
        text_config: of the text tower.
        projection_dim: of the embeddings. ALBEF and BLIP take 256 too, for towers of 768: half the
            products of CLIP's 512.
        vision_pooling: how the image tower's output becomes a vector.
        audio_pooling: how the audio tower's does.
        text_pooling: how the text tower's does.
        loss: decides how scale and bias start, and whether there is a bias.
        others: fields that every config has.
    """

    model_type = "dual-encoder"
    sub_configs = {  # noqa: RUF012
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        audio_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dim: int = 256,
        vision_pooling: TowerPooling = "pooler",
        audio_pooling: TowerPooling = "mean",
        text_pooling: TowerPooling = "mean",
        loss: Literal["softmax", "sigmoid"] = "softmax",
        **others: Any,
    ) -> None:
        if loss not in _SCALES:
            raise ValueError(f"loss: {loss!r} is neither softmax nor sigmoid")
        self.vision_config = _config(vision_config)
        self.audio_config = _config(audio_config)
        self.text_config = _config(text_config)
        self.projection_dim = projection_dim
        self.vision_pooling = vision_pooling
        self.audio_pooling = audio_pooling
        self.text_pooling = text_pooling
        for tower in PROJECTIONS:
            if (pooling := self.pooling(tower)) not in POOLINGS:
                raise ValueError(f"{tower}_pooling: {pooling!r} is none of {', '.join(POOLINGS)}")
        self.loss = loss
        super().__init__(**others)

    @property
    def towers(self) -> tuple[str, str]:
        """The names of the towers: vision or audio, and text."""
        others = [name for name in ("vision", "audio") if self.tower(name) is not None]
        if len(others) != 1 or self.text_config is None:
            raise ValueError("a dual encoder needs text_config, and vision_config or audio_config")
        return others[0], "text"

    def tower(self, name: str) -> Any:
        """Return a tower's config; None: there is no such tower."""
        return getattr(self, f"{name}_config")

    def pooling(self, name: str) -> TowerPooling:
        """Return how a tower's output becomes a vector."""
        return cast(TowerPooling, getattr(self, f"{name}_pooling"))


def _config(given: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    return AutoConfig.for_model(**given) if isinstance(given, dict) else given


@dataclass
class DualEncoderOutput(ModelOutput):
    """What a dual encoder returns.

    Attributes:
        loss: of the batch alone, with `return_loss`.
        logits_per_image: (images, texts) scaled similarities.
        logits_per_audio: (sounds, texts) scaled similarities.
        logits_per_text: the same, the other way round.
        text_embeds: (texts, D), of length 1.
        image_embeds: (images, D), of length 1.
        audio_embeds: (sounds, D), of length 1.
        text_model_output: the text tower's.
        vision_model_output: the image tower's.
        audio_model_output: the audio tower's.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_audio: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    audio_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    audio_model_output: BaseModelOutputWithPooling | None = None


class DualEncoderModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A text tower, an image or audio tower, and a projection of each.

    Args:
        config: of both.
        towers: name to a tower that is there already, such as one with pretrained weights.
    """

    config_class = DualEncoderConfig
    # what a tower can't do, it refuses itself
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: DualEncoderConfig, towers: Mapping[str, PreTrainedModel] | None = None
    ) -> None:
        super().__init__(config)
        for name in config.towers:
            tower = (towers or {}).get(name) or make_tower(config.tower(name), config.pooling(name))
            width = width_of(tower, config.pooling(name))
            self.add_module(f"{name}_model", tower)
            self.add_module(PROJECTIONS[name], nn.Linear(width, config.projection_dim, bias=False))
        self.logit_scale = nn.Parameter(torch.tensor(_SCALES[config.loss]))
        self.logit_bias = (
            nn.Parameter(torch.tensor(_FIRST_BIAS)) if config.loss == "sigmoid" else None
        )
        self.supports_gradient_checkpointing = any(
            tower.supports_gradient_checkpointing for tower in self._towers()
        )
        cast(Any, self).post_init()

    def get_image_features(
        self, pixel_values: Tensor, **options: Any
    ) -> BaseModelOutputWithPooling:
        """Return the image tower's output; its `pooler_output` is projected, of any length.

        Args:
            pixel_values: (B, C, H, W).
            options: the tower's own.
        """
        return cast(
            BaseModelOutputWithPooling,
            self._features("vision", None, {"pixel_values": pixel_values}, **options),
        )

    def get_audio_features(
        self,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the audio tower's output; its `pooler_output` is projected, of any length.

        Args:
            input_values: (B, samples), or what the tower calls so.
            input_features: (B, bins, frames), or what the tower calls so.
            attention_mask: (B, samples or frames), 0 for padding.
            options: the tower's own.
        """
        given = {"input_values": input_values, "input_features": input_features}
        # transformers' documentation: models of this kind were pretrained without a mask
        if getattr(self.config.audio_config, "feat_extract_norm", None) != "group":
            given["attention_mask"] = attention_mask
        return cast(
            BaseModelOutputWithPooling, self._features("audio", attention_mask, given, **options)
        )

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the text tower's output; its `pooler_output` is projected, of any length.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding.
            token_type_ids: (B, T), for towers that know them.
            position_ids: (B, T), for towers that know them.
            options: the tower's own.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        return cast(
            BaseModelOutputWithPooling, self._features("text", attention_mask, given, **options)
        )

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **options: Any,
    ) -> DualEncoderOutput:
        """Return the embeddings of what is given and, of both kinds, logits.

        Args:
            input_ids: (N, T), of texts.
            pixel_values: (M, C, H, W), of images.
            input_values: (M, samples), of sounds.
            input_features: (M, bins, frames), of sounds.
            attention_mask: (N, T), of texts.
            audio_attention_mask: (M, samples or frames).
            token_type_ids: (N, T).
            position_ids: (N, T).
            return_loss: return the loss of the batch too; pairs then stand in the same order.
            options: both towers' own.
        """
        found = DualEncoderOutput()
        if pixel_values is not None:
            found.vision_model_output = self.get_image_features(pixel_values, **options)
            found.image_embeds = _unit(found.vision_model_output)
        if input_values is not None or input_features is not None:
            found.audio_model_output = self.get_audio_features(
                input_values, input_features, audio_attention_mask, **options
            )
            found.audio_embeds = _unit(found.audio_model_output)
        if input_ids is not None:
            found.text_model_output = self.get_text_features(
                input_ids, attention_mask, token_type_ids, position_ids, **options
            )
            found.text_embeds = _unit(found.text_model_output)
        other = found.image_embeds if found.audio_embeds is None else found.audio_embeds
        if other is None or found.text_embeds is None:
            return found
        logits = found.text_embeds @ other.T * self.logit_scale.exp()
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        if return_loss:
            found.loss = _loss(logits, self.config.loss)
        found.logits_per_text = logits
        if found.audio_embeds is None:
            found.logits_per_image = logits.T
        else:
            found.logits_per_audio = logits.T
        return found

    def get_input_embeddings(self) -> Any:
        """Return the text tower's embeddings of tokens."""
        return self.get_submodule("text_model").get_input_embeddings()  # type: ignore[operator]

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the text tower's embeddings of tokens."""
        self.get_submodule("text_model").set_input_embeddings(value)  # type: ignore[operator]

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **options: Any
    ) -> Any:
        """Write the model, and under which of transformers' Auto classes it loads."""
        place = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        autos = ["AutoModel"]
        if self.config.vision_config is not None:
            autos.append("AutoModelForZeroShotImageClassification")
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = known | dict.fromkeys(autos, place)
        return super().save_pretrained(save_directory, **options)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def _features(
        self, name: str, mask: Tensor | None, given: Mapping[str, Any], **options: Any
    ) -> BaseModelOutputWithPooling:
        tower = self.get_submodule(f"{name}_model")
        given = {key: value for key, value in given.items() if value is not None}
        output = tower(**given, **options)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.get_submodule(PROJECTIONS[name])(
                pooled(tower, output, mask, self.config.pooling(name))
            ),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what is the model's own; each tower looks after itself."""
        if module is self:
            init.constant_(self.logit_scale, _SCALES[self.config.loss])
            if self.logit_bias is not None:
                init.constant_(self.logit_bias, _FIRST_BIAS)
        elif isinstance(module, nn.Linear):  # as CLIP's
            init.normal_(module.weight, std=module.in_features**-0.5)

    def _set_gradient_checkpointing(self, *args: Any, **options: Any) -> None:
        """Turn it on or off in the towers that have it, in their own way, as timm's."""
        for tower in self._towers():
            if tower.supports_gradient_checkpointing:
                tower._set_gradient_checkpointing(*args, **options)

    def _towers(self) -> Iterator[Any]:
        return (self.get_submodule(f"{name}_model") for name in self.config.towers)


def _unit(output: Any) -> Tensor:
    return functional.normalize(output.pooler_output, dim=-1)


def _loss(logits: Tensor, kind: str) -> Tensor:
    """Return CLIP's or SigLIP's loss of logits (N, N), whose diagonal belongs together."""
    if kind == "sigmoid":
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
        return -functional.logsigmoid(signs * logits).sum() / len(logits)
    own = torch.arange(len(logits), device=logits.device)
    ways = (functional.cross_entropy(one, own) for one in (logits, logits.T))
    return cast(Tensor, sum(ways)) / 2


AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForZeroShotImageClassification):
    cast(Any, _auto).register(DualEncoderConfig, DualEncoderModel, exist_ok=True)
for _kind, _name in ((DualEncoderConfig, "AutoConfig"), (DualEncoderModel, "AutoModel")):
    cast(Any, _kind).register_for_auto_class(_name)  # code and name are saved with a model
