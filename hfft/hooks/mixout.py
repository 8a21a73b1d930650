"""Mixout: weights that are, at random and one by one, the source's again while training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hfft.complaints import nearest
from hfft.errors import InputError
from hfft.penalties.coverage import new_parameters
from hfft.penalties.shards import is_sharded

# The paper's code mixes the weights of linear layers: no biases, norms or embeddings. Conv1D is
# GPT-2's linear layer; a convolution is a linear layer on every patch.
_LAYERS = (nn.Linear, Conv1D, _ConvNd)


def mixed(weight: Tensor, source: Tensor, p: float) -> Tensor:
    """Replace each weight by its source with probability p; in expectation, return the weight.

    This is (m * source + (1 - m) * weight - p * source) / (1 - p) with m ~ Bernoulli(p) of the
    weight's shape (Lee, Cho & Kang 2020, "Mixout: Effective Regularization to Finetune
    Large-scale Pretrained Language Models"), written as dropout of what was learned on top of the
    source. The gradient at the weight is (1 - m) / (1 - p) times that at the result. The mask is
    drawn from the global generator of the weight's device.
    """
    return source + functional.dropout(weight - source, p)


@contextmanager
def mixed_out(model: nn.Module, source: Mapping[str, Tensor], p: float) -> Iterator[None]:
    """Compute with `mixed` weights wherever the model is in training mode.

    Covers the weight matrices of linear and convolutional layers that learn, as they stand on
    entry, and are in `source`. Each call of a layer draws a mask of its own, so a matrix that two
    layers share, or that one layer uses twice, draws one a use. Parameters, optimizer and
    `state_dict` see nothing of it. A matrix that is used without its layer being called
    (`out_proj` in nn.MultiheadAttention) is out of reach.

    Args:
        model: the model to train, where it will be trained: sources are moved to the devices and
            dtypes of its parameters once, here.
        source: parameter name to its value in the source; a whole `state_dict` will do.
        p: the probability of the source's value, 0 <= p < 1. 0 is plain training.

    Raises:
        InputError: p out of range, nothing to mix, a source of another shape, sharded parameters.
    """
    covered = covered_layers(model, source, p)
    if p == 0:
        yield
        return
    own: dict[int, Tensor] = {}  # by parameter: one copy for all layers that share it
    with ExitStack() as hooks:
        for name, module in covered:
            weight = module._parameters["weight"]
            assert weight is not None  # it is covered
            if id(weight) not in own:
                own[id(weight)] = _beside(weight, source[name])
            hooks.callback(_unshadow, module)  # also what a KeyboardInterrupt left, last of all
            before = module.register_forward_pre_hook(partial(_shadow, own[id(weight)], p))
            hooks.callback(before.remove)
            # always: a forward that raises, which checkpointing's recomputation does on purpose
            after = module.register_forward_hook(_unshadow, always_call=True)
            hooks.callback(after.remove)
        yield


class MixoutCallback(TrainerCallback):
    """Train with mixout for the length of one `Trainer.train()`.

    Make it after the FreezeCallback, if there is one. Mixout takes dropout's place: the paper's
    code sets the dropout of a model to 0 (`hidden_dropout_prob=0`), which is left to you.
    Where `train()` raises, the Trainer tells no callback, and mixing lasts until the next
    `train()` or the callback's end.

    Args:
        model: the model the Trainer is given, unwrapped.
        p: the probability of the source's value, 0 <= p < 1.
        source: parameter name to its value in the source. None copies the matrices that learn as
            they are now, without those of a new head: make the callback before a checkpoint is
            loaded (`train(resume_from_checkpoint=...)` loads it later).

    Raises:
        InputError: p out of range, nothing to mix, a source of another shape, sharded parameters.
    """

    def __init__(self, model: Any, p: float, source: Mapping[str, Tensor] | None = None) -> None:
        if source is None:
            new = new_parameters(model)
            source = {
                name: module.weight.detach().clone()
                for weight_names, module in _learning(model)
                for name in weight_names[:1]
                if name not in new
            }
        covered_layers(model, source, p)
        self._model, self._source, self._p = model, source, p
        self._held = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mix from here on, once, even if an earlier training broke off."""
        self._held.close()
        self._held.enter_context(mixed_out(self._model, self._source, self._p))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the weights as they are trained."""
        self._held.close()


def _shadow(source: Tensor, p: float, module: nn.Module, _inputs: Any) -> None:
    """Lay the mixed weight over the parameter: an instance's attributes come before parameters."""
    weight = module._parameters["weight"]
    if module.training and weight is not None:
        module.__dict__["weight"] = mixed(weight, source, p)


def _unshadow(module: nn.Module, *_: Any) -> None:
    module.__dict__.pop("weight", None)


def _beside(weight: Tensor, source: Tensor) -> Tensor:
    """Return the source where the weight is, in memory that training does not write to."""
    moved = source.detach().to(weight)
    shared = moved.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return moved.clone() if shared else moved  # the model's own state_dict as the source


def _learning(model: nn.Module) -> list[tuple[list[str], Any]]:
    """Return the layers whose matrix learns, each with all names of that matrix."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        (names[id(weight)], module)
        for module in model.modules()
        if isinstance(module, _LAYERS)
        and (weight := module._parameters.get("weight")) is not None
        and weight.requires_grad
    ]


def covered_layers(
    model: nn.Module, source: Mapping[str, Tensor], p: float
) -> list[tuple[str, nn.Module]]:
    """Return the layers to mix, each with its matrix's name in `source`, or raise InputError."""
    if not 0 <= p < 1:
        raise InputError(
            f"mixout: p is {p}; give a number from 0 (plain training) to below 1, such as 0.7"
        )
    learning = _learning(model)
    kind = type(model).__name__
    if not learning:
        raise InputError(
            f"mixout: no weight matrix of a linear or convolutional layer learns in {kind}; thaw "
            f"some or leave mixout out"
        )
    _refuse_sharded((module.weight for _, module in learning), kind)
    covered = [
        (name, module)
        for names, module in learning
        if (name := next((n for n in names if n in source), None)) is not None
    ]
    if not covered:
        name = learning[0][0][0]
        hint = nearest(name, source) if source else ""
        raise InputError(
            f"mixout: the source has none of the weight matrices that learn in {kind}, such as "
            f"{name!r}{hint}; give the source's state_dict under the names of "
            f"model.named_parameters()"
        )
    wrong = [
        f"mixout: {name!r} is {tuple(source[name].shape)} in the source and "
        f"{tuple(module.weight.shape)} in {kind}; leave it out of the source"
        for name, module in covered
        if source[name].shape != module.weight.shape
    ]
    if wrong:
        raise InputError(dict.fromkeys(wrong))  # once for all layers that share it
    return covered


def _refuse_sharded(parameters: Iterable[Tensor], kind: str) -> None:
    if any(is_sharded(parameter) for parameter in parameters):
        raise InputError(
            f"mixout: the parameters of {kind} are sharded (FSDP or tensor parallelism), each "
            f"process holding a part; launch with DDP or on one process"
        )
