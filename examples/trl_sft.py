"""Fine-tune a language model in TRL's SFTTrainer: low layers frozen, the rest held by L2-SP.

    accelerate launch examples/trl_sft.py --data conversations.jsonl

A line of the data: {"prompt": "a question", "completion": "its answer"}, or {"text": "..."}. By
default, a part of Capybara. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hfft.hooks import FreezeCallback, PenaltyCallback


def main() -> None:
    """Train, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="Hub id or folder")
    parser.add_argument("--data", help="a JSON Lines file")
    parser.add_argument("--freeze", type=int, default=14, help="layer groups, from the embeddings")
    parser.add_argument("--strength", type=float, default=0.001, help="of the penalty")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--output", default="runs/trl_sft")
    options = parser.parse_args()

    if options.data:
        data = load_dataset("json", data_files=options.data, split="train")
    else:
        data = load_dataset("trl-lib/Capybara", split="train[:2000]")
    # the model itself, not its name: callbacks and Trainer must have the same one
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

    freeze = FreezeCallback(model, options.freeze)
    penalty = PenaltyCallback(model, "l2_sp", options.strength)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            options.output,
            max_steps=options.max_steps,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[freeze, penalty],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
