"""Fine-tune a text classifier in a plain Trainer: the lowest layers frozen, the rest held by L2-SP.

    accelerate launch examples/plain_trainer.py --data reviews.jsonl

A line of the data: {"text": "A fine film.", "label": 1}. By default, a part of IMDB.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hfft.hooks import FreezeCallback, PenaltyCallback


def main() -> None:
    """Train, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="google-bert/bert-base-uncased", help="Hub id or folder")
    parser.add_argument("--data", help="a JSON Lines file")
    parser.add_argument("--freeze", type=int, default=7, help="layer groups, from the embeddings")
    parser.add_argument("--strength", type=float, default=0.01, help="of the penalty")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--output", default="runs/plain_trainer")
    options = parser.parse_args()

    if options.data:
        data = load_dataset("json", data_files=options.data, split="train")
    else:
        data = load_dataset("stanfordnlp/imdb", split="train").shuffle(seed=0).select(range(4000))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256))
    classes = len(set(data["label"]))
    model = Classifier.from_pretrained(options.model, num_labels=classes)

    freeze = FreezeCallback(model, options.freeze)
    penalty = PenaltyCallback(model, "l2_sp", options.strength)
    arguments = TrainingArguments(
        options.output, max_steps=options.max_steps, logging_steps=10, report_to="none"
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[freeze, penalty],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
