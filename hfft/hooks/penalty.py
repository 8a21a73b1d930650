"""Penalties toward the pretrained weights, in anybody's transformers Trainer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfft.adapters import AdaptedWeight, adapted_weights
from hfft.complaints import explain
from hfft.errors import InputError
from hfft.hooks.wrappers import accelerator_state, bare_name, bare_optimizer
from hfft.layers import find_layer_groups
from hfft.penalties.coverage import (
    Coverage,
    Strength,
    find_coverage,
    learning_weights,
    new_parameters,
    source_tensors,
    weight_name,
)
from hfft.penalties.low_rank import Product
from hfft.penalties.penalty import Attachment, Batches, Part, Setting, make_penalty
from hfft.penalties.schedule import factor_at
from hfft.sections import PenaltyConfig

# Penalties at work on a model, and the optimizer they came with.
_ATTACHED: weakref.WeakKeyDictionary[
    nn.Module, list[tuple[weakref.ref[torch.optim.Optimizer], weakref.ref[Attachment]]]
] = weakref.WeakKeyDictionary()


class PenaltyCallback(TrainerCallback):
    """Add strength * R(theta, theta_s) to what a Trainer minimises.

    A penalty on weights acts once an optimizer step, on gradients that are accumulated, averaged
    over processes, unscaled and clipped already, so it is not clipped itself. Those on activations
    (`bss`, `delta`) enter in the backward pass of each micro-batch, as means over them, and are
    clipped with the loss. `loss` in the log is L alone; R is logged as `KIND`, and strength times R
    as `KIND_weighted`. The Trainer tells its reporting integrations first; for R to reach them put
    the callback in front: `trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(
    PenaltyCallback))`. Where `train()` raises, the Trainer tells no callback: hooks then stay until
    the next penalised training of the model, or the callback's end.

    Args:
        model: the model the Trainer is given, unwrapped, after it was frozen as it will be.
        kind: `l2_sp`, `euclidean`, `cosine`, `orthogonal`, `fisher`, `bss`, `delta`, `spd`, or
            one that was registered.
        strength: lambda, or name pattern to lambda.
        source: theta_s: a Hub id or folder that the model's class loads, whose file is then shared
            and not copied where training is on the CPU; or tensors by name; default: a copy of the
            learning parameters as they are now.
        batches: examples with labels, as the model's forward takes them; some kinds measure the
            source on them (`fisher`, `delta`).
        **options: `mode`, `schedule`, `end_factor`, `dtype`, and the kind's own.

    Raises:
        InputError: a wrong option or value, or nothing that the kind covers learns. Before the
            first step: DeepSpeed and FSDP1, whose parameters are not the model's.
    """

    def __init__(
        self,
        model: Any,
        kind: str,
        strength: Strength,
        *,
        source: str | Path | Mapping[str, Tensor] | None = None,
        batches: Batches = (),
        **options: Any,
    ) -> None:
        try:
            self.config = PenaltyConfig.model_validate(
                {"kind": kind, "strength": strength, **options}
            )
        except ValidationError as error:
            raise InputError(explain(error, PenaltyConfig, (kind,))) from error
        self.penalty = make_penalty(self.config)
        self._adapted = {weight_name(one) for one in adapted_weights(model)}
        self.coverage = find_coverage(
            self.penalty,
            strength,
            learning_weights(model),
            new_parameters(model),
            partial(find_layer_groups, model),
        )
        _refuse_meta(model)
        whole = {} if source is None else _source(model, source)
        # a weight that LoRA adapts stays as it was: it is its own source
        needed = [name for name in self.coverage.to_source if name not in self._adapted]
        found = dict(model.named_parameters()) if source is None else _plainly_named(whole, needed)
        missing = [name for name in needed if name not in found]
        if missing:
            raise InputError(
                f"source: has no {missing[0]} and {len(missing) - 1} more of the tensors that "
                f"{kind} covers; give the source of this very model"
            )
        self.penalty.prepare(model, whole, self.coverage.to_source, batches)
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else None
        written = {p.untyped_storage().data_ptr() for p in model.parameters()}  # by training
        self._source: dict[str, Tensor] = {}
        for name in () if self.penalty.below_head else needed:
            value = found[name].detach().to(dtype=dtype)
            shared = value.untyped_storage().data_ptr() in written
            self._source[name] = value.clone() if shared else value
        self._attachment: Attachment | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what keeps the parameters elsewhere."""
        kind = getattr(accelerator_state(), "distributed_type", None)
        if kind == DistributedType.DEEPSPEED:
            raise InputError(
                "penalty: DeepSpeed keeps its own copies of parameters and gradients, where a "
                "penalty does not reach; launch with DDP or FSDP2"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Hook the penalty to the optimizer and the model."""
        self.on_init_end(args, state, control)  # for a callback that was added later
        self._detach()
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise InputError(
                "penalty: FSDP1 keeps parameters in flat pieces that have no source value; set "
                "fsdp_version: 2 in the accelerate config"
            )
        bare = bare_optimizer(optimizer)
        if bare is None:
            raise InputError(
                f"penalty: {type(optimizer).__name__} is no optimizer of torch's, whose step a "
                f"penalty is hooked to"
            )
        _forget_broken_off(model, bare)
        self._attachment = self.penalty.attach(
            _setting(self.config, args, state, model, optimizer, bare, train_dataloader)(
                _parts(self.coverage, self._source, model)
            )
        )
        _ATTACHED.setdefault(model, []).append((weakref.ref(bare), weakref.ref(self._attachment)))
        # a training that breaks off tells nobody; its hooks go with its callback
        weakref.finalize(self, self._attachment.remove)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put R, and strength times R, beside the loss."""
        if self._attachment is None or logs is None or "loss" not in logs:
            return
        value, weighted = self._attachment.value()
        key, number = self.config.kind, 2
        while key in logs:  # another of the same kind
            key, number = f"{self.config.kind}_{number}", number + 1
        own = {key: value, f"{key}_weighted": weighted}
        logs.update(own)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(own)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of optimizer and model."""
        self._detach()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None


class _Accumulation:
    """How many micro-batches the current optimizer step is made of."""

    def __init__(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        self._state, self._each = state, args.gradient_accumulation_steps
        try:
            batches = len(loader)
        except TypeError:  # an iterable data set, or none
            batches = 0
        self._steps = -(-batches // self._each)
        self._last = batches % self._each or self._each

    def count(self) -> int:
        """Return it; the last step of an epoch may have fewer than the others."""
        if self._steps and self._state.global_step % self._steps == self._steps - 1:
            return self._last
        return self._each


def _parts(coverage: Coverage, source: Mapping[str, Tensor], model: nn.Module) -> list[Part]:
    """Group what is covered by strength, with the parameters as training has them."""
    own = {bare_name(name): parameter for name, parameter in model.named_parameters()}
    products = {bare_name(weight_name(one)): _product(one) for one in adapted_weights(model)}
    parts = []
    for strengths, to_source in ((coverage.to_source, True), (coverage.to_zero, False)):
        for strength in dict.fromkeys(strengths.values()):
            covered = [name for name, value in strengths.items() if value == strength]
            names = tuple(name for name in covered if name not in products)
            parts.append(
                Part(
                    strength,
                    names,
                    tuple(own[name] for name in names),
                    tuple(source.get(name) if to_source else None for name in names),
                    tuple(products[name] for name in covered if name in products),
                )
            )
    return parts


def _product(adapted: AdaptedWeight) -> Product:
    weight = adapted.weight
    base = weight.T if adapted.transposed else weight.flatten(1)
    return Product(base, (adapted.a, adapted.b), adapted.scale)


def _setting(
    config: PenaltyConfig,
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    optimizer: Any,
    bare: torch.optim.Optimizer,
    loader: Any,
) -> Callable[[Sequence[Part]], Setting]:
    """Say how a training goes, without holding on to the callback that asks."""
    scaler = getattr(optimizer, "scaler", None)
    accumulated = _Accumulation(args, state, loader)
    return partial(
        Setting,
        model,
        bare,
        mode=config.mode,
        factor=lambda: factor_at(
            config.schedule, config.end_factor, state.global_step, state.max_steps
        ),
        step=lambda: state.global_step,
        loss_scale=lambda: (scaler.get_scale() if scaler else 1.0) / accumulated.count(),
    )


def _forget_broken_off(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take off what an earlier training of the model left, having ended in an exception."""
    kept = []
    for own, attached in _ATTACHED.get(model, []):
        if own() is optimizer:
            kept.append((own, attached))
        elif (left := attached()) is not None:
            left.remove()
    _ATTACHED[model] = kept


def _refuse_meta(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "penalty: the model's weights are not here but on the first process alone; set "
            "fsdp_cpu_ram_efficient_loading: false in the accelerate config"
        )


def _plainly_named(source: Mapping[str, Tensor], names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return a source under the names that a model with LoRA has."""
    plain = {name: name.replace(".base_layer.", ".") for name in names}
    own = {name: source[other] for name, other in plain.items() if other in source}
    return {**source, **own}


def _source(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return theta_s by name."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"source: {source} can't be loaded for a {type(model).__name__}, which is no "
            f"transformers model; give the source's tensors by name"
        )
    with torch.random.fork_rng():  # what the file lacks is drawn, and nobody must notice
        return source_tensors(type(model).from_pretrained(source, config=model.config))
