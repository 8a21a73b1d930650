"""Unfreezing from the top: toggling requires_grad in the Trainer beside hfft's stored features.

    bert      BERT-base, 128 tokens: 3 epochs each of the head, one block, three blocks
    resnet    ResNet-50, 500x375 JPEGs: 3 epochs each of the head, layer4, layer3
    deep      the same ResNet-50 down to everything, 2 epochs a stage, where little can be saved

`toggled` is one transformers.Trainer a stage over the same model and data, as recipes on the web
have it; its examples are prepared in every epoch. `off` is hfft with feature_cache: off. Each runs
in a process of its own, one after the other; CPU seconds of one thread are counted once everything
is imported, the pass over the data included.

Usage:
    python benchmarks/frozen_stages.py               # about 25 minutes
    python benchmarks/frozen_stages.py bert resnet   # some of the cases
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "bert": {
        "task": "text-classification",
        "freeze": ["backbone", 12, 10],
        "epochs": 3,
        "batch": 8,
        "examples": {"train": 48, "validation": 8},
    },
    "resnet": {
        "task": {"name": "image-classification", "augmentation": "none"},
        "freeze": ["backbone", 4, 3],
        "epochs": 3,
        "batch": 8,
        "examples": {"train": 64, "validation": 16},
    },
    "deep": {
        "task": {"name": "image-classification", "augmentation": "none"},
        "freeze": ["backbone", 4, 3, 2, 1, "none"],
        "epochs": 2,
        "batch": 8,
        "examples": {"train": 24, "validation": 8},
    },
}
CONTENDERS = ("toggled", "off", "hfft")


def config(case: dict[str, Any], folder: Path, name: str, cache: str) -> Any:
    """Return the config of an hfft run."""
    from hfft.config import Config

    stages = [
        {"name": f"s{n}", "freeze": freeze, "epochs": case["epochs"], "learning_rate": 1e-4}
        for n, freeze in enumerate(case["freeze"])
    ]
    return Config.model_validate(
        {
            "task": case["task"],
            "model": str(folder / "model"),
            "data": {
                "path": str(folder / "data"),
                "train": "train.jsonl" if case is CASES["bert"] else "train",
                "validation": "validation.jsonl" if case is CASES["bert"] else "validation",
            },
            "stages": stages,
            "training": {
                "per_device_train_batch_size": case["batch"],
                "per_device_eval_batch_size": case["batch"],
                "save_strategy": "no",
            },
            "feature_cache": cache,
            "output_dir": str(folder / "runs" / name),
        }
    )


def toggled(case: dict[str, Any], folder: Path) -> float:
    """Train stage by stage, each with a Trainer of its own; return the validation accuracy."""
    import transformers as hf

    from hfft.examples import ExampleDataset
    from hfft.plan import make_plan
    from hfft.source import load_weights

    plan = make_plan(config(case, folder, "toggled", "off"))
    subject = plan.subject
    model = load_weights(plan.task.auto_model, plan.config.model, subject.model_config).model
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    transform = subject.transforms["evaluation"]
    data: Any = {s: ExampleDataset(e.rows, transform) for s, e in subject.examples.items()}
    before = time.process_time()
    accuracy = 0.0
    for stage in plan.main.stages:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name not in stage.frozen
        args = hf.TrainingArguments(
            str(folder / "trainer"),
            num_train_epochs=case["epochs"],
            per_device_train_batch_size=case["batch"],
            per_device_eval_batch_size=case["batch"],
            learning_rate=1e-4,
            eval_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = hf.Trainer(
            model,
            args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=subject.collate,
            compute_metrics=lambda p: plan.task.metrics(
                p.predictions, p.label_ids, subject.examples["validation"].split
            ),
        )
        trainer.train()
        accuracy = float(trainer.evaluate()["eval_accuracy"])
    _report(time.process_time() - before, accuracy)
    return accuracy


def _report(seconds: float, accuracy: float) -> None:
    print(json.dumps({"cpu": seconds, "accuracy": accuracy}), flush=True)
    sys.exit(0)


def _contend(case_name: str, name: str, folder: Path) -> None:
    import torch._dynamo

    import hfft.run
    import hfft.tasks.image_classification
    import hfft.tasks.text_classification

    torch.set_num_threads(1)
    case = CASES[case_name]
    before = time.process_time()
    if name == "toggled":
        toggled(case, folder)
    run = config(case, folder, name, "auto" if name == "hfft" else "off")
    result = hfft.train(run, overwrite=True)
    stored = [stage["feature_cache"] is not None for stage in result.stages]
    print(f"  {case_name} {name}: stored in stages {stored}", file=sys.stderr)
    _report(time.process_time() - before, float(result.metrics["eval"]["accuracy"]))


def _prepare(case_name: str, folder: Path) -> None:
    from bert_texts import save_bert, write_texts
    from photos import draw_photos, save_resnet50

    count = CASES[case_name]["examples"]
    if case_name == "bert":
        write_texts(folder / "data", count)
        save_bert(folder / "model")
    else:
        draw_photos(folder / "data", {split: number // 4 for split, number in count.items()})
        save_resnet50(folder / "model", folder / "data" / "train")


def main() -> int:
    """Run every case with every contender; print seconds, ratios and accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        _contend(options.contender[0], options.contender[1], Path(options.contender[2]))
    for case in options.cases:
        with TemporaryDirectory() as name:
            folder = Path(name)
            _prepare(case, folder)
            environment = os.environ | {
                "HFFT_CACHE": str(folder / "cache"),
                "OMP_NUM_THREADS": "1",
                "TRANSFORMERS_VERBOSITY": "error",
                "HF_HUB_OFFLINE": "1",
            }
            base = 0.0
            for one in CONTENDERS:
                command = [sys.executable, __file__, "--contender", case, one, name]
                done = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                base = base or found["cpu"]
                print(
                    f"{case:<8}{one:<10}{found['cpu']:8.1f} CPU s {base / found['cpu']:6.2f} x  "
                    f"accuracy {found['accuracy']:.3f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
