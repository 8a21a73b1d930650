"""Texts of unlike lengths in a batch: transformers.Trainer's ways beside hfft's.

Token counts are log-normal, of mean 60 and at most 512; models have 4 layers of 256.

    bert   classification, 16 texts a batch: padded to 512; to the batch's longest, in random order;
           the same in groups of like lengths; hfft with batch_tokens: 1024
    gpt2   continued pretraining, 16 texts a batch padded to the longest, in random order;
           hfft with packing, two rows of 512 a batch

Every contender starts from the same weights, makes as many passes over the same texts at the same
rates, and runs in a process of its own, one after the other. CPU seconds of one thread are counted
in `Trainer.train`, which evaluates nothing: texts are tokenized, and everything is imported,
before. Tokens are counted as they enter training steps. The model that training ends with is scored
on held-out texts, alike for all: accuracy, or loss a token.

Usage:
    python benchmarks/text_batching.py                    # about 20 minutes
    python benchmarks/text_batching.py bert --texts 1600 --without padded random
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bert_texts import draw_length, load_small, read_texts, save_small, score, write_texts

LONGEST = 512
RATES = {"learning_rate": 5e-4, "warmup_steps": 0.1}
SETTINGS = RATES | {"eval_strategy": "no", "save_strategy": "no"}
HFFT: dict[str, dict[str, Any]] = {
    "bert": {"task": "text-classification", "batch_tokens": 1024},
    "gpt2": {"task": {"name": "text-generation", "packing": True}},
}
BATCH: dict[str, dict[str, int]] = {"bert": {}, "gpt2": {"per_device_train_batch_size": 2}}
TRAINER: dict[str, dict[str, str]] = {
    "bert": {"padded": "random", "random": "random", "grouped": "group_by_length"},
    "gpt2": {"random": "random"},
}
"""The contenders, and how transformers' Trainer samples for them."""
GOALS = {"bert": {"padded": 10.0, "random": 2.7, "grouped": 1.4}, "gpt2": {"random": 3.0}}
SCORES = {"bert": "accuracy of each seed", "gpt2": "loss of each seed"}


def watch() -> dict[str, float]:
    """Return what any Trainer of this process will have spent on training, and its tokens."""
    import transformers as hf

    found: dict[str, float] = {"cpu": 0.0, "steps": 0, "tokens": 0, "computed": 0}
    trainer: Any = hf.Trainer
    train, step = trainer.train, trainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = time.process_time()
        result = train(*args, **kwargs)
        found["cpu"] += time.process_time() - before
        return result

    def counted(this: Any, model: Any, inputs: Mapping[str, Any], *rest: Any) -> Any:
        ids = inputs["input_ids"]
        found["steps"] += 1
        found["computed"] += ids.numel()
        found["tokens"] += int((ids != 0).sum())  # 0 is [PAD], and stands in no text
        return step(this, model, inputs, *rest)

    trainer.train, trainer.training_step = timed, counted
    return found


def hfft_config(case: str, folder: Path, seed: int, epochs: int) -> Any:
    """Return the config of an hfft run."""
    from hfft.config import Config

    splits = {split: f"{split}.jsonl" for split in ("train", "validation")}
    return Config.model_validate(
        {
            **HFFT[case],
            "model": str(folder / "model"),
            "data": {"path": str(folder / "data"), **splits},
            "training": BATCH[case] | SETTINGS | {"num_train_epochs": epochs},
            "output_dir": str(folder / "run"),
            "seed": seed,
        }
    )


def run_hfft(case: str, folder: Path, seed: int, epochs: int) -> Any:
    """Train as `hfft train` does; return the model."""
    import hfft

    config = hfft_config(case, folder, seed, epochs)
    return load_small(hfft.train(config, overwrite=True).model_dir, case)


def run_trainer(name: str, case: str, folder: Path, seed: int, epochs: int) -> Any:
    """Train as transformers' example scripts do; return the model."""
    import transformers as hf
    from datasets import Dataset

    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model")
    examples = read_texts(folder / "data" / "train.jsonl", tokenizer, case)
    if case == "gpt2":
        collate: Any = hf.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    elif name == "padded":
        collate = hf.default_data_collator
        examples = [
            dict(tokenizer.pad(one, padding="max_length", max_length=LONGEST)) for one in examples
        ]
    else:
        collate = hf.DataCollatorWithPadding(tokenizer)
    rows = Dataset.from_list([{**one, "length": len(one["input_ids"])} for one in examples])

    def without_length(batch: Sequence[dict[str, Any]]) -> Any:
        """The Trainer would drop the column itself, before its sampler looks for it."""
        return collate([{k: v for k, v in row.items() if k != "length"} for row in batch])

    args = hf.TrainingArguments(
        str(folder / "trainer"),
        **SETTINGS,
        train_sampling_strategy=TRAINER[case][name],
        per_device_train_batch_size=16,
        num_train_epochs=epochs,
        seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    hf.set_seed(seed)
    model = load_small(folder / "model", case)
    hf.Trainer(model, args, train_dataset=rows, data_collator=without_length).train()
    return model


def largest_difference(folder: Path) -> float:
    """Return how far logits in a packed batch are from those of each text alone, at most."""
    import torch

    from hfft.plan import make_plan

    subject = make_plan(hfft_config("gpt2", folder, seed=0, epochs=1)).subject
    model = load_small(folder / "run" / "model", "gpt2").eval()
    rows: Any = subject.examples["train"].rows
    packed = [rows[number] for number in range(8)]
    batch = subject.collate([subject.transforms["train"](row) for row in packed])
    kept = batch.pop("labels") != -100
    texts = [torch.tensor([one["input_ids"]]) for row in packed for one in row["packed"]]
    with torch.no_grad():
        together = model(**batch).logits[kept]
        alone = torch.cat([model(ids).logits[0] for ids in texts])
    return float((together - alone).abs().max())


def contend(case: str, name: str, folder: Path, seed: int, epochs: int) -> None:
    """Run a contender, and print what it came to."""
    import torch
    import torch._dynamo  # the first optimizer would import it
    import transformers as hf

    import hfft.run
    import hfft.tasks.text_classification
    import hfft.tasks.text_generation  # noqa: F401

    torch.set_num_threads(1)
    found = watch()
    run = run_hfft if name == "hfft" else partial(run_trainer, name)
    model = run(case, folder, seed, epochs)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model")
    held_out = read_texts(folder / "data" / "test.jsonl", tokenizer, case)
    found["score"] = score(model, held_out)
    if name == "hfft" and case == "gpt2":
        found["difference"] = largest_difference(folder)
    print(json.dumps(found), flush=True)


def measure(case: str, name: str, folder: Path, *numbers: int) -> dict[str, float]:
    """Run a contender in a process of its own; return what it printed."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    own = {"OMP_NUM_THREADS": "1", "HFFT_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--contender", case, name, str(folder), *map(str, numbers)]
    environment = os.environ | quiet | own
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {case} {name} {numbers}: {found}", file=sys.stderr, flush=True)
    return found


def report(case: str, runs: Mapping[str, Sequence[Mapping[str, float]]], seen: int) -> None:
    """Print a line a contender: means over the seeds, and the scores of all."""
    mean = {
        name: {key: statistics.mean(run[key] for run in some) for key in some[0]}
        for name, some in runs.items()
    }
    print(f"{case:<8}   CPU s  texts/s  hfft is    goal  tokens/computed  steps  {SCORES[case]}")
    for name, one in mean.items():
        goal, ratio = GOALS[case].get(name), one["cpu"] / mean["hfft"]["cpu"]
        print(
            f"{name:<8}{one['cpu']:8.1f}{seen / one['cpu']:9.1f}"
            + (f"{ratio:7.2f} x{goal:6.1f} x" if goal else " " * 17)
            + f"{one['tokens'] / one['computed']:17.3f}{one['steps']:7.0f}  "
            + " ".join(f"{run['score']:.3f}" for run in runs[name])
        )
    if "difference" in mean["hfft"]:
        print(f"logits packed and alone differ by {mean['hfft']['difference']:.1e} at most")
    print(flush=True)


def main() -> int:
    """Run every case with every contender and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(HFFT), metavar="CASE")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each (default: 2)")
    parser.add_argument("--texts", type=int, default=480, help="to learn from (default: 480)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over them (default: 2)")
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out")
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        case, name, folder, *numbers = options.contender
        contend(case, name, Path(folder), *map(int, numbers))
        return 0
    count = {"train": options.texts, "validation": 16, "test": 480}
    for case in options.cases:
        names = [name for name in TRAINER[case] if name not in options.without]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in (*names, "hfft")}
        with TemporaryDirectory() as name:
            folder = Path(name)
            write_texts(folder / "data", count, length=draw_length, skew=3)
            save_small(folder / "model", case)
            for seed in range(options.seeds):  # in turns, so that a slow minute falls on all
                for contender, found in runs.items():
                    found.append(measure(case, contender, folder, seed, options.epochs))
        report(case, runs, options.texts * options.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
