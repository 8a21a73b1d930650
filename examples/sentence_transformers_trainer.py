"""Fine-tune a sentence encoder on pairs: the lowest layers frozen, the rest held by L2-SP.

    accelerate launch examples/sentence_transformers_trainer.py --data pairs.jsonl

A line of the data: {"anchor": "a question", "positive": "its answer"}. By default, a part of
Natural Questions. Needs `pip install sentence-transformers`.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hfft.hooks import FreezeCallback, PenaltyCallback


def main() -> None:
    """Train, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", help="a JSON Lines file")
    parser.add_argument("--freeze", type=int, default=3, help="layer groups, from the embeddings")
    parser.add_argument("--strength", type=float, default=0.01, help="of the penalty")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--output", default="runs/sentence_transformers_trainer")
    options = parser.parse_args()

    if options.data:
        data = load_dataset("json", data_files=options.data, split="train")
    else:
        data = load_dataset("sentence-transformers/natural-questions", split="train[:10000]")
        data = data.rename_columns({"query": "anchor", "answer": "positive"})
    model = SentenceTransformer(options.model)

    freeze = FreezeCallback(model, options.freeze)
    penalty = PenaltyCallback(model, "l2_sp", options.strength)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            options.output, max_steps=options.max_steps, logging_steps=10, report_to="none"
        ),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[freeze, penalty],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
