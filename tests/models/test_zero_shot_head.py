from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional

from hfft.errors import InputError
from hfft.layers import find_layer_groups
from hfft.penalties.coverage import source_tensors
from hfft.sections import ModelConfig
from hfft.source import (
    check_shapes,
    hand_on,
    head_is_new,
    load_weights,
    not_in_source,
    read_model_config,
    skeleton,
)
from hfft.tasks.image_classification import ImageClassification
from tests import pair_models
from tests.fresh import fresh

LABELS = ["red", "green", "blue"]
TEMPLATES = ["a photo of a {} .", "the {} square"]


def siglip() -> Any:
    """A SigLIP with a bias as of one that was trained."""
    model = pair_models.siglip()
    with torch.no_grad():
        model.logit_bias.fill_(-3)
    return model


def metaclip() -> Any:
    return hf.MetaClip2Model(hf.MetaClip2Config(**pair_models.clip().config.to_dict()))


SOURCES = {
    "clip": pair_models.clip,
    "siglip": siglip,
    "metaclip": metaclip,
    "vit and bert": pair_models.dual,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return {name: pair_models.save(make(), folder / name) for name, make in SOURCES.items()}


def task_of(**options: Any) -> ImageClassification:
    options = {"head": "zero-shot", **options}
    return ImageClassification(ImageClassification.Options.model_validate(options))


def loaded(folder: Path, **options: Any) -> Any:
    task, source = task_of(**options), ModelConfig(name=str(folder))
    config = task.configure(read_model_config(source), LABELS)
    return load_weights(task.auto_model, source, config)


def pixels(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, pair_models.SIDE, pair_models.SIDE, generator=torch.manual_seed(1))


def tokens(model: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids as the model was pretrained on them."""
    padded = (
        {"padding": "max_length", "max_length": 16} if "siglip" in model.config.model_type else {}
    )
    found = pair_models.tokenizer()(texts, return_tensors="pt", **{"padding": True, **padded})
    names = ("input_ids",) if padded else ("input_ids", "attention_mask")
    return {name: found[name] for name in names}


@pytest.mark.parametrize("name", SOURCES)
def test_logits_at_first_are_the_pairs_own(name: str, sources: dict[str, Path]) -> None:
    pair = hf.AutoModel.from_pretrained(sources[name]).eval()
    texts = [TEMPLATES[0].replace("{}", label) for label in LABELS]
    with torch.no_grad():
        expected = pair(pixel_values=pixels(), **tokens(pair, texts)).logits_per_image
        found = loaded(sources[name], templates=TEMPLATES[:1]).model(pixels()).logits
    assert found.shape == (4, 3)
    assert (expected.max() - expected.min()) > 0.1
    assert torch.allclose(found, expected, atol=1e-5)


def test_several_templates_are_averaged_on_the_sphere(sources: dict[str, Path]) -> None:
    pair = hf.CLIPModel.from_pretrained(sources["clip"]).eval()
    model = loaded(sources["clip"], templates=TEMPLATES).model
    for number, label in enumerate(LABELS):
        each = pair.get_text_features(**tokens(pair, [t.replace("{}", label) for t in TEMPLATES]))
        mean = functional.normalize(each.pooler_output, dim=-1).mean(0)
        expected = functional.normalize(mean, dim=-1) * pair.logit_scale.exp()
        assert torch.allclose(model.classifier.weight[number], expected, atol=1e-5)
    assert not model.classifier.bias.any()


def test_the_bias_of_a_siglip_is_kept(sources: dict[str, Path]) -> None:
    pair = hf.SiglipModel.from_pretrained(sources["siglip"])
    model = loaded(sources["siglip"]).model
    assert pair.logit_bias.item() == -3
    assert model.classifier.bias.tolist() == [pair.logit_bias.item()] * 3


def test_the_default_template_is_clips_own(sources: dict[str, Path]) -> None:
    one = loaded(sources["clip"]).model
    other = loaded(sources["clip"], templates=["a photo of a {}."]).model
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.config.prompt_templates == ["a photo of a {}."]


def buffers(model: Any) -> set[str]:
    return {name for name, _ in model.named_buffers()}


@pytest.mark.parametrize("name", SOURCES)
def test_head_and_body_are_in_the_source(name: str, sources: dict[str, Path]) -> None:
    task, source = task_of(), ModelConfig(name=str(sources[name]))
    config = task.configure(read_model_config(source), LABELS)
    model = skeleton(task.auto_model, config)
    check_shapes(source, model)
    head = find_layer_groups(model).head.parameters
    assert head == ("classifier.weight", "classifier.bias")
    assert not head_is_new(source, model, head)
    assert not not_in_source(source, model, head)
    found = loaded(sources[name])
    assert not found.new_head
    assert source_tensors(found.model).keys() == {*found.model.state_dict()} | buffers(found.model)
    assert found.notes == ["the head is what the text tower makes of 3 sentences for the classes"]


def test_the_head_is_made_without_chance(sources: dict[str, Path]) -> None:
    torch.manual_seed(1)
    one = loaded(sources["clip"]).model.state_dict()
    torch.manual_seed(2)
    other = loaded(sources["clip"]).model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SOURCES)
def test_groups_are_the_tower_with_its_projection_and_the_head(
    name: str, sources: dict[str, Path]
) -> None:
    groups = find_layer_groups(loaded(sources[name]).model)
    assert groups.ordered
    [tower] = groups.towers.values()
    assert len(tower) == 3
    projected = [p for p in tower[-1].parameters if "visual_projection" in p]
    assert bool(projected) == (name != "siglip")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_learns(checkpointing: bool, sources: dict[str, Path]) -> None:
    model = loaded(sources["clip"]).model
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    output = model.train()(pixels(), labels=torch.tensor([0, 1, 2, 0]))
    expected = functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 0]))
    assert torch.allclose(output.loss, expected)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_hidden_states_are_the_towers(sources: dict[str, Path]) -> None:
    model = loaded(sources["clip"]).model
    assert len(model(pixels(), output_hidden_states=True).hidden_states) == 3


FRESH = """
import json, torch
from transformers import AutoModelForImageClassification, pipeline
model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True)
logits = model.eval()(torch.load("pixels.pt")).logits
run = pipeline("image-classification", model="model", trust_remote_code=True)
print(json.dumps([logits.tolist(), run("picture.png"), type(model).__name__]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_saved_model_loads_where_hfft_is_not_installed(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    model = loaded(sources[name]).model
    model.save_pretrained(tmp_path / "model")
    pair_models.image_processor().save_pretrained(tmp_path / "model")
    torch.save(pixels(), tmp_path / "pixels.pt")
    pair_models.picture("red", "left", tmp_path / "picture.png")
    logits, answer, kind = fresh(FRESH, tmp_path)
    assert kind == "ZeroShotHeadForImageClassification"
    with torch.no_grad():
        assert torch.allclose(torch.tensor(logits), model(pixels()).logits, atol=1e-5)
    assert {one["label"] for one in answer} == set(LABELS)


def test_a_saved_model_is_a_source_with_its_head(sources: dict[str, Path], tmp_path: Path) -> None:
    """It goes on with either head; other classes have no text tower to make theirs."""
    model = loaded(sources["clip"]).model
    model.save_pretrained(tmp_path)
    for head in ("new", "zero-shot"):
        again = loaded(tmp_path, head=head)
        assert not again.new_head
        assert torch.equal(again.model.classifier.weight, model.classifier.weight)
    task, source = task_of(head="new"), ModelConfig(name=str(tmp_path))
    config = task.configure(read_model_config(source), ["one", "two"])
    assert load_weights(task.auto_model, source, config).new_head


def test_a_pair_that_was_trained_on_makes_the_head_that_it_hands_on(
    sources: dict[str, Path],
) -> None:
    source = ModelConfig(name=str(sources["clip"]))
    pair = hf.CLIPModel.from_pretrained(sources["clip"]).eval()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(3)))
    model = loaded(sources["clip"], templates=TEMPLATES[:1]).model
    carried = hand_on(source, pair, model)
    assert carried == {n for n, _ in model.named_parameters() if not n.startswith("classifier")}
    texts = [TEMPLATES[0].replace("{}", label) for label in LABELS]
    with torch.no_grad():
        expected = pair(pixel_values=pixels(), **tokens(pair, texts)).logits_per_image
        assert torch.allclose(model(pixels()).logits, expected, atol=1e-5)


def test_the_body_goes_back_into_the_pair(sources: dict[str, Path]) -> None:
    """The pair's own text tower, and scale, stay as they are."""
    source = ModelConfig(name=str(sources["clip"]))
    model = loaded(sources["clip"]).model
    with torch.no_grad():
        model.image_encoder.visual_projection.weight.add_(1)
    pair = hf.CLIPModel.from_pretrained(sources["clip"])
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    hand_on(source, model, pair)
    changed = {n for n, t in pair.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"visual_projection.weight"}


def refused(source: ModelConfig, **options: Any) -> None:
    task = task_of(**options)
    config = task.configure(read_model_config(source), LABELS)
    check_shapes(source, skeleton(task.auto_model, config))


def test_a_source_without_a_text_tower_is_refused(vit_folder: Path) -> None:
    with pytest.raises(InputError, match=r"task.head: zero-shot: \S+ has no text tower; take a"):
        refused(ModelConfig(name=str(vit_folder)))


def test_a_source_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    pair_models.clip().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer"):
        refused(ModelConfig(name=str(tmp_path)))


def test_towers_that_have_not_met_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    vision = pair_models.save(pair_models.dual().vision_model, tmp_path / "vision")
    text = pair_models.save(pair_models.dual().text_model, tmp_path / "text")
    towers = {"image": {"name": str(vision)}, "text": {"name": str(text)}}
    with pytest.raises(InputError, match=r"has not met the image tower.*or take head: new"):
        refused(ModelConfig.model_validate({"towers": towers}))


def test_a_model_that_reads_both_but_compares_nothing_is_refused(tmp_path: Path) -> None:
    vision, text = (
        pair_models.clip().config.vision_config,
        hf.LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
    )
    model = hf.LlavaModel(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    )
    pair_models.save(model, tmp_path)
    with pytest.raises(InputError, match="LlavaModel, which doesn't compare images with texts"):
        refused(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{x}"])
def test_a_template_without_a_place_for_the_class_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"must have one \{\}, where the class's name goes"):
        task_of(templates=[template])


def test_templates_without_the_head_they_are_for_are_refused() -> None:
    with pytest.raises(ValueError, match="templates go with head: zero-shot"):
        task_of(head="new", templates=["a {}"])
