"""How a strength changes in the course of a stage."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def factor_at(schedule: Schedule, end_factor: float, step: int, steps: int) -> float:
    """Return the strength at a step over the strength at the first.

    Args:
        schedule: `constant`, or the way from 1 at the first step to `end_factor` at the last.
        end_factor: where it ends.
        step: optimizer steps done, from 0.
        steps: optimizer steps in all.
    """
    if schedule == "constant":
        return 1.0
    done = min(1.0, step / (steps - 1)) if steps > 1 else 0.0
    if schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return 1 + (end_factor - 1) * done
