"""What `penalty_cost.py` measures: models with random weights, penalties, and their naive forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from hfft.penalties.low_rank import Product
from hfft.penalties.penalty import Part, make_penalty
from hfft.sections import PenaltyConfig

TOKENS, PIXELS, RANK = 128, 224, 16
STRENGTH = 1e-4
RATE = 1e-5
DISTANCE = 1e-2
"""Of theta from theta_s, relative to theta_s."""


@dataclass(frozen=True)
class Case:
    """A model in training."""

    title: str
    model: nn.Module
    loss: Callable[[], Tensor]
    products: tuple[Product, ...] = ()

    def learning(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def moved(self) -> dict[str, Tensor]:
        """Return copies of what learns, after which the model is moved away from them."""
        source = {name: p.detach().clone() for name, p in self.learning().items()}
        with torch.no_grad():
            for p in self.learning().values():
                p.add_(torch.randn_like(p) * p.std(correction=0), alpha=DISTANCE)
        return source

    def part(
        self, source: Mapping[str, Tensor], kind: str = "l2_sp", *, upper_half: bool = False
    ) -> Part:
        """Return what a penalty covers.

        Args:
            source: theta_s by name.
            kind: the penalty's.
            upper_half: leave out what `is_lower`, as if it were frozen.
        """
        if self.products:
            return Part(STRENGTH, products=self.products)
        covers = make_penalty(PenaltyConfig(kind=kind, strength=STRENGTH)).covers
        own = {n: p for n, p in self.learning().items() if covers(n, p.shape)}
        if upper_half:
            own = {n: p for n, p in own.items() if not is_lower(n)}
        return Part(STRENGTH, tuple(own), tuple(own.values()), tuple(source[n] for n in own))


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    kind: str
    label: str = ""
    mode: Any = "coupled"
    options: Mapping[str, Any] = field(default_factory=dict)
    upper_half: bool = False
    turn: int = 1
    """Steps after which the work repeats."""

    @property
    def name(self) -> str:
        """Its kind, and what is special about it."""
        return f"{self.kind}, {self.label}" if self.label else self.kind


_ORTHOGONAL = (
    Row("orthogonal", "interval 4", turn=4),
    Row("orthogonal", "interval 1", options={"interval": 1}),
)
DENSE_ROWS = (
    Row("l2_sp"),
    Row("l2_sp", "lower half frozen", upper_half=True),
    Row("l2_sp", "decoupled", mode="decoupled"),
    Row("euclidean"),
    Row("cosine"),
    *_ORTHOGONAL,
    Row("spd"),
)
LORA_ROWS = (Row("l2_sp"), Row("cosine"), *_ORTHOGONAL)


def make(name: str, batch: int, model: nn.Module | None = None) -> Case:
    """Return a case.

    Args:
        name: `bert`, `resnet` or `lora`.
        batch: examples in a batch.
        model: instead of a new one.
    """
    torch.manual_seed(0)
    labels = torch.arange(batch) % 2
    if name == "resnet":
        net = model or timm.create_model("resnet50", num_classes=2)
        images = torch.randn(batch, 3, PIXELS, PIXELS)
        return Case("ResNet-50, 224 px", net, lambda: F.cross_entropy(net(images), labels))
    bert = model or BertForSequenceClassification(BertConfig())
    bert.train()
    ids = torch.randint(1000, 30000, (batch, TOKENS))
    title = f"BERT-base, {TOKENS} tokens"
    products: tuple[Product, ...] = ()
    if name == "lora":
        title += f", LoRA of rank {RANK}"
        inside = r".*encoder\.layer.*\.(query|key|value|dense)"
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=inside)
        bert = get_peft_model(bert, lora)  # type: ignore[arg-type]
        products = tuple(_product(m) for m in bert.modules() if hasattr(m, "lora_A"))
        for p in products:
            nn.init.normal_(p.learning[1], std=DISTANCE)
    return Case(title, bert, lambda: bert(input_ids=ids, labels=labels).loss, products)


def _product(layer: Any) -> Product:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Product(layer.base_layer.weight, (a, b), layer.scaling["default"])


def is_lower(name: str) -> bool:
    """Whether a parameter is in the embeddings or stem, or in the lower half of the blocks."""
    return bool(
        re.search(r"embeddings|encoder\.layer\.[0-5]\.", name)
        or re.match(r"conv1|bn1|layer[123]\.", name)
    )


def naive(kind: str, part: Part) -> Tensor | None:
    """Return R as one would write it in torch, for autograd; None where it has no such form."""
    if part.products:
        changes = [p.scale * p.learning[1] @ p.learning[0] for p in part.products]
        if kind == "l2_sp":
            return sum((d**2).sum() for d in changes) / 2  # type: ignore[return-value]
        pairs = [(p.base + d, p.base) for p, d in zip(part.products, changes, strict=True)]
    else:
        pairs = [(w, s) for w, s in zip(part.weights, part.sources, strict=True) if s is not None]
    total: Any = None
    match kind:
        case "l2_sp":
            total = sum(((w - s) ** 2).sum() for w, s in pairs) / 2
        case "euclidean":
            total = torch.stack([(w - s).norm() for w, s in pairs]).norm()
        case "cosine":
            flat = [(w.flatten(), s.flatten()) for w, s in pairs]
            total = sum(1 - F.cosine_similarity(w, s, dim=0) for w, s in flat)
        case "orthogonal":
            flat = [(w.flatten(1), s.flatten(1)) for w, s in pairs if w.dim() > 1]
            total = sum(((w.T @ s) ** 2).sum() for w, s in flat)
    return total
