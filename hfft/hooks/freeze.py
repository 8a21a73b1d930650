"""Frozen means frozen: no gradient, eval mode, and nothing moves, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hfft.errors import InputError
from hfft.hooks.wrappers import accelerator_state, bare_name, bare_optimizer
from hfft.layers import Freeze, TowerFreeze, find_layer_groups, frozen_modules

_REMEDY = "make the callback, then a new Trainer with it, and change requires_grad no more"
# Distributed types under which it is not DDP that averages gradients.
_NOT_DDP = {
    DistributedType.NO,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
}


def _stay(module: nn.Module, _mode: bool = True) -> nn.Module:
    """Stand in for `module.train`, which returns the module."""
    return module


@contextmanager
def kept_in_eval(model: nn.Module, *, adapted: bool = False) -> Iterator[None]:
    """Hold the frozen modules of a model in eval mode, whoever calls `model.train()`.

    The Trainer calls it before every step; without this, BatchNorm statistics of a frozen
    backbone go on moving and its dropout stays on.

    Args:
        model: with `requires_grad` set.
        adapted: whether adapters learn beside frozen weights. Dropout and stochastic depth between
            adapted layers then regularise what learns, as in full fine-tuning, and stay on;
            modules without an adapter in them are frozen all the same.
    """
    held = list(dict.fromkeys(frozen_modules(model)))  # one that two parents share stands twice
    if adapted:
        held = [module for module in held if next(module.parameters(), None) is not None]
    for module in held:
        module.eval()
        module.train = partial(_stay, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in held:
            del module.train


class FreezeCallback(TrainerCallback):
    """Freeze part of a model for the length of one `Trainer.train()`.

    Give it to the Trainer when that is made: `requires_grad` is set then, before the optimizer
    and the distributed wrapper are, and both are right. What is frozen stays frozen afterwards;
    another FreezeCallback, in another Trainer, may set it anew. In a model with PEFT adapters it
    only freezes: what the adapters leave frozen stays so.

    Args:
        model: the model the Trainer is given, unwrapped: a transformers or timm model, or a module
            that holds one (a SentenceTransformer, a PeftModel).
        freeze: `none`, `backbone`, a number of groups from the input, or name patterns.
        towers: of towers in which it is another, such as `{"vision": "backbone"}`.

    Raises:
        InputError: a pattern that matches nothing, a number beyond the groups there are, or a model
            that DistributedDataParallel wraps already. Before the first step: what would let
            replicas drift apart, or let nothing learn, or less than was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: Freeze,
        towers: Mapping[str, TowerFreeze] = MappingProxyType({}),
    ) -> None:
        if isinstance(model, DistributedDataParallel):
            raise InputError(
                "freeze: the model is wrapped in DistributedDataParallel, which averages what "
                "learned when it was wrapped; freeze first, and give the Trainer the model itself"
            )
        groups = find_layer_groups(model)
        frozen = groups.frozen(freeze, towers)
        adapted = _has_adapters(model)
        for name, parameter in model.named_parameters():
            may_learn = parameter.requires_grad or not adapted
            parameter.requires_grad_(may_learn and name not in frozen)
        self._model = model
        self._learning = _learning(model)
        self._input_is_frozen = any(
            frozen.issuperset(tower[0].parameters) for tower in groups.towers.values()
        )
        self._held = ExitStack()
        self._unseen = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse FSDP1's flat parameters, which learn whole or not at all."""
        plugin = getattr(accelerator_state(), "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 1 or plugin.use_orig_params:
            return
        if 0 < len(self._learning) < sum(1 for _ in self._model.parameters()):
            raise InputError(
                "freeze: FSDP1 with use_orig_params: false joins frozen and learning parameters "
                "into one; set fsdp_use_orig_params: true, or fsdp_version: 2, in the accelerate "
                "config"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Put the frozen modules into eval mode, once all is as it was when this was made."""
        self._held.close()  # a run that broke off left it open
        self.on_init_end(args, state, control)  # for a callback that was added later
        _require_same_model(self._model, model)
        _require_same_learning(self._learning, _learning(self._model))
        _require_held(self._model if model is None else model, optimizer)
        checkpointing = _checkpointing(self._model)
        if self._input_is_frozen and "reentrant" in checkpointing:
            _require_grad_at_input(self._model)
        elif self._input_is_frozen and checkpointing:
            _forget_grad_at_input(self._model)
        self._held.enter_context(kept_in_eval(self._model))
        kind = getattr(accelerator_state(), "distributed_type", DistributedType.NO)
        self._unseen = kind not in _NOT_DDP and dist.is_initialized()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, see that all processes have the same gradients."""
        if self._unseen:
            self._unseen = False
            different = unequal_gradients(dict(self._model.named_parameters()))
            if different:
                raise InputError(
                    f"freeze: processes have different gradients of {_some(different)}, and the "
                    f"replicas would drift apart: DistributedDataParallel wraps the model as it "
                    f"learned before, which it does where one Trainer trains twice; {_REMEDY}"
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the modules follow `model.train()` again."""
        self._held.close()


@torch.no_grad()
def unequal_gradients(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of those whose gradients are not bit-identical on all processes.

    All processes must call it, with the same parameters: it is one collective operation. Where some
    are shards, gradients are not DDP's to average, and none is named.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return []
    sums = torch.stack([_bits(parameter) for parameter in parameters.values()])
    extremes = torch.cat([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = extremes[: len(sums)], -extremes[len(sums) :]
    differ = (highest != lowest).tolist()
    return [name for name, different in zip(parameters, differ, strict=True) if different]


def _bits(parameter: Tensor) -> Tensor:
    """Return the sum of a gradient's bit patterns: exact in any order; -1: there is none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.tensor(-1, device=parameter.device)
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[gradient.element_size()]
    return gradient.contiguous().view(kind).sum(dtype=torch.int64)


def _has_adapters(model: nn.Module) -> bool:
    """Whether PEFT is at work in a model, which may be without a PeftModel around it."""
    return any(hasattr(module, "adapter_layer_names") for module in model.modules())


def _learning(model: nn.Module) -> frozenset[str]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return frozenset(map(bare_name, names))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _require_same_model(mine: nn.Module, trained: nn.Module | None) -> None:
    """Raise InputError where the Trainer has another model (one from `model_init`)."""
    if trained is None or any(module is mine for module in trained.modules()):
        return
    if not any(module is trained for module in mine.modules()):
        raise InputError(
            "freeze: the Trainer trains another model than the callback was given; give both the "
            "same, and no model_init"
        )


def _require_same_learning(then: frozenset[str], now: frozenset[str]) -> None:
    """Raise InputError where requires_grad was changed since the callback was made."""
    thawed, frozen = sorted(now - then), sorted(then - now)
    changes = [
        f"{_some(names)} {verb} to learn"
        for names, verb in ((thawed, "came"), (frozen, "ceased"))
        if names
    ]
    if changes:
        raise InputError(
            f"freeze: {' and '.join(changes)} after the callback was made, through another "
            f"callback, PEFT or a change of requires_grad; {_REMEDY}"
        )


def _require_held(model: nn.Module, optimizer: Any) -> None:
    """Raise InputError where the optimizer does not hold all that learns, or nothing learns."""
    bare = bare_optimizer(optimizer)
    if bare is None or isinstance(bare, LayerWiseDummyOptimizer):
        return  # DeepSpeed's holds copies; a layer-wise one nothing
    held = {id(p): p for group in bare.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise InputError(
            f"freeze: the optimizer does not hold {_some(missing)}, which learn: it was made "
            f"while they were frozen, and would never move them; {_REMEDY}"
        )
    if not any(parameter.requires_grad for parameter in held.values()):
        raise InputError("freeze: nothing learns: all is frozen, and the model has no head")


def _checkpointing(model: nn.Module) -> set[str]:
    """Return the ways in which a model checkpoints activations: `reentrant`, or not."""
    ways = set()
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
            ways.add("reentrant" if reentrant else "not reentrant")
    return ways


def _require_grad_at_input(model: nn.Module) -> None:
    """Raise InputError where the input of checkpointed layers requires no gradient.

    Reentrant checkpointing gives a layer's weights no gradient then, and says so in a warning only.
    transformers makes the input require one in models of text, not in those of images.
    """
    if not any(getattr(module, "_require_grads_hooks", None) for module in model.modules()):
        raise InputError(
            "freeze: under gradient checkpointing with use_reentrant: true, layers above frozen "
            "ones get no gradient and learn nothing; set gradient_checkpointing_kwargs: "
            "{use_reentrant: false}"
        )


def _forget_grad_at_input(model: nn.Module) -> None:
    """Undo what only reentrant checkpointing needs: a graph through all frozen layers.

    Those are in eval mode, where they are not checkpointed, so it would keep all their activations.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()  # type: ignore[no-untyped-call]
