"""What prepares pairs is saved so that transformers finds it, whole and in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hfft.contrastive.processor import PairProcessor
from hfft.inference import open_finished, predict
from hfft.sections import ModelConfig, TaskConfig
from hfft.source import load_weights, read_model_config
from hfft.subject import make_task
from tests import dual_models, pair_models
from tests.families import batchnorm_resnet, clap
from tests.fresh import fresh

COLOURS = ["red", "green", "blue"]
TEMPLATE = "a photo of a {} ."
MODELS = ("clip", "siglip", "dual", "vit and bert", "timm and bert")
LOADED = """
import json
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

found = {}
for name in NAMES:
    folder, picture = str(Path(name, "model")), Image.open("picture.png")
    trusted = {"trust_remote_code": True} if list(Path(folder).glob("*.py")) else {}
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    model = AutoModel.from_pretrained(folder, **trusted).eval()
    run = pipeline("zero-shot-image-classification", model=folder, **trusted)
    scores = run("picture.png", candidate_labels=COLOURS, hypothesis_template=TEMPLATE)
    padding = {"padding": True}
    if "siglip" in name:  # as its pipeline does
        padding = {"padding": "max_length", "max_length": 64}
    texts = [TEMPLATE.format(colour) for colour in COLOURS]
    options = {"text": texts, "images": picture, "return_tensors": "pt", **padding}
    inputs = processor(**options)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0]
    of_both = logits.sigmoid() if "siglip" in name else logits.softmax(0)
    found[name] = {
        "kind": type(processor).__name__,
        "code": sorted(path.name for path in Path(folder).glob("*.py")),
        "whole": dict(zip(COLOURS, of_both.tolist())),
        "pipeline": {one["label"]: one["score"] for one in scores},
    }
print(json.dumps(found))
"""


def siglip() -> Any:
    """With as many positions as SigLIP's own checkpoints, which its pipeline counts on."""
    text = {**pair_models.TEXT, "max_position_embeddings": 64}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=pair_models.VISION))


WHOLE: dict[str, Callable[[], Any]] = {
    "clip": pair_models.clip,
    "siglip": siglip,
    "dual": pair_models.dual,
}


def write(folder: Path, name: str) -> Path:
    """A model and what prepares for it, as a run without a step leaves them."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"name": str(folder / "source")}
    if name in WHOLE:
        pair_models.save(WHOLE[name](), folder / "source")
        if name == "siglip":  # whose tokenizer gives no mask
            tokenizer = hf.AutoTokenizer.from_pretrained(
                folder / "source", model_input_names=["input_ids"]
            )
            tokenizer.save_pretrained(folder / "source")
    else:
        vit = hf.ViTModel(hf.ViTConfig(**{**dual_models.PICTURE, "image_size": pair_models.SIDE}))
        image = batchnorm_resnet() if name.startswith("timm") else vit
        text = hf.BertModel(hf.BertConfig(**pair_models.TEXT))
        for kind, model in (("image", image), ("text", text)):
            pair_models.save(model, folder / kind)
        fields = {"towers": {kind: str(folder / kind) for kind in ("image", "text")}}
    source = ModelConfig.model_validate(fields)
    task = make_task(
        TaskConfig.model_validate(
            {
                "name": "zero-shot-image-classification",
                "templates": [TEMPLATE],
                "decode": "exact",
                "loss": "sigmoid" if name == "siglip" else "softmax",
            }
        )
    )
    config = task.configure(read_model_config(source), COLOURS)
    processor = task.load_processor(source, config)
    load_weights(task.auto_model, source, config).model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pair_models.picture("green", "left", folder / "picture.png")
    for name in MODELS:
        write(folder / name, name)
    return folder


@pytest.fixture(scope="module")
def elsewhere(root: Path) -> Any:
    """What transformers makes of the folders in a process without hfft."""
    known = f"NAMES, COLOURS, TEMPLATE = {MODELS!r}, {COLOURS!r}, {TEMPLATE!r}\n"
    return fresh(known + LOADED, root)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_scores_where_hfft_is_not_as_predict_does(
    name: str, root: Path, elsewhere: Any
) -> None:
    [answer] = predict(open_finished(root / name / "model"), [str(root / "picture.png")])
    wanted = {one["label"]: one["score"] for one in answer["scores"]}
    assert max(wanted.values()) - min(wanted.values()) > 1e-4
    for way in ("whole", "pipeline"):
        assert elsewhere[name][way] == pytest.approx(wanted, abs=1e-4)


def test_processor_of_both_is_transformers_own(elsewhere: Any) -> None:
    assert {name: found["kind"] for name, found in elsewhere.items()} == {
        "clip": "CLIPProcessor",
        "siglip": "SiglipProcessor",
        "dual": "VisionTextDualEncoderProcessor",
        "vit and bert": "VisionTextDualEncoderProcessor",
        "timm and bert": "VisionTextDualEncoderProcessor",
    }


def test_code_stands_beside_the_models_that_need_it(elsewhere: Any) -> None:
    own = ["dual_encoder.py", "pooling.py", "tower.py"]
    assert {name: found["code"] for name, found in elsewhere.items()} == {
        **{name: [] for name in WHOLE},
        "vit and bert": own,
        "timm and bert": sorted([*own, "timm_images.py"]),
    }


@pytest.mark.parametrize("name", MODELS)
def test_what_was_prepared_is_prepared_again_from_the_folder(name: str, root: Path) -> None:
    source = ModelConfig(name=str(root / name / "model"))
    task: Any = open_finished(source.name).task
    again = task.load_processor(source, read_model_config(source))
    value = {"path": str(root / "picture.png"), "bytes": None}
    size = {"timm and bert": (3, 176, 176)}.get(name, (3, pair_models.SIDE, pair_models.SIDE))
    assert task.prepare(again.other, training=False)(value)["pixel_values"].shape == size
    assert again.backend_tokenizer.to_str() == pair_models.tokenizer().backend_tokenizer.to_str()
    assert again.to_dict() == again.other.to_dict()


def test_loss_is_known_from_the_model_alone(root: Path) -> None:
    tasks: dict[str, Any] = {name: open_finished(root / name / "model").task for name in MODELS}
    losses = {name: task.options.loss for name, task in tasks.items()}
    assert losses == {**dict.fromkeys(MODELS, "softmax"), "siglip": "sigmoid"}


def test_sounds_without_a_processor_of_both_are_saved_in_parts(tmp_path: Path) -> None:
    model = dual_models.hearing("wav2vec2")
    other, tokenizer = hf.Wav2Vec2FeatureExtractor(), pair_models.tokenizer()
    processor = PairProcessor.of(model.config, other, tokenizer)
    assert processor.whole is None
    processor.save_pretrained(tmp_path)
    assert hf.AutoFeatureExtractor.from_pretrained(tmp_path).to_dict() == other.to_dict()
    assert hf.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_processor_of_sounds_and_texts_is_whole_where_there_is_one(tmp_path: Path) -> None:
    other, tokenizer = hf.ClapFeatureExtractor(), pair_models.tokenizer()
    processor = PairProcessor.of(clap().config, other, tokenizer)
    assert type(processor.whole) is hf.ClapProcessor
    assert processor.whole.feature_extractor is other
    processor.save_pretrained(tmp_path)
    assert hf.AutoFeatureExtractor.from_pretrained(tmp_path).to_dict() == other.to_dict()
