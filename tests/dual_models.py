"""Tiny models of two towers, of many families, and what they read."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from hfft.models.dual_encoder import DualEncoderConfig, DualEncoderModel
from tests.families import timm_model
from tests.text_models import SIZES, STILL

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
PICTURE: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8}
TIMM_VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
TIMM_CNN = {"channels": (8, 8, 16, 16), "stem_width": 8}
CNN = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
GPT2 = {"vocab_size": 14, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 14, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
WHISPER = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    **{"d_model": 16, "num_mel_bins": 8, "max_source_positions": 20, "vocab_size": 14},
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
WAVES: dict[str, Any] = {
    **SMALL,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
}

IMAGE_TOWERS: dict[str, tuple[Any, str]] = {
    "vit": (hf.ViTConfig(**PICTURE), "cls"),
    "vit with its pooler": (hf.ViTConfig(**PICTURE), "pooler"),
    "dinov2": (hf.Dinov2Config(**PICTURE), "pooler"),
    "dinov3": (hf.DINOv3ViTConfig(**PICTURE, num_register_tokens=2), "pooler"),
    "vit mae": (hf.ViTMAEConfig(**PICTURE, mask_ratio=0.0), "mean"),
    "resnet": (hf.ResNetConfig(**CNN), "pooler"),
    "convnext": (hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), "pooler"),
    "swin": (
        hf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=32, window_size=4),
        "pooler",
    ),
    "clip": (hf.CLIPVisionConfig(**PICTURE), "pooler"),
    "siglip": (hf.SiglipVisionConfig(**PICTURE), "pooler"),
    "timm cnn": (timm_model("resnet10t", **TIMM_CNN).config, "pooler"),
    "timm vit": (timm_model("vit_tiny_patch16_224", **TIMM_VIT).config, "pooler"),
}
TEXT_TOWERS: dict[str, tuple[Any, str]] = {
    "bert": (hf.BertConfig(**SIZES, **STILL), "mean"),
    "bert with its pooler": (hf.BertConfig(**SIZES, **STILL), "pooler"),
    "roberta": (hf.RobertaConfig(**SIZES), "cls"),
    "distilbert": (
        hf.DistilBertConfig(vocab_size=14, dim=16, hidden_dim=32, n_layers=2, n_heads=2),
        "mean",
    ),
    "gpt2": (hf.GPT2Config(**GPT2, bos_token_id=2, eos_token_id=3, use_cache=False), "last"),
    "t5": (hf.T5Config(**T5), "mean"),
    "clip": (hf.CLIPTextConfig(**SIZES), "pooler"),
}
AUDIO_TOWERS: dict[str, tuple[Any, str]] = {
    "wav2vec2": (
        hf.Wav2Vec2Config(**WAVES, feat_extract_norm="layer", do_stable_layer_norm=True),
        "mean",
    ),
    "wav2vec2 without mask": (hf.Wav2Vec2Config(**WAVES), "mean"),
    "hubert": (hf.HubertConfig(**WAVES, feat_extract_norm="layer"), "mean"),
    "ast": (hf.ASTConfig(**SMALL, patch_size=8, max_length=32, num_mel_bins=16), "pooler"),
    "whisper": (hf.WhisperConfig(**WHISPER), "mean"),
}


def dual(image: str = "vit", text: str = "bert", **fields: Any) -> Any:
    """A model in eval mode, the same one at every call."""
    torch.manual_seed(0)
    vision, vision_pooling = IMAGE_TOWERS[image]
    words, text_pooling = TEXT_TOWERS[text]
    config = DualEncoderConfig(
        vision_config=vision.to_dict(),
        text_config=words.to_dict(),
        vision_pooling=vision_pooling,  # type: ignore[arg-type]
        text_pooling=text_pooling,  # type: ignore[arg-type]
        **{"projection_dim": 8, **fields},
    )
    return DualEncoderModel(config).eval()


def hearing(audio: str) -> Any:
    torch.manual_seed(0)
    sounds, pooling = AUDIO_TOWERS[audio]
    text = hf.BertConfig(**SIZES, **STILL)
    config = DualEncoderConfig(
        audio_config=sounds,
        text_config=text,
        projection_dim=8,
        audio_pooling=pooling,  # type: ignore[arg-type]
    )
    return DualEncoderModel(config).eval()


def texts() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 4, 5, 7, 8, 3], [2, 6, 7, 3, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def pairs() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {**texts(), "pixel_values": torch.rand(2, 3, 32, 32, generator=random)}


def sounds(model: Any) -> dict[str, torch.Tensor]:
    """What a model's audio tower reads, twice."""
    random = torch.Generator().manual_seed(1)
    kind = model.config.audio_config.model_type
    if kind == "whisper":
        return {"input_features": torch.rand(2, 8, 40, generator=random)}
    shape = (2, 32, 16) if kind == "audio-spectrogram-transformer" else (2, 800)
    return {"input_values": torch.randn(shape, generator=random)}
