from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from hfft.errors import InputError
from hfft.models.pooled import PooledConfig
from hfft.text import pooling
from hfft.text.pooling import own_pooling, pretrained_pooling, with_pooling
from tests.text_models import minilm


def source(folder: Path, config: Any, settings: dict[str, Any] | None) -> Any:
    """The config of a folder as sentence-transformers saves them, if there are settings."""
    config.save_pretrained(folder)
    if settings is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
    return hf.AutoConfig.from_pretrained(folder)


def chosen(config: hf.PretrainedConfig) -> str:
    return config.pooling if isinstance(config, PooledConfig) else "native"


@pytest.mark.parametrize(
    ("config", "own"),
    [
        (hf.BertConfig(), "cls"),
        (hf.RobertaConfig(), "cls"),
        (hf.DebertaV2Config(), "cls"),
        (hf.DistilBertConfig(), "cls"),
        (hf.GPT2Config(), "last"),
        (hf.LlamaConfig(), "last"),
        (hf.Qwen3Config(), "last"),
        (hf.ModernBertConfig(), "cls"),
        (hf.ModernBertConfig(classifier_pooling="mean"), "mean"),
        (hf.BartConfig(), None),  # reads the end of the decoder's
        (hf.ViTConfig(), None),
    ],
)
def test_own_pooling_is_that_of_transformers_classifier(config: Any, own: str | None) -> None:
    assert own_pooling(config) == own


@pytest.mark.parametrize(
    ("config", "asked", "found"),
    [
        (hf.BertConfig(), "auto", "native"),
        (hf.BertConfig(), "cls", "native"),
        (hf.BertConfig(), "mean", "mean"),
        (hf.BertConfig(), "last", "last"),
        (hf.GPT2Config(), "last", "native"),
        (hf.GPT2Config(), "mean", "mean"),
        (hf.LlamaConfig(), "max", "max"),
        (hf.ModernBertConfig(), "max", "max"),
        (hf.BartConfig(), "auto", "native"),
    ],
)
def test_transformers_own_class_is_kept_where_it_pools_so(
    config: Any, asked: str, found: str
) -> None:
    assert chosen(with_pooling(config, asked)) == found


def test_modernbert_has_its_own_choice() -> None:
    config = with_pooling(hf.ModernBertConfig(), "mean")
    assert isinstance(config, hf.ModernBertConfig)
    assert config.classifier_pooling == "mean"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (None, "native"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["max"]}, "max"),
        ({"pooling_mode": "cls"}, "native"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_cls_token": True}, "native"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"embedding_dimension": 16}, "mean"),  # sentence-transformers' own default
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "native"),
        ({"pooling_mode": ["mean", "max"]}, "native"),
        ({"pooling_mode": "weightedmean"}, "native"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "native"),
    ],
)
def test_auto_pools_as_the_source_was_pretrained_for_sentences(
    settings: dict[str, Any] | None, found: str, tmp_path: Path
) -> None:
    config = source(tmp_path, hf.BertConfig(), settings)
    assert chosen(with_pooling(config, "auto")) == found


def test_what_is_asked_for_outweighs_the_source(tmp_path: Path) -> None:
    settings = {"pooling_mode": "mean"}
    for asked, found in (("max", "max"), ("cls", "native")):
        config = source(tmp_path / asked, hf.BertConfig(), settings)
        assert chosen(with_pooling(config, asked)) == found


@pytest.mark.parametrize("text", ["", "{", '{"a": 1'])
def test_modules_that_can_not_be_read_count_as_absent(text: str, tmp_path: Path) -> None:
    config = source(tmp_path, hf.BertConfig(), {"pooling_mode": "mean"})
    (tmp_path / "modules.json").write_text(text)
    assert chosen(with_pooling(config, "auto")) == "native"


def test_hub_id_is_asked_for_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path, hf.BertConfig(), {"pooling_mode": "mean"})
    asked = []

    def download(repo_id: str, name: str, revision: str | None) -> str:
        asked.append((repo_id, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(pooling, "hf_hub_download", download)
    config = hf.BertConfig(name_or_path="somebody/encoder")
    assert chosen(with_pooling(config, "auto")) == "mean"
    assert pretrained_pooling("somebody/encoder", "v2") == "mean"
    assert asked == [
        ("somebody/encoder", name, revision)
        for revision in (None, "v2")
        for name in ("modules.json", "1_Pooling/config.json")
    ]


@pytest.mark.parametrize("name", ["somebody/encoder", "no/such/folder", ""])
def test_hub_id_that_can_not_be_asked_keeps_the_models_own(name: str) -> None:
    assert chosen(with_pooling(hf.BertConfig(name_or_path=name), "auto")) == "native"


def test_minilm_pools_the_mean() -> None:
    config = with_pooling(hf.AutoConfig.from_pretrained(minilm()), "auto")
    assert chosen(config) == "mean"
    assert config.name_or_path == str(minilm())


def test_saved_pooled_model_keeps_its_pooling_unless_asked(tmp_path: Path) -> None:
    PooledConfig.around(hf.BertConfig(), "max").save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    assert chosen(with_pooling(config, "auto")) == "max"
    assert chosen(with_pooling(config, "cls")) == "cls"  # its weights have no pooler


def test_pooling_that_a_model_can_not_have_is_named() -> None:
    with pytest.raises(InputError, match=r"task\.head\.pooling: mean is for .* bart is not"):
        with_pooling(hf.BartConfig(), "mean")


def test_first_token_of_a_decoder_is_refused_since_it_sees_no_text() -> None:
    with pytest.raises(InputError, match=r"pooling: cls: gpt2 is a decoder.*take last, or mean"):
        with_pooling(hf.GPT2Config(), "cls")
