"""A model as ordered layer groups, from the input to the output.

This is the only place that knows a model's order. Freezing, unfreezing, layer-wise learning rates
and reports all read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hfft import timm_layers
from hfft.layer_groups import Freeze, LayerGroup, LayerGroups, TowerFreeze

__all__ = [
    "Freeze",
    "LayerGroup",
    "LayerGroups",
    "TowerFreeze",
    "find_layer_groups",
    "frozen_modules",
]


def find_layer_groups(model: nn.Module) -> LayerGroups:
    """Order a model's parameters: embeddings or stem, block 0 … block n-1, head.

    timm models say their order themselves (`group_matcher`). In a transformers model, and a timm
    model that does not, the blocks are its outermost lists of alike modules; what stands before
    them is the embeddings, what comes after them (a final norm, a pooler) belongs to the last
    block, and what lies outside the base model is the head. Parameters that share a tensor stand
    once, where they are used first.

    In a module that holds a transformers model (a SentenceTransformer, a PeftModel), that one is
    grouped, and what lies outside it belongs to the head; each of several is a tower.

    The order of blocks is that of execution. Single parameters may be used later than their group
    (a class token that joins half-way stands with the embeddings), and parallel branches (CoaT,
    HRNet) stand in the order their authors number them.
    """
    inner = _transformers_models(model) or {"": model}
    if list(inner) == [""]:
        return _model_groups(model, "")
    found = {path: _model_groups(part, path) for path, part in inner.items()}
    rest = dict.fromkeys(name for name, _ in model.named_parameters())  # of a shared one, one name
    towers: dict[str, tuple[LayerGroup, ...]] = {}
    for path, own in found.items():
        for tower, groups in own.towers.items():
            kept = [(g.name, tuple(n for n in g.parameters if n in rest)) for g in groups]
            name = tower if len(found) == 1 else path if len(own.towers) == 1 else f"{path}.{tower}"
            towers[name] = tuple(LayerGroup(group, names) for group, names in kept if names)
            for _, names in kept:
                for covered in names:
                    del rest[covered]
    return LayerGroups(
        towers,
        LayerGroup("head", tuple(rest)),
        ordered=all(own.ordered for own in found.values()),
        model_name=", ".join(own.model_name for own in found.values()),
    )


def _transformers_models(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost transformers models in a model, itself among them, by their paths."""
    from transformers import PreTrainedModel

    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[path] = module
    return found


def _model_groups(model: Any, path: str) -> LayerGroups:
    """Group one model, whose parameters stand under a path in the whole."""
    prefix = f"{path}." if path else ""
    name = type(model).__name__
    timm_model = getattr(model, "timm_model", model)
    if hasattr(timm_model, "pretrained_cfg"):
        own = prefix if timm_model is model else f"{prefix}timm_model."
        body, head = _timm_groups(timm_model, own)
        in_head = frozenset(n.removeprefix(prefix) for n in head.parameters)
        everything = _everything("backbone", model, prefix, in_head)
        name = getattr(model.config, "architecture", name) if timm_model is not model else name
        return LayerGroups({"backbone": body or (everything,)}, head, body is not None, name)
    towers = {own: child for own, child in model.named_children() if own.endswith("_model")}
    if len(towers) >= 2:
        bodies = {
            tower.removesuffix("_model"): (child, f"{prefix}{tower}.", frozenset[str]())
            for tower, child in towers.items()
        }
    else:
        bodies = {"backbone": _base(model, prefix)}
    found = {tower: _tower(*body) for tower, body in bodies.items()}
    groups = {
        tower: ordered or (_everything(tower, *bodies[tower]),) for tower, ordered in found.items()
    }
    covered = {n for ordered in groups.values() for group in ordered for n in group.parameters}
    names = (prefix + n for n, _ in model.named_parameters())
    head = LayerGroup("head", tuple(n for n in names if n not in covered))
    return LayerGroups(groups, head, all(found.values()), name)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that must stay in eval mode, given what requires gradients.

    A module whose parameters are all frozen is frozen whole. One without parameters (dropout,
    pooling) follows what comes after it: it prepares that layer's input.
    """
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [model]
    found: list[nn.Module] = []
    next_is_frozen = False
    for child in reversed(list(model.children())):
        if next(child.parameters(), None) is None:
            found += [child] if next_is_frozen else []
        else:
            inside = frozen_modules(child)
            first = child  # of blocks that stand in a list, the first is what comes next
            while first not in inside and isinstance(first, nn.ModuleList | nn.Sequential):
                first = next(first.children())
            next_is_frozen = first in inside
            found += inside
    return found


def _base(model: Any, prefix: str) -> tuple[nn.Module, str, frozenset[str]]:
    """Return the body of a model with a head: the module, its prefix, what in it is the head."""
    plain = not hasattr(model, "base_model")
    if not plain and model.base_model is not model:
        return model.base_model, f"{prefix}{model.base_model_prefix}.", frozenset()
    children = list(model.named_children())
    with_blocks = [
        i
        for i, (_, child) in enumerate(children)
        if _block_lists(child) or (plain and isinstance(child, nn.ModuleList))
    ]
    after = children[with_blocks[-1] + 1 :] if with_blocks else []
    if prefix and type(model).__name__.endswith("Model"):  # the head of a bare one is outside
        after = []
    return model, prefix, frozenset(f"{c}.{n}" for c, m in after for n, _ in m.named_parameters())


def _everything(name: str, module: nn.Module, prefix: str, leave_out: frozenset[str]) -> LayerGroup:
    names = (n for n, _ in module.named_parameters() if n not in leave_out)
    return LayerGroup(name, tuple(prefix + n for n in names))


def _tower(
    module: nn.Module,
    prefix: str,
    leave_out: frozenset[str] = frozenset(),
    sequences: tuple[type[nn.Module], ...] = (nn.ModuleList,),
) -> tuple[LayerGroup, ...] | None:
    """Return one tower's groups, or None where no order can be found."""
    if isinstance(timm_model := getattr(module, "timm_model", None), nn.Module):
        body, head = _timm_groups(timm_model, f"{prefix}timm_model.")
        if body is None:
            return None
        last = LayerGroup(body[-1].name, body[-1].parameters + head.parameters)
        return (*body[:-1], last)
    stacks = _block_lists(module, sequences)
    if not stacks:
        return None
    names = [name for name, _ in module.named_parameters() if name not in leave_out]
    group_of: dict[str, str] = {}
    blocks: list[str] = []
    for path, others, size in stacks:
        for index in range(size):
            block = f"{path}.{index}"
            blocks.append(block)
            group_of |= {
                name: block
                for name in names
                if any(name.startswith(f"{stack}.{index}.") for stack in (path, *others))
            }
    current = "embeddings"
    ordered: dict[str, list[str]] = {"embeddings": [], **{block: [] for block in blocks}}
    before = _used_before_the_blocks(module, stacks)
    for name in names:
        if name in group_of:
            current = group_of[name]
        home = next((group for path, group in before.items() if name.startswith(path)), current)
        ordered[home].append(prefix + name)
    return tuple(LayerGroup(prefix + name, tuple(own)) for name, own in ordered.items() if own)


def _block_lists(
    module: nn.Module, sequences: tuple[type[nn.Module], ...] = (nn.ModuleList,)
) -> list[tuple[str, tuple[str, ...], int]]:
    """Find the outermost lists of alike modules, of the types in `sequences`, in order.

    Returns:
        For each: its path, the paths of the lists beside it that run in step with it (SegFormer's
        patch embeddings and norms), and its length.
    """
    found: list[tuple[str, tuple[str, ...], int]] = []
    for path, candidate in _outermost_lists(module, "", sequences):
        parent = path.rpartition(".")[0]
        if found and found[-1][0].rpartition(".")[0] == parent and found[-1][2] == len(candidate):
            name, beside, size = found[-1]
            found[-1] = (name, (*beside, path), size)
        else:
            found.append((path, (), len(candidate)))
    return found


def _outermost_lists(
    module: nn.Module, path: str, sequences: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, list[nn.Module]]]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, sequences) and _is_stack(inside := list(child.children())):
            yield below, inside
        else:
            yield from _outermost_lists(child, below, sequences)


def _is_stack(modules: list[nn.Module]) -> bool:
    kinds = {type(module) for module in modules}
    return len(kinds) == 1 and all(next(m.parameters(), None) is not None for m in modules)


def _used_before_the_blocks(
    module: nn.Module, stacks: Iterable[tuple[str, tuple[str, ...], int]]
) -> dict[str, str]:
    """Map the prefix of what stands after a list of blocks yet feeds it to the group below them.

    DeBERTa keeps its relative position embeddings, and their norm, beside the blocks that all use
    them; BART the norm of its embeddings, in the encoder and in the decoder; CLAP the BatchNorm of
    its spectrograms: one beside blocks that have none is of the input.
    """
    found: dict[str, str] = {}
    below = "embeddings"
    for path, _, size in stacks:
        parent, _, name = path.rpartition(".")
        children = list(module.get_submodule(parent).named_children())
        after = children[[n for n, _ in children].index(name) + 1 :]
        with_table = any(isinstance(child, nn.Embedding) for _, child in after)
        without = not any(isinstance(m, _NormBase) for m in module.get_submodule(path).modules())
        for n, child in after:
            if with_table or "embed" in n or (without and isinstance(child, _NormBase)):
                found[f"{parent}.{n}." if parent else f"{n}."] = below
        below = f"{path}.{size - 1}"
    return found


def _timm_groups(model: Any, prefix: str) -> tuple[tuple[LayerGroup, ...] | None, LayerGroup]:
    """Group a timm model by its own matcher: CNN stages or transformer blocks, then its head.

    Without a matcher its blocks are found as in a transformers model; None: there are none.
    """
    in_head = timm_layers.head_parameters(model)
    head = LayerGroup("head", tuple(prefix + name for name in sorted(in_head)))
    layers = timm_layers.numbered_layers(model)
    if layers is None:
        sequences = (nn.ModuleList, nn.Sequential)
        return _tower(model, prefix, frozenset(in_head), sequences), head
    body: list[LayerGroup] = []
    for number in sorted(layers):
        names = tuple(prefix + name for name in layers[number] if name not in in_head)
        if not names:
            continue
        if number == max(layers) and body and in_head.intersection(layers[number]):
            # what shares the head's group without being new (a final norm) ends the last block
            body[-1] = LayerGroup(body[-1].name, body[-1].parameters + names)
        else:
            others = [prefix + name for n in layers if n != number for name in layers[n]]
            name = (
                timm_layers.own_module(names[0], others).removeprefix(prefix) if number else "stem"
            )
            body.append(LayerGroup(name, names))
    return tuple(body), head
