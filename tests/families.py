"""Tiny models of many families, with an input each and the number of groups below their heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers as hf

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
PICTURE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 3}
WORDS: dict[str, Any] = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """A way to make a tiny model.

    Attributes:
        make: returns it, with fresh weights.
        inputs: what it is called with: `images`, `words`, `sounds` or two of them.
        depth: tower name to the number of groups that a reader of its code counts.
        head: how many parameters its head has.
    """

    make: Callable[[], Any]
    inputs: tuple[str, ...]
    depth: dict[str, int]
    head: int

    def example(self) -> dict[str, torch.Tensor]:
        """Two examples; the same ones at every call."""
        random = torch.Generator().manual_seed(0)
        words = torch.randint(3, 30, (2, 6), generator=random)
        every = {
            "images": ("pixel_values", torch.rand(2, 3, 32, 32, generator=random)),
            "words": ("input_ids", words),
            "answers": ("decoder_input_ids", words[:, :4]),
            "sounds": ("input_features", torch.rand(2, 1, 64, 16, generator=random)),
        }
        return dict(every[kind] for kind in self.inputs)


def timm_model(architecture: str, **sizes: Any) -> Any:
    made = timm.create_model(architecture, num_classes=3, **sizes)
    return hf.TimmWrapperForImageClassification(
        hf.TimmWrapperConfig(
            architecture=architecture,
            model_args=sizes,
            num_labels=3,
            pretrained_cfg=made.pretrained_cfg,
        )
    )


def bert(**changes: Any) -> Any:
    config = hf.BertConfig(**WORDS, **{**SMALL, "max_position_embeddings": 16, **changes})
    return hf.BertForSequenceClassification(config)


def vit(**changes: Any) -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**{**SMALL, **PICTURE, **changes}))


def batchnorm_resnet() -> Any:
    return timm_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8)


def clip(text_layers: int = 3, vision_layers: int = 2) -> Any:
    text = {**WORDS, **SMALL, "max_position_embeddings": 16, "num_hidden_layers": text_layers}
    vision = {"image_size": 32, "patch_size": 8, **SMALL, "num_hidden_layers": vision_layers}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


_TEXT: dict[str, Any] = {**WORDS, **SMALL, "max_position_embeddings": 16}
_VISION: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}


def siglip() -> Any:
    text = {**_TEXT, "projection_size": 16}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=_VISION))


def dual_encoder(vision: Any = None, **text: Any) -> Any:
    """BERT, with a pooler, beside a ViT or another model of images."""
    return hf.VisionTextDualEncoderModel(
        hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**_VISION) if vision is None else vision,
            hf.BertConfig(**{**_TEXT, **text}),
            projection_dim=8,
        )
    )


def dual_encoder_with_batchnorm() -> Any:
    """BERT beside a timm ResNet."""
    config = batchnorm_resnet().config
    sizes = {"model_args": config.model_args, "pretrained_cfg": config.pretrained_cfg}
    vision = hf.TimmWrapperConfig(architecture="resnet10t", hidden_size=16, **sizes)
    return dual_encoder(vision)


def _alt_clip() -> Any:
    text = {**_TEXT, "project_dim": 8, "max_position_embeddings": 20}
    config = hf.AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=8)
    return hf.AltCLIPModel(config)


def _chinese_clip() -> Any:
    config = hf.ChineseCLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8)
    return hf.ChineseCLIPModel(config)


def clap() -> Any:
    audio = {
        "spec_size": 64,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
    }
    text = {**_TEXT, "projection_hidden_act": "relu", "max_position_embeddings": 20}
    return hf.ClapModel(hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=8))


def _timm_vit() -> Any:
    return timm_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2
    )


def _timm_swin() -> Any:
    return timm_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=8,
        depths=(1, 1, 2),
        num_heads=(1, 2, 2),
    )


def _resnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1]}
    config = hf.ResNetConfig(layer_type="basic", num_labels=3, **sizes)
    return hf.ResNetForImageClassification(config)


def _convnext() -> Any:
    sizes = {"hidden_sizes": [8, 8, 16], "depths": [1, 2, 1], "num_stages": 3}
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(num_labels=3, **sizes))


def _swin() -> Any:
    sizes = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
    config = hf.SwinConfig(image_size=32, patch_size=4, num_labels=3, **sizes)
    return hf.SwinForImageClassification(config)


def _segformer(kind: Any) -> Any:
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "decoder_hidden_size": 16}
    config = hf.SegformerConfig(num_attention_heads=[1, 1, 2, 2], num_labels=3, **sizes)
    return kind(config)


def _deberta() -> Any:
    relative = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "max_position_embeddings": 16,
    }
    config = hf.DebertaV2Config(**WORDS, **SMALL, **relative)
    return hf.DebertaV2ForSequenceClassification(config)


def _modernbert() -> Any:
    config = hf.ModernBertConfig(**WORDS, **SMALL, cls_token_id=1, sep_token_id=2)
    return hf.ModernBertForSequenceClassification(config)


def _gpt2(kind: Any) -> Any:
    return kind(hf.GPT2Config(**WORDS, n_embd=16, n_layer=3, n_head=2, n_positions=16))


def _llama(kind: Any) -> Any:
    return kind(hf.LlamaConfig(**WORDS, **SMALL, num_key_value_heads=1))


def _t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=30, **sizes))


def _bart() -> Any:
    sizes = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))
    }
    config = hf.BartConfig(vocab_size=30, d_model=16, max_position_embeddings=16, **sizes)
    return hf.BartForConditionalGeneration(config)


def _clip_for_images() -> Any:
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = hf.CLIPConfig(text_config=WORDS, vision_config=vision, num_labels=3)
    return hf.CLIPForImageClassification(config)


def _family(make: Callable[[], Any], inputs: str, depth: int, head: int) -> Family:
    return Family(make, tuple(inputs.split()), {"backbone": depth}, head)


FAMILIES: dict[str, Family] = {
    "timm-resnet": _family(batchnorm_resnet, "images", 5, 2),
    "timm-vit": _family(_timm_vit, "images", 4, 2),
    "timm-convnext": _family(
        lambda: timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)),
        "images",
        5,
        2,
    ),
    "timm-efficientnet": _family(lambda: timm_model("efficientnet_b0"), "images", 8, 2),
    "timm-swin": _family(_timm_swin, "images", 4, 2),
    "vit": _family(vit, "images", 4, 2),
    "resnet": _family(_resnet, "images", 4, 2),
    "convnext": _family(_convnext, "images", 4, 2),
    "swin": _family(_swin, "images", 3, 2),
    "segformer-classes": _family(
        lambda: _segformer(hf.SegformerForImageClassification), "images", 4, 2
    ),
    "segformer-pixels": _family(
        lambda: _segformer(hf.SegformerForSemanticSegmentation), "images", 4, 13
    ),
    "bert": _family(bert, "words", 4, 2),
    "deberta": _family(_deberta, "words", 4, 4),
    "modernbert": _family(_modernbert, "words", 4, 4),
    "gpt2-classes": _family(lambda: _gpt2(hf.GPT2ForSequenceClassification), "words", 4, 1),
    "gpt2-words": _family(lambda: _gpt2(hf.GPT2LMHeadModel), "words", 4, 0),  # tied: no head
    "llama-classes": _family(lambda: _llama(hf.LlamaForSequenceClassification), "words", 4, 1),
    "llama-words": _family(lambda: _llama(hf.LlamaForCausalLM), "words", 4, 1),
    "t5": _family(_t5, "words answers", 5, 0),
    "bart": _family(_bart, "words answers", 5, 0),
    "clip": Family(clip, ("images", "words"), {"text": 4, "vision": 3}, 3),
    "clip-for-images": _family(_clip_for_images, "images", 4, 2),
}

TOWERS: dict[str, Family] = {
    "clip": FAMILIES["clip"],
    "siglip": Family(siglip, ("images", "words"), {"text": 4, "vision": 3}, 2),
    "dual-encoder": Family(dual_encoder, ("images", "words"), {"vision": 3, "text": 4}, 3),
    "dual-encoder-timm": Family(
        dual_encoder_with_batchnorm, ("images", "words"), {"vision": 5, "text": 4}, 3
    ),
    "alt-clip": Family(_alt_clip, ("images", "words"), {"text": 4, "vision": 3}, 3),
    "chinese-clip": Family(_chinese_clip, ("images", "words"), {"text": 4, "vision": 3}, 3),
    "clap": Family(clap, ("sounds", "words"), {"text": 4, "audio": 3}, 10),
}
"""Models of two towers."""
