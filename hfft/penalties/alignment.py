"""DELTA: feature maps stay near those that the source model computes on the same inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from hfft.complaints import nearest
from hfft.errors import InputError
from hfft.layers import LayerGroup, find_layer_groups
from hfft.penalties.activations import attention, behaviour
from hfft.penalties.attention import first_tensor, has_channels_last, loss_increase, with_first
from hfft.penalties.injection import Injection, refuse_replicas
from hfft.penalties.penalty import Batches, Penalty, Setting, register
from hfft.sections import Section


@register("delta")
class DELTA(Penalty):
    """The distance of feature maps from the source's on the same inputs (Li et al. 2019).

    It costs a second model in memory and its forward pass at every step. The source is in eval
    mode, as in the authors' code: with BatchNorm or dropout the distance is not 0 at the start.

    `attention: loss` asks which channels the loss depends on, so it needs a head that has learned:
    the paper trains the head alone first, and so must you (hfft: strategy lp_ft). With a new head
    the weights are noise.
    """

    class Options(Section):
        """What stands beside `kind` and `strength`."""

        layers: Annotated[tuple[str, ...] | None, Field(strict=False)] = Field(
            None,
            min_length=1,
            description="patterns of layer groups or modules whose output is held; default: the "
            "groups below the head that learn",
        )
        attention: Literal["none", "loss"] = Field(
            "none", description="loss: channels that the loss depends on count more"
        )
        examples: int = Field(256, gt=0, description="examples that the attention is taken over")

    modes = ("coupled",)
    by_pattern = False
    below_head = True
    reads_inputs = True

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self._layers: tuple[str, ...] = ()
        self._weights: Mapping[str, Tensor] = {}
        self._source: nn.Module | None = None

    def check(self, model: nn.Module) -> None:
        """Find the layers.

        Raises:
            InputError: a pattern matches no layer.
        """
        options: Any = self.options
        chosen_layers(model, options.layers)

    def prepare(
        self,
        model: nn.Module,
        source: Mapping[str, Tensor],
        covered: Collection[str],
        batches: Batches,
    ) -> None:
        """Copy the model, with the source's weights, and measure its channels.

        Raises:
            InputError: a pattern matches no layer, or the attention can't be measured.
        """
        options: Any = self.options
        self._layers = chosen_layers(model, options.layers)
        self._source = frozen_copy(model, source)
        if options.attention == "loss":
            increase = loss_increase(self._source, self._layers, batches, examples=options.examples)
            self._weights = {path: attention(value) for path, value in increase.items()}

    def attach(self, setting: Setting) -> Alignment:
        """Start to hold the maps."""
        if self._source is None:
            raise RuntimeError("prepare comes before attach")
        return Alignment(setting, self._source, self._layers, self._weights)


class Alignment(Injection):
    """Holds a model's feature maps to the source's.

    The source's maps are computed when the first of the model's comes, so that both are under the
    same autocast, and not at all where nothing is learned. They are kept until the next forward
    pass of the whole model, for reentrant checkpoints to find them; with those, every forward pass
    must have its backward pass before the next one.

    Args:
        setting: where.
        source: the source model, frozen; moved to the model's device.
        layers: paths of modules.
        weights: path to the channels' weights, of shape (C,), for some or none of them.
    """

    def __init__(
        self,
        setting: Setting,
        source: nn.Module,
        layers: Sequence[str],
        weights: Mapping[str, Tensor],
    ) -> None:
        super().__init__(setting, len(layers))
        model = setting.model
        self._device = next(model.parameters()).device
        self._source, self._layers = source.to(self._device), tuple(layers)
        self._weights = weights
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._maps: dict[str, Tensor] | None = None
        self._ran: set[str] = set()
        self._channels_last = has_channels_last(model)
        self.hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self.hooks.append(model.register_forward_hook(self._at_end))
        for place, path in enumerate(self._layers):
            after = partial(self._after, place, path)
            self.hooks.append(model.get_submodule(path).register_forward_hook(after))

    def remove(self) -> None:
        """Take the hooks off the model, and the source off its device."""
        super().remove()
        self._inputs = self._maps = None
        self._source.cpu()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_replicas(module)
        self._inputs = (args, dict(kwargs)) if torch.is_grad_enabled() else None
        self._maps = None
        self._ran.clear()

    def _at_end(self, module: nn.Module, args: Any, output: Any) -> None:
        # a checkpointed forward may take a way around a module that runs otherwise
        if self._inputs is not None:
            _require_run(path for path in self._layers if path not in self._ran)

    def _after(self, place: int, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        self._ran.add(path)
        maps = first_tensor(output)
        if not (torch.is_grad_enabled() and maps.requires_grad):
            return None
        target, weights = self._source_maps()[path], self._weights.get(path)
        last = self._channels_last and maps.ndim == 4

        def rule(maps: Tensor) -> tuple[Tensor, Tensor]:
            if not last:
                return behaviour(maps, target, weights)
            value, gradient = behaviour(maps.movedim(-1, 1), target.movedim(-1, 1), weights)
            return value, gradient.movedim(1, -1)

        return with_first(output, self.inject(maps, rule, place))

    def _source_maps(self) -> dict[str, Tensor]:
        if self._maps is None:
            if self._inputs is None:
                raise InputError(
                    "penalty.kind: delta needs the inputs of the whole model, and a part of it "
                    "was called alone; call the model that the callback was given"
                )
            args, kwargs = self._inputs
            device = [self._device] if self._device.type != "cpu" else []
            kind = self._device.type if device else "cuda"
            with torch.no_grad(), torch.random.fork_rng(device, device_type=kind):
                self._maps = maps_of(self._source, self._layers, args, kwargs)
        return self._maps


def maps_of(
    model: nn.Module, layers: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return what modules of a model give out in one forward pass, by their paths.

    Raises:
        InputError: one does not run, or more than once.
    """
    found: dict[str, Tensor] = {}
    several = set()

    def keep(path: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        several.update({path} & found.keys())
        # a copy where the next module works in place, for it would overwrite what is kept
        found[path] = first_tensor(output)
        return with_first(output, found[path].clone()) if in_place else None

    in_place = any(getattr(module, "inplace", False) for module in model.modules())
    hooks = [model.get_submodule(p).register_forward_hook(partial(keep, p)) for p in layers]
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    _require_run(path for path in layers if path not in found or path in several)
    return found


def _require_run(wrong: Iterable[str]) -> None:
    """Raise InputError, naming modules that can't be compared."""
    if names := ", ".join(wrong):
        raise InputError(
            f"penalty.layers: delta compares modules that run once in a forward pass, and these "
            f"run never or more than once: {names}; name others"
        )


def chosen_layers(model: nn.Module, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the paths of the modules whose output is held.

    Args:
        model: the model.
        patterns: shell patterns over layer groups below the head and, where none matches, over
            modules; None: the groups that are modules and hold something that learns.

    Raises:
        InputError: a pattern, or the default, matches nothing.
    """
    groups = find_layer_groups(model)
    below = [group for tower in groups.towers.values() for group in tower]
    paths = {group.name: path for group in below if (path := _path_of(model, group))}
    if patterns is None:
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        found = [paths[g.name] for g in below if g.name in paths and learning & set(g.parameters)]
        if not found:
            raise InputError(
                f"penalty.layers: no layer group of {type(model).__name__} below the head is a "
                f"module that learns; name modules"
            )
        return tuple(found)
    modules = [path for path, module in model.named_modules() if path and _runs(module)]
    chosen: dict[str, None] = {}
    problems = []
    for pattern in patterns:
        matches = [path for name, path in paths.items() if fnmatchcase(name, pattern)]
        matches = matches or [path for path in modules if fnmatchcase(path, pattern)]
        chosen |= dict.fromkeys(matches)
        if not matches:
            problems.append(
                f"penalty.layers: the pattern {pattern!r} matches no layer group below the head "
                f"and no module of {type(model).__name__}{nearest(pattern, [*paths, *modules])}"
            )
    if problems:
        raise InputError(problems)
    return tuple(chosen)


def _path_of(model: nn.Module, group: LayerGroup) -> str | None:
    """Return the path of the module that gives out what a group does, where there is one."""
    path, named, _ = f".{group.parameters[0]}".rpartition(f".{group.name}.")
    if not named:
        return None
    path = f"{path}.{group.name}".strip(".")
    module = model.get_submodule(path)
    # what a Sequential gives out is what its last module does, and that one runs in timm's
    # checkpoints too
    while isinstance(module, nn.Sequential) and len(module):
        name, module = list(module.named_children())[-1]
        path = f"{path}.{name}"
    return path if _runs(module) else None


def _runs(module: nn.Module) -> bool:
    """Whether a module computes something, and is no mere list of others."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def frozen_copy(model: nn.Module, source: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other weights, in eval mode, without gradients.

    Args:
        model: left as it is.
        source: parameters and buffers by name; others are the model's. LoRA's are switched off.
    """
    copy = deepcopy(model)
    # what accelerate lays over a model's forward may hold on to the model itself
    copy.__dict__.pop("forward", None)
    with torch.no_grad():
        for name, own in (*copy.named_parameters(), *copy.named_buffers()):
            plain = name.replace(".base_layer.", ".")  # as it was before LoRA came
            if (value := source.get(name, source.get(plain))) is not None:
                own.copy_(value)
    for module in copy.modules():
        module.training = False  # not eval(): frozen modules may not listen
        if hasattr(module, "adapter_layer_names"):
            module.enable_adapters(False)  # type: ignore[operator]
    return copy.requires_grad_(False)
