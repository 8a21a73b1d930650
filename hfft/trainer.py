"""The Trainer of one stage: Hugging Face's own, overriding as little as possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import find_batch_size

from hfft.batches import GroupedByLength, TokenBatches
from hfft.contrastive_step import ContrastiveStep
from hfft.contrastive_task import ContrastiveTask
from hfft.errors import InputError
from hfft.hooks import EpochCallback, PenaltyCallback
from hfft.hooks.epoch import EpochAware
from hfft.optim import OptimizerState, carry_state, parameter_groups, state_by_name
from hfft.task_trainer import TaskTrainer
from hfft.weights_file import save_weights


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; raised before the weights are touched."""


class StageTrainer(TaskTrainer):
    """Trains one stage.

    A stage is one prepare-and-train: the optimizer and the distributed wrapper are made for what
    learns in it. Thawing a layer under an existing one is silently wrong (DDP replicas drift
    apart, the optimizer never moves it).

    Args:
        rates: each parameter's peak learning rate.
        carried: the earlier stage's optimizer state by parameter name.
        span: `(before, whole)` in optimizer steps, for a schedule over the whole run; None for a
            schedule of the stage's own.
        lengths: (N,) tokens of the training examples, for batches that go by them.
        batch_tokens: of a batch; None: batches of so many examples as the arguments say.
        chunk: pairs that pass a contrastive model at a time; None: all of a batch.
        **trainer: TaskTrainer's arguments.

    Raises:
        InputError: FSDP or DeepSpeed, under which carrying state over is not supported.
    """

    def __init__(
        self,
        *,
        rates: Mapping[str, float],
        carried: OptimizerState,
        span: tuple[int, int] | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        batch_tokens: int | None = None,
        chunk: int | None = None,
        **trainer: Any,
    ) -> None:
        super().__init__(**trainer)
        self._rates, self._carried, self._span = rates, carried, span
        self._lengths, self._batch_tokens = lengths, batch_tokens
        self._contrast: ContrastiveStep | None = None
        if isinstance(self.task, ContrastiveTask):
            self._contrast = ContrastiveStep(self.task, self.accelerator, chunk)
        self._examples = 0  # that this process has trained on
        self._own_forward = self._bare_model().__dict__.get("forward")
        # they add to the log, which those that report it must find complete
        self.callback_handler.callbacks.sort(key=lambda one: not isinstance(one, PenaltyCallback))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "FSDP and DeepSpeed are not supported by stages; launch with DDP "
                "(configs/accelerate/one_node_multi_gpu.yaml)"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of this stage's groups, with the state that is carried over."""
        if self.optimizer is None:
            model = model or self._bare_model()
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, model))
            decayed = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(model, self._rates, decayed, self.args.weight_decay)
            self.optimizer = kind(groups, **options)
            carry_state(self.optimizer, self._carried)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the stage's schedule, or this stage's part of the run's."""
        if self._span is None:
            return super().create_scheduler(num_training_steps, optimizer)
        before, whole = self._span
        scheduler = super().create_scheduler(whole, optimizer)
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise InputError(
                f"schedule: run does not go with {self.args.lr_scheduler_type}; use schedule: stage"
            )
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate  # the peak, from which a scheduler starts
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            scheduler.optimizer,
            [partial(_shifted, shape, before) for shape in scheduler.lr_lambdas],
        )
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of so many examples, or of so many tokens."""
        if self._batch_tokens is None or self._lengths is None:
            return super().get_train_dataloader()
        args = self.args
        batches = TokenBatches(
            self._lengths, self._batch_tokens, seed=args.seed, processes=args.world_size
        )
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        self._follow_epochs(batches)
        self.accelerator.even_batches = False  # batches differ in size; no process lacks one
        try:
            return cast(DataLoader[Any], self.accelerator.prepare(loader))
        finally:
            self.accelerator.even_batches = True

    def _get_train_sampler(self, *args: Any) -> Sampler[Any] | None:
        """Return transformers' sampler; of texts of like lengths, ours."""
        if self.args.train_sampling_strategy != "group_by_length" or self._lengths is None:
            return super()._get_train_sampler(*args)
        of_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        of_step *= self.args.world_size
        sampler = GroupedByLength(of_step, self._lengths, seed=self.args.seed)
        self._follow_epochs(sampler)
        return sampler

    def _follow_epochs(self, sampler: EpochAware) -> None:
        """Tell a sampler the epochs as the data are told."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EpochCallback):
                callback.told.append(sampler)
                return
        self.add_callback(EpochCallback(sampler))

    def examples_trained(self) -> int:
        """Return how many examples all processes together have trained on."""
        count = torch.tensor(self._examples, device=self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(count)
        return int(count)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Stop every process at a loss that is no number on any, before the optimizer steps on it.

        Looking at the loss waits for the device once a micro-batch, as the Trainer's own filter,
        which is off here, would.
        """
        self._examples += find_batch_size(inputs) or 0  # type: ignore[no-untyped-call]
        loss = self._forward_and_backward(model, inputs, num_items_in_batch)
        lost = (~torch.isfinite(loss)).to(torch.int32)
        if self.args.world_size > 1:
            dist.all_reduce(lost, op=dist.ReduceOp.MAX)
        if lost:
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, at a learning "
                f"rate of {self._get_learning_rate():.3g}"
            )
        return loss

    def _forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor | int | None
    ) -> torch.Tensor:
        if self._contrast is None:
            return super().training_step(model, inputs, items)
        model.train()
        if callable(mode := getattr(self.optimizer, "train", None)):  # schedule-free ones have it
            mode()
        assert items is not None
        return self._contrast(model, cast(Any, self._prepare_inputs(inputs)), items)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing from the generators that training goes on with."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the estimate walks over all parameters in every step, and nobody reads it."""
        return 0

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Write what learns, under the names it is loaded by.

        transformers 5 saves some models (ViT among them) under other names than they have in
        memory, and its Trainer loads a checkpoint without renaming them back: resuming, and
        `load_best_model_at_end`, then go on with weights that are not the checkpoint's, and only
        warn. A checkpoint is for the Trainer alone; the model folder is saved otherwise. Frozen
        weights are those that the stage starts from.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        model = self._bare_model()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        save_weights(model, folder / "model.safetensors", leave_out=frozen)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing of what a checkpoint leaves out."""
        if load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)

    def optimizer_state(self) -> OptimizerState:
        """Return what the next stage may carry on with, by parameter name."""
        optimizer = self.optimizer
        return state_by_name(cast(Any, getattr(optimizer, "optimizer", optimizer)))

    def _bare_model(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def release(self) -> None:
        """Undo what preparing did to the model, so that the next stage can prepare it anew."""
        model = self._bare_model()
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        self.model_wrapped = model
        # accelerate prepares no model that has this mark, and peels decorators off its forward
        model.__dict__.pop("_is_accelerate_prepared", None)
        model.__dict__.pop("forward", None)
        if self._own_forward is not None:
            model.forward = self._own_forward
        self.accelerator.free_memory()


def _shifted(shape: Callable[[int], float], before: int, step: int) -> float:
    """Return the run's schedule at a stage's step."""
    return shape(before + step)
