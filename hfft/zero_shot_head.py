"""A classifier's head, made of the names of its classes by the source's text tower."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from hfft.contrastive.embeddings import embed_texts, scale_and_bias
from hfft.contrastive.prompts import Prompts
from hfft.errors import InputError
from hfft.model_files import first_line, lacking, misfits, pretrained, read_config, refuse
from hfft.models.zero_shot_head import ZeroShotHeadConfig, ZeroShotHeadForImageClassification
from hfft.processes import join_processes
from hfft.sections import ModelConfig
from hfft.text.inputs import load_tokenizer, longest

_PLACE = "task.head: zero-shot"


def is_made(source: ModelConfig, config: PretrainedConfig) -> bool:
    """Say whether the head of the model that `config` describes is to be made.

    A model that was saved with such a head has no text tower any more, but has the head.
    """
    if not isinstance(config, ZeroShotHeadConfig):
        return False
    return source.towers is not None or not isinstance(read_config(source), ZeroShotHeadConfig)


def check(source: ModelConfig, config: PretrainedConfig) -> None:
    """Look whether a source has what the head is made of, without loading its weights.

    Raises:
        InputError: it has not.
    """
    if source.towers is not None:
        raise InputError(
            f"{_PLACE}: the text tower of {source.name} has not met the image tower, so what it "
            f"makes of classes says nothing of images; train the pair first "
            f"(zero-shot-image-classification), or take head: new"
        )
    pair = _skeleton(source, _config_of_pair(source, config))
    theirs = {n: p.shape for n, p in pair.named_parameters()}
    with torch.device("meta"):
        encoder = ZeroShotHeadForImageClassification(cast(Any, config)).image_encoder
    if unlike := [n for n, p in encoder.named_parameters() if theirs.get(n) != p.shape]:
        raise InputError(
            f"{_PLACE}: a {type(pair).__name__} embeds images in another way than its image tower "
            f"and a projection do ({unlike[0]}); take a CLIP or a SigLIP, or head: new"
        )
    if lost := lacking(source, pair, theirs):
        raise InputError(
            f"{_PLACE}: {source.name} lacks {len(lost)} weights of a {type(pair).__name__}, first "
            f"{min(lost)}; take head: new"
        )
    refuse(source, misfits(source, pair))
    load_tokenizer(source, read_config(source))


def load(source: ModelConfig, config: PretrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """Load the source's image tower, under the head that its text tower makes.

    Logits are then those of the pair for the same texts. Without chance: every process, and a
    resumed run, makes the same head.

    Returns:
        The model, float32, and a plain sentence on its head.

    Raises:
        InputError: weights can't be read, or don't fit.
    """
    pair, info = pretrained(AutoModel, source, _config_of_pair(source, config))
    refuse(source, {item[0]: item[1:] for item in info["mismatched_keys"]})
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{_PLACE}: {source.name} lacks {len(missing)} weights of a {type(pair).__name__}, "
            f"first {missing[0]}; take head: new"
        )
    model = ZeroShotHeadForImageClassification(cast(Any, config), pair.vision_model)
    if isinstance(model.image_encoder.visual_projection, nn.Linear):
        model.image_encoder.visual_projection.load_state_dict(pair.visual_projection.state_dict())
    make_head(source, pair, model)
    for parameter in model.parameters():  # all are the source's, as transformers marks it
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    cast(Any, model).eval()
    texts = len(cast(Any, config).prompt_templates) * model.classifier.out_features
    return model, [f"the head is what the text tower makes of {texts} sentences for the classes"]


@torch.no_grad()
def make_head(source: ModelConfig, pair: Any, model: Any) -> None:
    """Write the head: embeddings of the classes, scaled as the pair scales similarities.

    Args:
        source: whose tokenizer.
        pair: of an image and a text tower; left where it is.
        model: a ZeroShotHeadForImageClassification, whose config names the classes.
    """
    config = model.config
    tokenizer = load_tokenizer(source, pair.config)
    names = tuple(name for _, name in sorted((config.id2label or {}).items()))
    limit = longest(tokenizer, pair.config, None)
    prompts = Prompts(names, tuple(config.prompt_templates), limit)
    home, device = pair.device, join_processes().device  # a thousand classes take many sentences
    pair.to(device)
    texts = embed_texts(pair, prompts.batches(tokenizer, pair.config), device)
    scale, bias = scale_and_bias(pair)
    model.classifier.weight.copy_(prompts.by_class(texts) * scale)
    model.classifier.bias.copy_(torch.zeros(1) if bias is None else bias)
    pair.to(home)


def _config_of_pair(source: ModelConfig, config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the source, but of its image tower, which options may have changed."""
    own = read_config(source)
    cast(Any, own).vision_config = cast(Any, config).vision_config
    return own


def _skeleton(source: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        try:
            model = cast(Any, AutoModel).from_config(
                config, trust_remote_code=source.trust_remote_code
            )
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise InputError(f"{_PLACE}: {source.name}: {first_line(error)}") from error
    if getattr(model, "logit_scale", None) is None or not hasattr(model, "get_text_features"):
        raise InputError(
            f"{_PLACE}: {source.name} is a {type(model).__name__}, which doesn't compare images "
            f"with texts; take a CLIP or a SigLIP, or head: new"
        )
    return cast(PreTrainedModel, model)
