"""The Trainer as tasks see it: their loss, their predictions, their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import EvalLoopOutput

from hfft.task import IGNORED, Split, Task


@dataclass(frozen=True)
class _Loss:
    """A task's loss, as a Trainer calls it."""

    task: Task
    smoothing: float

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        return self.task.loss(outputs, labels, num_items_in_batch, self.smoothing)


@dataclass
class _Scores:
    """A task's metrics on the split that is being read, as a Trainer calls them."""

    task: Task
    split: Split | None = None

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        assert self.split is not None
        return self.task.metrics(found.predictions, cast(Any, found.label_ids), self.split)


class TaskTrainer(Trainer):
    """A Trainer whose loss and scores are a task's.

    The loss is the task's own function of the model's outputs, since that is the one place where
    a mean over the items of all micro-batches and processes can be had for every model:
    transformers' own are means over a micro-batch, or not, as each model's author saw fit.

    Args:
        task: whose.
        args: as a Trainer's.
        **trainer: transformers.Trainer's own arguments; datasets are `ExampleDataset`s.
    """

    def __init__(self, *, task: Task, args: TrainingArguments, **trainer: Any) -> None:
        # no methods of ours: a Trainer that refers to itself keeps its data's files open
        self._scores = _Scores(task)
        super().__init__(
            args=args,
            compute_loss_func=_Loss(task, args.label_smoothing_factor),
            compute_metrics=self._scores,
            **trainer,
        )
        self.task = task
        self._loss_shifts_labels = False  # tasks align labels with logits
        self.remove_callback(PrinterCallback)  # it prints to standard output

    @property
    def scored(self) -> Split:
        """The split that was scored last."""
        assert self._scores.split is not None
        return self._scores.split

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return a batch's loss, what the task keeps of its outputs, and its labels."""
        inputs = cast(dict[str, Any], self._prepare_inputs(inputs))
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            once = {**inputs, "labels": self._counted_once(labels)}
            loss, outputs = self.compute_loss(model, once, return_outputs=True)
            if prediction_loss_only:
                return loss.detach(), None, None
            kept = self.task.reduce(outputs, labels)
            if self.task.generates:
                rest: Mapping[str, Tensor] = {n: v for n, v in inputs.items() if n != "labels"}
                kept = self.task.generate(self.accelerator.unwrap_model(model), rest), kept
        return loss.detach(), nested_detach(kept), labels  # type: ignore[no-untyped-call]

    def _counted_once(self, labels: Tensor) -> Tensor:
        """Ignore examples that fill up the last batches, so that every process has a whole one.

        accelerate drops them from what it gathers, but a batch's loss is a mean over all of it.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        labels = labels.clone()
        labels[max(0, state.remainder - self.args.process_index * len(labels)) :] = IGNORED
        return labels

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Score the split that a loader reads; a task's own `loss` replaces the batches' mean."""
        dataset: Any = dataloader.dataset
        split: Split = getattr(dataset, "examples", dataset).split
        bare = self.accelerator.unwrap_model(cast(Any, self.model))  # its precision stays
        self._scores.split = replace(split, reference=self.task.reference(bare, split))
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Dataset[Any]) -> SequentialSampler:
        """Read a split in its order, which scores go by, whatever the sampling of training is."""
        return SequentialSampler(cast(Any, eval_dataset))
