from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling as SentencePooling
from sentence_transformers.sentence_transformer.modules import Transformer

from hfft.layers import find_layer_groups
from hfft.models.pooled import PooledConfig, PooledForSequenceClassification
from hfft.models.pooling import pool
from hfft.sections import ModelConfig
from hfft.source import load_weights, skeleton
from tests.fresh import fresh
from tests.text_models import SIZES, STILL, minilm, save

AUTO = hf.AutoModelForSequenceClassification
GPT2 = {"vocab_size": 14, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
SOURCES: dict[str, tuple[Any, Any]] = {
    "bert": (hf.BertModel, hf.BertConfig(**SIZES)),
    "bert for masks": (hf.BertForMaskedLM, hf.BertConfig(**SIZES)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, **ENDS)),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**SIZES)),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "deberta": (hf.DebertaV2Model, hf.DebertaV2Config(**SIZES)),
}
STACKS = {
    "bert": "bert.encoder.layer",
    "bert for masks": "bert.encoder.layer",
    "gpt2": "transformer.h",
    "roberta": "roberta.encoder.layer",
    "llama": "model.layers",
    "deberta": "deberta.encoder.layer",
}
HIDDEN = torch.tensor([[1.0, -5.0], [3.0, -1.0], [2.0, -9.0], [100.0, 100.0]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folders = {}
    for name, (kind, config) in SOURCES.items():
        folders[name] = save(kind(config), tmp_path_factory.mktemp("source") / name)
    return folders


def pooled_config(folder: Path, pooling: Any = "mean", labels: int = 3) -> PooledConfig:
    config = PooledConfig.around(hf.AutoConfig.from_pretrained(folder), pooling)
    config.id2label = {number: f"class {number}" for number in range(labels)}
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "single_label_classification"
    return config


def loaded(folder: Path, pooling: Any = "mean", **options: Any) -> tuple[Any, dict[str, Any]]:
    model, info = AUTO.from_pretrained(
        folder,
        config=pooled_config(folder, pooling),
        dtype=options.pop("dtype", torch.float32),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    return model.eval(), info


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[2, 4, 5, 7, 8, 3], [2, 6, 7, 3, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [("mean", [2, -5]), ("max", [3, -1]), ("cls", [1, -5]), ("last", [2, -9])],
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_not_pooled_on_either_side(
    pooling: Any, wanted: list[float], side: str, dtype: torch.dtype
) -> None:
    order = [0, 1, 2, 3] if side == "right" else [3, 0, 1, 2]
    hidden = HIDDEN[order].to(dtype)[None]
    mask = (hidden[..., 0] < 100).long()
    for same in (mask, mask.bool(), mask.to(dtype)):
        found = pool(hidden, same, pooling)
        assert found.dtype == dtype
        assert found.tolist() == [wanted]
    assert pool(HIDDEN[:3][None], None, pooling).tolist() == [wanted]


def test_mean_of_a_long_text_in_bfloat16_is_summed_in_float32() -> None:
    hidden = torch.ones(1, 2048, 4, dtype=torch.bfloat16)
    hidden[:, 1::2] = 0
    assert pool(hidden, None, "mean").tolist() == [[0.5] * 4]


def test_what_stands_at_padding_may_be_no_number() -> None:
    hidden, mask = HIDDEN[None].clone(), torch.tensor([[1, 1, 1, 0]])
    hidden[:, 3] = float("nan")
    for pooling in ("mean", "max", "cls", "last"):
        assert pool(hidden, mask, pooling).isfinite().all()


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="'median' is none of cls, mean, max, last"):
        PooledConfig(hf.BertConfig(), "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOURCES)
def test_weights_of_every_family_load_natively_and_only_the_head_is_missing(
    name: str, sources: dict[str, Path]
) -> None:
    model, info = loaded(sources[name])
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["mismatched_keys"]
    own = hf.AutoModel.from_pretrained(sources[name], dtype=torch.float32).state_dict()
    body = model.base_model.state_dict()
    assert body.keys() == {key for key in own if not key.startswith("pooler.")}
    assert all(torch.equal(own[key], value) for key, value in body.items())


@pytest.mark.parametrize("name", SOURCES)
def test_groups_are_embeddings_blocks_and_head_in_order(
    name: str, sources: dict[str, Path]
) -> None:
    model, _ = loaded(sources[name])
    stack = STACKS[name]
    groups = find_layer_groups(model)
    names = [group.name for group in groups]
    depth = model.config.text_config.num_hidden_layers
    embeddings = f"{stack.split('.')[0]}.embeddings"
    assert names == [embeddings, *(f"{stack}.{number}" for number in range(depth)), "head"]
    assert groups.head.parameters == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize("name", SOURCES)
def test_every_parameter_learns_even_under_checkpointing(
    name: str, sources: dict[str, Path], batch: dict[str, torch.Tensor]
) -> None:
    model, _ = loaded(sources[name])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.train()(**batch, labels=torch.tensor([0, 2])).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert [n for n, gradient in gradients.items() if gradient is None] == []
        found.append({n: gradient.clone() for n, gradient in gradients.items()})
        model.zero_grad()
    assert all(torch.allclose(found[1][n], g, atol=1e-6) for n, g in found[0].items())


def test_attention_implementation_reaches_the_base_model(
    sources: dict[str, Path], batch: dict[str, torch.Tensor]
) -> None:
    logits = []
    for attention in ("sdpa", "eager"):
        model, _ = loaded(sources["bert"], attn_implementation=attention)
        assert model.base_model.config._attn_implementation == attention
        model.classifier.weight.data.fill_(0.1)
        model.classifier.bias.data.zero_()
        logits.append(model(**batch).logits)
    assert torch.allclose(*logits, atol=1e-5)
    assert loaded(sources["deberta"])[0].base_model.config._attn_implementation == "eager"


def test_weights_in_half_precision_load_whole(
    sources: dict[str, Path], batch: dict[str, torch.Tensor]
) -> None:
    model, _ = loaded(sources["gpt2"], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(**batch).logits.isfinite().all()


def test_engine_loads_it_and_builds_its_skeleton(sources: dict[str, Path]) -> None:
    config = pooled_config(sources["bert for masks"])
    source = ModelConfig(name=str(sources["bert for masks"]))
    found = load_weights(AUTO, source, config)
    assert found.new_head
    assert [note for note in found.notes if "below the head" in note] == []
    model = skeleton(AUTO, config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert find_layer_groups(model) == find_layer_groups(found.model)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_saved_model_comes_back_bit_for_bit(
    name: str, sources: dict[str, Path], batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model, _ = loaded(sources[name], "max")
    model.save_pretrained(tmp_path)
    again, info = AUTO.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, PooledForSequenceClassification)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.id2label == model.config.id2label
    assert again.config.pooling == "max"
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
    assert str(sources[name]) not in (tmp_path / "config.json").read_text()


def test_saved_model_works_where_hfft_is_not_installed(
    sources: dict[str, Path], batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model, _ = loaded(sources["bert for masks"])
    folder = save(model, tmp_path / "model")
    wanted = model(**batch).logits.tolist()
    logits, scores = fresh(
        f"""
import json
import torch
from transformers import AutoModelForSequenceClassification, pipeline
folder, ids = {str(folder)!r}, torch.tensor({batch["input_ids"].tolist()})
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
model.save_pretrained({str(tmp_path / "again")!r})
run = pipeline("text-classification", model=folder, trust_remote_code=True, top_k=None)
scores = run(["a good film", "bad"], batch_size=2)
print(json.dumps([logits.tolist(), scores]))
""",
        tmp_path,
    )
    assert logits == wanted
    own = hf.pipeline("text-classification", model=str(folder), top_k=None)
    for found, wanted in zip(scores, own(["a good film", "bad"]), strict=True):
        assert [s["label"] for s in found] == [s["label"] for s in wanted]
        assert [s["score"] for s in found] == pytest.approx([s["score"] for s in wanted], abs=1e-6)
    again = AUTO.from_pretrained(tmp_path / "again")  # its code is here, whoever saved it
    assert isinstance(again, PooledForSequenceClassification)


def test_losses_are_transformers_own(
    sources: dict[str, Path], batch: dict[str, torch.Tensor]
) -> None:
    model, _ = loaded(sources["bert"])
    labels = torch.tensor([2, 0])
    output = model(**batch, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits, labels)
    assert torch.equal(output.loss, wanted)
    loss, logits = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(loss, wanted)
    assert torch.equal(logits, output.logits)


def test_mean_is_that_of_sentence_transformers_on_minilm() -> None:
    folder = minilm()
    texts = ["A short one.", "A longer sentence, so that the other is padded to its length."]
    model, info = loaded(folder)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    encoder = SentenceTransformer(
        modules=[Transformer(str(folder)), SentencePooling(384, "mean")], device="cpu"
    )
    embedded = encoder.encode(texts, convert_to_tensor=True)
    with torch.no_grad():
        wanted = model.classifier(embedded)
        inputs = hf.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        found = model(**inputs).logits
    assert torch.allclose(found, wanted, atol=1e-6)


def test_embedding_inputs_and_positions_reach_the_base_model(
    sources: dict[str, Path], batch: dict[str, torch.Tensor]
) -> None:
    model, _ = loaded(sources["bert"])
    embedded = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    same = model(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(same.logits, model(**batch).logits)
    assert len(same.hidden_states) == SIZES["num_hidden_layers"] + 1
    moved = model(**batch, position_ids=torch.arange(6).flip(0)[None].expand(2, 6))
    assert not torch.allclose(moved.logits, same.logits)
    typed = model(**batch, token_type_ids=torch.ones_like(mask))
    assert not torch.allclose(typed.logits, same.logits)


@pytest.mark.parametrize(
    ("base", "dropout"),
    [
        (hf.BertConfig(**STILL), 0.0),
        (hf.BertConfig(hidden_dropout_prob=0.3), 0.3),
        (hf.BertConfig(classifier_dropout=0.4), 0.4),
        (hf.GPT2Config(resid_pdrop=0.2), 0.2),
        (hf.LlamaConfig(), 0.0),
    ],
)
def test_dropout_is_the_base_models(base: Any, dropout: float) -> None:
    assert PooledConfig.around(base, "mean").classifier_dropout == dropout
