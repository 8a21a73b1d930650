"""Two pretrained models become the towers of one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from hfft.errors import InputError
from hfft.sections import ModelConfig
from hfft.source import LoadedModel, check_shapes, load_weights, not_in_source, read_model_config
from hfft.source import skeleton as bare
from tests.dual_models import AUDIO_TOWERS, PICTURE, T5, dual, pairs, texts
from tests.families import batchnorm_resnet
from tests.pair_models import clip, siglip
from tests.text_models import SIZES, STILL, minilm, save

SOURCES: dict[str, Any] = {
    "timm": batchnorm_resnet,
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**PICTURE)),
    "vit with its pooler": lambda: hf.ViTModel(hf.ViTConfig(**PICTURE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**PICTURE)),
    "vit mae": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**PICTURE)),
    "clip": clip,
    "siglip": siglip,
    "clip images": lambda: hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(**PICTURE, projection_dim=8)
    ),
    "clip texts": lambda: hf.CLIPTextModelWithProjection(
        hf.CLIPTextConfig(**SIZES, projection_dim=12)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **STILL)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "ast": lambda: hf.ASTForAudioClassification(AUDIO_TOWERS["ast"][0]),
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **{**AUDIO_TOWERS["wav2vec2"][0].to_dict(), "mask_time_prob": 0.05, "layerdrop": 0.1}
        )
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(AUDIO_TOWERS["whisper"][0]),
    "dual": dual,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {"minilm": minilm()}
    for name, make in SOURCES.items():
        torch.manual_seed(0)
        found[name] = save(make(), tmp_path_factory.mktemp("source") / name)
    return found


def source(folders: dict[str, Path], **towers: Any) -> ModelConfig:
    """A config's `model` section of towers by their names here, and what goes with one."""
    fields: dict[str, Any] = {"projection": towers.pop("projection", None)}
    for kind, given in towers.items():
        name, *options = given if isinstance(given, tuple) else (given,)
        towers[kind] = {"name": str(folders[name]), **(options[0] if options else {})}
    return ModelConfig.model_validate({"towers": towers, **fields})


def load(chosen: ModelConfig, seed: int = 0) -> LoadedModel:
    """Load as a run does, with all its checks."""
    config = read_model_config(chosen)
    skeleton = bare(hf.AutoModel, config)
    check_shapes(chosen, skeleton)
    assert not_in_source(chosen, skeleton, ()) == set()
    torch.manual_seed(seed)
    loaded = load_weights(hf.AutoModel, chosen, config)
    assert loaded.model.state_dict().keys() == skeleton.state_dict().keys()
    return loaded


def own(folder: Path, tower: Any) -> Any:
    """The same tower as transformers loads it from its folder."""
    whole = hf.AutoModel.from_pretrained(folder)
    for path in ("vision_model", "text_model", "encoder"):
        if type(found := getattr(whole, path, whole)) is type(tower):
            return found
    return whole


@pytest.mark.parametrize(
    ("kind", "name", "pooling"),
    [
        ("image", "timm", "pooler"),
        ("image", "vit", "cls"),
        ("image", "vit with its pooler", "pooler"),
        ("image", "dinov2", "pooler"),
        ("image", "vit mae", "mean"),
        ("image", "clip", "pooler"),
        ("image", "siglip", "pooler"),
        ("image", "clip images", "pooler"),
        ("text", "bert", "mean"),
        ("text", "t5", "mean"),
        ("text", "llama", "last"),
        ("text", "clip", "pooler"),
        ("text", "clip texts", "pooler"),
        ("text", "minilm", "mean"),
        ("audio", "ast", "pooler"),
        ("audio", "wav2vec2", "mean"),
        ("audio", "whisper", "mean"),
    ],
)
def test_weights_are_the_sources_own_and_pooling_is_as_it_was_pretrained(
    kind: str, name: str, pooling: str, folders: dict[str, Path]
) -> None:
    beside = {"image": "vit"} if kind == "text" else {"text": "bert"}
    model: Any = load(source(folders, **{kind: name, **beside})).model
    place = {"image": "vision"}.get(kind, kind)
    assert model.config.pooling(place) == pooling
    tower = model.get_submodule(f"{place}_model")
    stored = own(folders[name], tower).state_dict()
    assert len(tower.state_dict()) > 10
    for key, tensor in tower.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.long)
        assert torch.equal(tensor, stored[key])


def test_mean_of_minilm_is_what_sentence_transformers_pools(folders: dict[str, Path]) -> None:
    model: Any = load(source(folders, image="timm", text="minilm", projection=384)).model.eval()
    with torch.no_grad():
        model.text_projection.weight.copy_(torch.eye(384))
    words = ["A short one.", "A longer sentence, so that the other is padded to its length."]
    encoder = SentenceTransformer(
        modules=[Transformer(str(minilm())), Pooling(384, "mean")], device="cpu"
    )
    inputs = hf.AutoTokenizer.from_pretrained(minilm())(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.get_text_features(**inputs).pooler_output
        hidden = hf.AutoModel.from_pretrained(minilm())(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    by_hand = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    assert torch.allclose(found, by_hand, atol=1e-6)
    assert torch.allclose(found, encoder.encode(words, convert_to_tensor=True), atol=1e-6)


def test_projections_are_new_and_drawn_by_the_seed(folders: dict[str, Path]) -> None:
    chosen = source(folders, image="timm", text="bert", projection=24)
    first, again, other = load(chosen), load(chosen), load(chosen, seed=1)
    assert first.new_head
    assert first.notes == ["the projections are new: the two towers have not met"]
    stored = first.model.state_dict()
    assert all(torch.equal(stored[n], tensor) for n, tensor in again.model.state_dict().items())
    changed = {n for n, t in other.model.state_dict().items() if not torch.equal(stored[n], t)}
    assert changed == {"visual_projection.weight", "text_projection.weight"}
    assert all(stored[name].shape == (24, 16) for name in changed)
    default = read_model_config(source(folders, image="timm", text="bert"))
    assert default.projection_dim == 256


def test_pooling_that_is_asked_for_is_taken(folders: dict[str, Path]) -> None:
    chosen = source(folders, image=("vit", {"pooling": "max"}), text=("bert", {"pooling": "cls"}))
    model: Any = load(chosen).model.eval()
    output = model(**pairs())
    words, image = output.text_model_output, output.vision_model_output
    assert torch.equal(words.pooler_output, model.text_projection(words.last_hidden_state[:, 0]))
    pooled = image.last_hidden_state.amax(dim=1)
    assert torch.equal(image.pooler_output, model.visual_projection(pooled))


def test_last_token_of_a_decoder_is_the_last_that_is_no_padding(folders: dict[str, Path]) -> None:
    model: Any = load(source(folders, image="vit", text="llama")).model.eval()
    output = model.get_text_features(**texts())
    last = output.last_hidden_state[torch.arange(2), torch.tensor([5, 3])]
    assert torch.equal(output.pooler_output, model.text_projection(last))


def test_attention_is_as_asked_for_in_each_tower(folders: dict[str, Path]) -> None:
    eager = {"attn_implementation": "eager"}
    model: Any = load(source(folders, image=("vit", eager), text="bert")).model
    assert model.vision_model.config._attn_implementation == "eager"
    assert model.text_model.config._attn_implementation == "sdpa"


def test_nothing_is_left_out_at_random_and_no_generation_is_prepared(
    folders: dict[str, Path],
) -> None:
    config: Any = read_model_config(source(folders, audio="wav2vec2", text="llama"))
    audio = config.audio_config
    assert (audio.mask_time_prob, audio.mask_feature_prob, audio.layerdrop) == (0, 0, 0)
    assert config.text_config.use_cache is False


def test_projection_of_a_tower_is_left_out_and_said_to_be(folders: dict[str, Path]) -> None:
    loaded = load(source(folders, image="clip images", text="clip texts", projection=10))
    assert [note.rpartition("/")[2] for note in loaded.notes[1:]] == [
        "clip images has a visual_projection, which is left out",
        "clip texts has a text_projection, which is left out",
    ]
    parameters = dict(loaded.model.named_parameters())
    assert {len(parameters[f"{n}_projection.weight"]) for n in ("visual", "text")} == {10}


def test_names_of_folders_are_not_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    load(source(folders, image="timm", text="bert")).model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert str(folders["timm"]) not in saved
    assert str(folders["bert"]) not in saved


@pytest.mark.parametrize(
    ("towers", "messages"),
    [
        (
            {"image": "bert", "text": "bert"},
            ["model.towers.image: .* is a BertModel, which reads input_ids; .* reads pixel_values"],
        ),
        (
            {"image": "vit", "text": "vit"},
            ["model.towers.text: .* is a ViTModel, which reads pixel_values; .* reads input_ids"],
        ),
        (
            {"audio": "vit", "text": "bert"},
            ["model.towers.audio: .* reads input_values or input_features"],
        ),
        (
            {"image": "vit", "text": "siglip"},
            ["model.towers.text: .* has no bare model of its kind, siglip_text_model; take"],
        ),
        (
            {"image": "vit", "text": ("llama", {"pooling": "cls"})},
            [r"model.towers.text.pooling: cls: .*a decoder, .* sees nothing .*; take last, or"],
        ),
        (
            {"image": "vit", "text": ("llama", {"pooling": "pooler"})},
            [r"text.pooling: pooler: .* is a LlamaModel, .* no pooled output; take mean, or last"],
        ),
        (
            {"image": ("vit mae", {"pooling": "pooler"}), "text": "bert"},
            [r"image.pooling: pooler: .* ViTMAEModel, .* no pooled output; take mean, or cls"],
        ),
        (
            {"image": ("clip", {"pooling": "mean"}), "text": "bert"},
            [r"image.pooling: mean: .* CLIPVisionModel, which pools in its own way; leave it at"],
        ),
        (
            {"image": "nowhere", "text": ("bert", {"pooling": "last"})},
            ["model.towers.image: there is no folder"],
        ),
        (
            {"image": "nowhere", "text": "nowhere"},
            ["model.towers.image: there is no folder", "model.towers.text: there is no folder"],
        ),
    ],
)
def test_what_is_no_tower_is_refused_with_the_remedy(
    towers: Any, messages: list[str], folders: dict[str, Path]
) -> None:
    known = {**folders, "nowhere": folders["bert"].parent / "nowhere"}
    with pytest.raises(InputError) as caught:
        read_model_config(source(known, **towers))
    assert len(caught.value.messages) == len(messages)
    for wanted, found in zip(messages, caught.value.messages, strict=True):
        assert re.search(wanted, found)


def test_weights_that_do_not_fit_a_tower_are_named_with_their_place(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = hf.ViTConfig(**{**PICTURE, "image_size": 64})
    save(hf.ViTModel(hf.ViTConfig(**PICTURE)), tmp_path)
    config.save_pretrained(tmp_path)
    chosen = source({**folders, "larger": tmp_path}, image="larger", text="bert")
    skeleton = bare(hf.AutoModel, read_model_config(chosen))
    with pytest.raises(InputError, match=r"model.towers.image: .*other sizes.*position_embeddings"):
        check_shapes(chosen, skeleton)


def test_tower_whose_weights_are_another_models_is_refused(folders: dict[str, Path]) -> None:
    chosen = source(folders, image="dual", text="bert")
    with pytest.raises(InputError, match=r"model.towers.image: .*dual is no source for a ViTModel"):
        load_weights(hf.AutoModel, chosen, read_model_config(chosen))


def test_tower_that_lacks_its_pooler_learns_it_anew(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder = hf.BertModel(hf.BertConfig(**SIZES, **STILL), add_pooling_layer=False)
    known = {**folders, "bare": save(encoder, tmp_path)}
    chosen = source(known, image="timm", text=("bare", {"pooling": "pooler"}))
    config = read_model_config(chosen)
    new = {f"text_model.pooler.dense.{name}" for name in ("weight", "bias")}
    assert not_in_source(chosen, bare(hf.AutoModel, config), ()) == new
    notes = load_weights(hf.AutoModel, chosen, config).notes
    assert notes[1].startswith("2 weights below the head are not in the source and start afresh")
