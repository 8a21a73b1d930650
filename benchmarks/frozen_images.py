"""A linear probe on a ResNet-50: the classic loop and the plain HF Trainer beside hfft.

The classic loop is torchvision's ResNet-50 with frozen parameters, Adam on `fc`, ImageFolder with
Resize, CenterCrop, ToTensor and Normalize. All start from the same weights and train on the same
JPEGs, 10 epochs of batches of 32, with a look at the validation images after each. Each runs in a
process of its own, one after the other; CPU seconds of one thread are counted once everything is
imported, and include all that hfft does: checking, planning, saving checkpoints and the model.

Usage:
    python benchmarks/frozen_images.py                  # about 25 minutes
    python benchmarks/frozen_images.py --per-class 8    # a quick look, a third of the images
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

EPOCHS, BATCH, RATE = 10, 32, 1e-3
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]


def classic(folder: Path) -> float:
    """Train as the tutorials do; return the last validation accuracy."""
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, models, transforms

    data = {
        split: datasets.ImageFolder(
            folder / "photos" / split,
            transforms.Compose(
                [
                    transforms.Resize(256),
                    transforms.CenterCrop(224),
                    transforms.ToTensor(),
                    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
                ]
            ),
        )
        for split in ("train", "validation")
    }
    loaders = {s: DataLoader(d, batch_size=BATCH, shuffle=s == "train") for s, d in data.items()}
    model = models.resnet50()
    weights = load_file(folder / "model" / "model.safetensors")
    weights = {name.removeprefix("timm_model."): value for name, value in weights.items()}
    model.load_state_dict({n: v for n, v in weights.items() if not n.startswith("fc.")}, False)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = nn.Linear(model.fc.in_features, len(data["train"].classes))
    optimizer = torch.optim.Adam(model.fc.parameters(), lr=RATE)
    criterion = nn.CrossEntropyLoss()
    correct = 0
    for _ in range(EPOCHS):
        for phase, loader in loaders.items():
            model.train(phase == "train")
            correct = 0
            for inputs, labels in loader:
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = model(inputs)
                    loss = criterion(outputs, labels)
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                correct += int((outputs.argmax(1) == labels).sum())
    return correct / len(data["validation"])


def trainer(folder: Path) -> float:
    """Train with transformers.Trainer, the backbone's parameters frozen."""
    import torch
    import transformers as hf
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(folder / "photos"))
    processor = hf.AutoImageProcessor.from_pretrained(folder / "model")
    model = hf.AutoModelForImageClassification.from_pretrained(folder / "model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "fc" in name

    def prepare(rows: Any) -> Any:
        images = [image.convert("RGB") for image in rows["image"]]
        return {**processor(images, return_tensors="pt"), "labels": rows["label"]}

    args = hf.TrainingArguments(
        str(folder / "trainer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    found = hf.Trainer(
        model,
        args,
        train_dataset=data["train"].with_transform(prepare),
        eval_dataset=data["validation"].with_transform(prepare),
        data_collator=lambda rows: {
            key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]
        },
        compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
    )
    found.train()
    return float(found.evaluate()["eval_accuracy"])


def config(folder: Path, name: str, **changes: Any) -> Any:
    """Return the config of an hfft run in `folder`."""
    from hfft.config import Config

    values: dict[str, Any] = {
        "task": {"name": "image-classification", "augmentation": "none"},
        "model": str(folder / "model"),
        "data": {"path": str(folder / "photos"), "validation": "validation"},
        "strategy": {"name": "frozen", "epochs": EPOCHS, "learning_rate": RATE},
        "training": {
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "lr_scheduler_type": "constant",
        },
        "output_dir": str(folder / "runs" / name),
    }
    return Config.model_validate(values | changes)


def run(folder: Path, name: str, **changes: Any) -> float:
    """Run hfft; return the validation accuracy."""
    import hfft

    result = hfft.train(config(folder, name, **changes), overwrite=True)
    return float(result.metrics["eval"]["accuracy"])


def one_pass(folder: Path) -> float:
    """Decode all images and run the network on them, once, as hfft does."""
    import torch
    from torch.utils.data import DataLoader

    from hfft.allocator import keep_freed_memory
    from hfft.examples import ExampleDataset
    from hfft.plan import make_plan
    from hfft.source import load_weights

    plan = make_plan(config(folder, "pass", feature_cache="off"))
    subject = plan.subject
    loaded = load_weights(plan.task.auto_model, plan.config.model, subject.model_config)
    keep_freed_memory()
    before = time.process_time()
    with torch.no_grad():
        for own in subject.examples.values():
            examples = ExampleDataset(own.rows, subject.transforms["evaluation"])
            loader = DataLoader(examples, batch_size=BATCH, collate_fn=subject.collate)
            for batch in loader:
                loaded.model.eval()(**batch)
    _report(time.process_time() - before, None)
    return 0.0


def views(folder: Path) -> float:
    """Train on four augmented views of each image."""
    return run(
        folder, "views", task="image-classification", feature_cache={"mode": "on", "views": 4}
    )


def sweep(folder: Path) -> float:
    """Probe with ten learning rates on a warm cache; return the best accuracy."""
    found = []
    for number, rate in enumerate(RATES):
        strategy = {"name": "frozen", "epochs": EPOCHS, "learning_rate": rate}
        found.append(run(folder, f"sweep{number}", strategy=strategy))
    return max(found)


CONTENDERS: dict[str, Callable[[Path], float]] = {
    "classic": classic,
    "trainer": trainer,
    "pass": one_pass,
    "cached": lambda folder: run(folder, "cached"),
    "again": lambda folder: run(folder, "again"),
    "sweep": sweep,
    "views": views,
    "uncached": lambda folder: run(folder, "uncached", feature_cache="off"),
}
NAMES = {
    "classic": "classic loop",
    "trainer": "transformers.Trainer",
    "pass": "one pass: decode and forward, once",
    "cached": "hfft, frozen",
    "again": "hfft, a second run",
    "sweep": "hfft, ten learning rates",
    "views": "hfft, 4 augmented views",
    "uncached": "hfft, feature_cache: off",
}


def _report(seconds: float, accuracy: float | None) -> None:
    print(json.dumps({"cpu": seconds, "accuracy": accuracy}), flush=True)
    sys.exit(0)


def _contend(name: str, folder: Path) -> None:
    import datasets
    import torch._dynamo
    import torchvision  # noqa: F401

    import hfft.cli
    import hfft.run
    import hfft.tasks.image_classification  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(0)
    datasets.disable_progress_bars()
    before = time.process_time()
    accuracy = CONTENDERS[name](folder)
    _report(time.process_time() - before, accuracy)


def _same_head(folder: Path) -> str:
    import torch
    from safetensors.torch import load_file

    found = [load_file(folder / "runs" / n / "model" / "model.safetensors") for n in _COMPARED]
    heads = [[w for n, w in sorted(f.items()) if ".fc." in n] for f in found]
    same = all(torch.equal(a, b) for a, b in zip(*heads, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in zip(*heads, strict=True))
    return "bit-identical" if same else f"{difference:.2g} apart"


_COMPARED = ("cached", "uncached")


def main() -> int:
    """Run every contender in turn; print seconds, ratios and accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=24, help="training images of each of 4")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        _contend(options.contender[0], Path(options.contender[1]))
    from photos import draw_photos, save_resnet50

    with TemporaryDirectory() as name:
        folder = Path(name)
        validation = max(1, options.per_class // 3)
        draw_photos(folder / "photos", {"train": options.per_class, "validation": validation})
        save_resnet50(folder / "model", folder / "photos" / "train")
        environment = os.environ | {
            "HFFT_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
        }
        found: dict[str, dict[str, Any]] = {}
        for one in options.only:
            command = [sys.executable, __file__, "--contender", one, name]
            done = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            found[one] = json.loads(done.stdout.splitlines()[-1])
            print(f"  {one}: {found[one]['cpu']:.1f} s", file=sys.stderr)
        print(f"{4 * options.per_class} training, {4 * validation} validation JPEGs, 500x375")
        base = found.get("classic", {}).get("cpu")
        for one, values in found.items():
            times = base * (10 if one == "sweep" else 1) / values["cpu"] if base else float("nan")
            seen = "" if values["accuracy"] is None else f"{values['accuracy']:.3f}"
            print(f"{NAMES[one]:<36}{values['cpu']:8.1f} CPU s {times:7.1f} x  {seen}")
        if {"cached", "pass"} <= found.keys():
            share = found["cached"]["cpu"] / found["pass"]["cpu"]
            print(f"cached run over one pass: {share:.2f}")
        if {"trainer", "sweep"} <= found.keys():
            share = 10 * found["trainer"]["cpu"] / found["sweep"]["cpu"]
            print(f"ten runs of the Trainer (ten times its one) over the sweep: {share:.0f} x")
        if found.keys() >= set(_COMPARED):
            print(f"head weights, cached and uncached: {_same_head(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
