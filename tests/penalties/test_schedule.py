from __future__ import annotations

import pytest

from hfft.penalties.schedule import Schedule, factor_at


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_strength_goes_from_the_first_step_to_the_last(schedule: Schedule) -> None:
    assert factor_at(schedule, 0.2, 0, 11) == 1
    assert factor_at(schedule, 0.2, 5, 11) == pytest.approx(0.6)
    assert factor_at(schedule, 0.2, 10, 11) == pytest.approx(0.2)


def test_linear_and_cosine_part_in_between() -> None:
    assert factor_at("linear", 0, 2, 11) == pytest.approx(0.8)
    assert factor_at("cosine", 0, 2, 11) > 0.9


def test_a_strength_can_grow() -> None:
    assert factor_at("linear", 3, 10, 11) == pytest.approx(3)


def test_a_constant_strength_and_a_single_step_stay_where_they_are() -> None:
    assert factor_at("constant", 0, 7, 10) == 1
    assert factor_at("linear", 0, 0, 1) == 1
