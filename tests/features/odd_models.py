"""Models whose code goes other ways than layer upon layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Odd(nn.Module):
    """A frozen body, and a middle and a head that learn."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.make()

    def make(self) -> None:
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)
        self.mid = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.hidden(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def hidden(self, x: Tensor) -> Tensor:
        return self.mid(self.body(x))


class FrozenWeightAbove(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        return F.linear(self.mid(self.body(x)), self.body[0].weight)


class LearningWeightBeside(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        return self.body(x) + F.linear(x, self.mid.weight)


class LearningWeightBelow(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        return self.body(F.linear(x, self.mid.weight))


class DetachedBelow(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        return self.body(F.linear(x, self.mid.weight.detach()))


class NoGradBelow(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.mid(x)
        return self.body(x)


class InPlace(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        hidden += 1
        hidden = self.mid(hidden)
        hidden.mul_(2)
        return hidden


class ArgumentInPlace(Odd):
    def make(self) -> None:
        super().make()
        self.mid = _WritesOnItsArgument(4, 4)

    def hidden(self, x: Tensor) -> Tensor:
        return self.mid(self.body(x))


class _WritesOnItsArgument(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x.relu_()
        return super().forward(x) + x


class LearningCalledTwice(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        return self.mid(self.body(x)) + 2 * self.mid(self.body(-x))


class FrozenCalledAgainAbove(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        return self.body(self.mid(self.body(x)))


class Nested(Odd):
    def make(self) -> None:
        super().make()
        self.body = _Nested().requires_grad_(False)

    def hidden(self, x: Tensor) -> Tensor:
        output = self.body(x)
        return self.mid(output["a"][0]["h"]) + output["b"][1] * output["n"]


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a, b = self.linear(x), self.linear(-x)
        return {"a": ({"h": a},), "b": [x, b], "n": 2, "none": None}


class KeptOnItself(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        self.kept = self.body(x)
        return self.mid(self.kept) * self.kept


class MaskedNaN(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.mid(torch.where(hidden > 0, hidden, 0.0)) + torch.nan_to_num(hidden)


class Counting(Odd):
    def make(self) -> None:
        super().make()
        self.register_buffer("count", torch.zeros(4))

    def hidden(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.mid(self.body(x)) + self.count


class RandomInTheBody(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        return self.mid(self.body(F.dropout(x, 0.5)))


class AcrossTheBatch(Odd):
    def hidden(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.mid(hidden - hidden.mean(0))
