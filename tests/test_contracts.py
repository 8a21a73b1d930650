"""What must hold of every task and every shipped config."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from hfft import registry
from hfft.cli import main
from hfft.config_file import load_config
from hfft.plan import make_plan
from hfft.task import Task

from . import pair_models as pairs
from . import sound_models as sounds
from .text_runs import bert_folder, gpt_folder, t5_folder

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate"
)


@pytest.mark.parametrize("name", registry.entries())
def test_every_task_provides_what_the_engine_needs(name: str) -> None:
    kind = registry.get(name)
    assert issubclass(kind, Task)
    assert kind.name == name
    assert issubclass(kind.Options, BaseModel)
    task = kind(kind.Options())
    assert task.columns
    assert task.metric in task.metric_names
    assert set(task.lower_is_better) <= {"loss", *task.metric_names}
    assert task.auto_model
    assert task.model_suffix
    assert all(field.description for field in kind.Options.model_fields.values())
    assert registry.entries()[name].summary


ROWS: dict[str, dict[str, Any]] = {
    "adapt_then_classify": {"text": "a warm film", "label": "good"},
    "cnn_dailymail_t5": {"article": "a very fine film", "highlights": "fine film"},
    "conll2003_ner": {"tokens": ["the", "actor", "was"], "ner_tags": ["O", "B-PER", "O"]},
    "domain_fill_mask": {"text": "the plot was dull"},
    "mrpc_pairs": {"text1": "a film", "text2": "the film", "label": "same"},
    "sft_chat": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "film"}]
    },
    "squad": {
        "question": "the plot was",
        "context": "the plot was dull and the actor cold",
        "answers": {"text": ["dull"], "answer_start": [13]},
    },
    "sst2": {"sentence": "a warm film", "label": "good"},
    "stsb_regression": {"sentence1": "a film", "sentence2": "the film", "score": 4.5},
    "wikitext_gpt2": {"text": "the actor was very cold and the plot grim"},
}
ROWS["squad_v2"] = ROWS["squad"]
ROWS["sst2_wise_ft"] = ROWS["sst2"]
MODELS = {"sft_chat": gpt_folder, "wikitext_gpt2": gpt_folder, "cnn_dailymail_t5": t5_folder}
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP]{% endfor %}"


def in_place_of_the_hub(config: Path, folder: Path) -> list[str]:
    """Write twenty examples and a tiny model; return the overrides that name them."""
    model = MODELS.get(config.stem, bert_folder)(folder / "model")
    row = ROWS[config.stem]
    other = row | ({"label": "other"} if "label" in row else {})
    lines = "".join(json.dumps(one) + "\n" for one in [row, other] * 10)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    local = [f"model={model}", f"data.path={folder}", "data.subset=null", "task.max_length=24"]
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    if isinstance(task := values["task"], str):
        local[-1:] = [f"task={{name: {task}, max_length: 24}}"]
    if "stages" in values:
        local.append(f"stages.0.data.path={folder}")
    local += ["task.stride=4"] if config.stem.startswith("squad") else []
    return local + ([f"task.chat_template={CHAT!r}"] if config.stem == "sft_chat" else [])


def pairs_in_place_of_the_hub(config: Path, timm_folder: Path, folder: Path) -> list[str]:
    """Write pairs, or images in folders by class, and tiny towers; name them as overrides."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    if "zero-shot-audio-classification" in str(values["task"]):
        towers = sounds.save_towers(folder)
        local = [f"model.towers.{kind}={tower}" for kind, tower in towers.items()]
        return [*local, f"data.path={sounds.write_tones(folder / 'data')}"]
    classes = "templates" in values["task"]
    data = (pairs.write_classes if classes else pairs.write_pairs)(folder / "data")
    local = [f"data.path={data}", "data.columns={}", "data.test=validation"]
    if "retention" in values:
        local += [f"retention.data.path={data}", "retention.data.columns={}"]
        local += ["retention.data.test=validation"]
    if isinstance(values["model"], dict):
        towers = {"image": timm_folder, "text": bert_folder(folder / "text")}
        return local + [f"model.towers.{kind}={tower}" for kind, tower in towers.items()]
    made = pairs.siglip() if config.stem.startswith("siglip") else pairs.clip()
    return [*local, f"model={pairs.save(made, folder / 'model')}"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_plans(
    config: Path, timm_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    """With a small model and data in place of the Hub's."""
    if config.parent.name == "text":
        local = in_place_of_the_hub(config, tmp_path)
    elif config.parent.name == "cross_modal":
        local = pairs_in_place_of_the_hub(config, timm_folder, tmp_path)
    else:
        local = [f"model={timm_folder}", f"data.path={image_folder}"]
    plan = make_plan(load_config(config, [*local, f"output_dir={tmp_path / 'run'}"]))
    assert plan.main.stages
    assert not (tmp_path / "run").exists()


def test_worked_example_is_the_classic_linear_probe(
    timm_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    from timm.data import IMAGENET_DEFAULT_MEAN
    from torchvision import transforms as T

    path = ROOT / "configs" / "image" / "cats_vs_dogs.yaml"
    local = [f"model={timm_folder}", f"data.path={image_folder}"]
    plan = make_plan(load_config(path, local))
    [stage] = plan.main.stages
    assert stage.frozen == frozenset(plan.subject.sizes) - {
        "timm_model.fc.weight",
        "timm_model.fc.bias",
    }
    assert (stage.epochs, stage.learning_rate) == (10, 1e-3)
    assert plan.config.training["per_device_train_batch_size"] == 32
    resize, crop, _, normalise = plan.subject.processor.val_transforms.transforms
    assert (resize.size, tuple(crop.size)) == (224, (224, 224))
    assert isinstance(crop, T.CenterCrop)
    assert tuple(normalise.mean.tolist()) == pytest.approx(IMAGENET_DEFAULT_MEAN)


def test_readme_names_only_verbs_and_files_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / path).is_file(), path
    with pytest.raises(SystemExit):
        main(["--help"])
    verbs = capsys.readouterr().out
    for verb in re.findall(r"`hfft (\w+)", text):
        assert f" {verb} " in verbs


@pytest.mark.slow
def test_wheel_brings_tasks_and_configs_along(tmp_path: Path) -> None:
    """Built and installed in a clean environment outside the checkout, it lists its tasks."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, cwd=tmp_path
    )
    listed = subprocess.run(
        [tmp_path / "env" / "bin" / "hfft", "tasks"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    for name in registry.entries():
        assert name in listed
    find = "import hfft, pathlib; print(pathlib.Path(hfft.__file__).parent)"
    installed = Path(
        subprocess.run(
            [python, "-c", find], check=True, capture_output=True, text=True, cwd=tmp_path
        ).stdout.strip()
    )
    shipped = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert shipped == {p.relative_to(installed) for p in (installed / "configs").rglob("*.yaml")}
