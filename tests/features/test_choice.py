"""Features are stored where that saves time, and room is spent where it saves most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hfft.features.calls import Call
from hfft.features.choice import (
    Candidate,
    choose,
    describe,
    fitting,
    seconds_of,
    servers,
    stored_bytes,
)
from hfft.features.cut import Absent, Cut, Slot

CUT = Cut((Slot(Call("head", 0), 0, 0, (4,), torch.float32, varies=False),), {}, {}, {})
GROUPS = [f"layer{n}" for n in range(12)]
EXAMPLES = 1000


def below(depth: int) -> frozenset[str]:
    return frozenset(GROUPS[:depth])


def stage(depth: int = 12, epochs: float = 5, **changes: Any) -> Candidate:
    """Each layer takes 2 ms an example; an example is 3 kB."""
    made = Candidate(
        cut=CUT,
        frozen=below(depth),
        lower="",
        splits=("train",),
        visits=EXAMPLES * epochs,
        examples=EXAMPLES,
        seconds=0.002 * depth,
        bytes=3000,
    )
    return replace(made, **changes)


def nested(*stages: Candidate) -> list[frozenset[str]]:
    return [one.frozen for one in stages]


def chosen(*stages: Candidate) -> set[int]:
    return choose(dict(enumerate(stages)), nested(*stages))


def test_several_epochs_of_one_boundary_are_stored() -> None:
    assert chosen(stage(epochs=5)) == {0}


@pytest.mark.parametrize("epochs", [0.5, 1])
def test_one_epoch_alone_is_not_stored(epochs: float) -> None:
    assert chosen(stage(epochs=epochs)) == set()


@pytest.mark.parametrize("size", [100, 1e4, 1e6, 1e8, 1e10])
def test_more_epochs_never_make_storing_go_away(size: float) -> None:
    stored = [bool(chosen(stage(epochs=n, bytes=size))) for n in (1, 2, 3, 5, 10, 100, 1000)]
    assert stored == sorted(stored)
    assert not stored[0]


def test_smaller_features_never_make_storing_go_away() -> None:
    stored = [bool(chosen(stage(bytes=10.0**n))) for n in range(12, 0, -1)]
    assert stored == sorted(stored)
    assert stored[-1]
    assert not stored[0]


def test_a_slower_body_never_makes_storing_go_away() -> None:
    stored = [bool(chosen(stage(seconds=10.0**n, bytes=1e6))) for n in range(-9, 3)]
    assert stored == sorted(stored)
    assert stored[-1]
    assert not stored[0]


def test_one_pass_serves_later_stages_that_are_frozen_less() -> None:
    """Each stage is one epoch: none would pay for a pass of its own."""
    stages = [stage(12 - n, epochs=1) for n in range(4)]
    assert chosen(*stages) == {0, 1, 2, 3}
    found = dict(enumerate(stages))
    made_by = list(servers(found, nested(*stages), {0, 1, 2, 3}).values())
    assert made_by == [0, 0, 0, 0]


def test_a_pass_serves_no_layers_that_learned_meanwhile() -> None:
    stages = [stage(12), stage(2), stage(12)]
    found = dict(enumerate(stages))
    assert servers(found, nested(*stages), {0, 1, 2})[1] == 0
    assert servers(found, nested(*stages), {0, 1, 2})[2] == 2
    # a stage between that is none of the candidates
    assert servers({0: stages[0], 2: stages[2]}, nested(*stages), {0, 2})[2] == 2


def test_a_pass_of_a_lower_boundary_serves_no_higher_one() -> None:
    stages = [stage(3), stage(12)]
    assert servers(dict(enumerate(stages)), [below(12), below(12)], {0, 1})[1] == 1


def test_what_is_not_chosen_serves_nobody() -> None:
    stages = [stage(12), stage(11)]
    assert servers(dict(enumerate(stages)), nested(*stages), {1})[1] == 1


def test_low_boundaries_of_huge_features_are_recomputed() -> None:
    """As in a schedule from top to bottom: cheap layers, large maps, an epoch each."""
    stages = [stage(12 - n, epochs=1, bytes=3000 * 4.0**n) for n in range(12)]
    found = chosen(*stages)
    assert {0, 1} <= found
    assert not found & {8, 9, 10, 11}
    assert found == set(range(len(found)))  # those of the highest boundaries


def test_choosing_is_no_worse_than_all_or_nothing() -> None:
    from hfft.features import choice

    for sizes in ((1e3, 1e8, 1e3), (1e8, 1e3, 1e8), (1e7, 1e7, 1e7)):
        stages = [stage(12 - 3 * n, epochs=2, bytes=size) for n, size in enumerate(sizes)]
        found = dict(enumerate(stages))
        cost = choice._cost(found, nested(*stages), choose(found, nested(*stages)))
        for other in (set(), set(found)):
            assert cost <= choice._cost(found, nested(*stages), other) + 1e-12


def test_no_candidates_is_no_choice() -> None:
    assert choose({}, []) == set()
    assert fitting({}, [], set(), 10) == set()
    assert stored_bytes({}, set()) == 0


# Room


def test_the_limit_is_respected_and_the_best_by_byte_stays() -> None:
    stages = [stage(12, bytes=3000), stage(6, bytes=90_000)]
    found = dict(enumerate(stages))
    for limit in (0, 2_999_999, 3_000_000, 92_999_999, 93_000_000):
        kept = fitting(found, nested(*stages), {0, 1}, limit)
        assert stored_bytes(found, kept) <= limit
    assert fitting(found, nested(*stages), {0, 1}, 93_000_000) == {0, 1}
    assert fitting(found, nested(*stages), {0, 1}, 92_999_999) == {0}
    assert fitting(found, nested(*stages), {0, 1}, 2_999_999) == set()


def test_a_higher_limit_never_stores_less() -> None:
    stages = [stage(12 - n, epochs=2, bytes=3000 * 3.0**n) for n in range(5)]
    found = dict(enumerate(stages))
    sizes = [
        len(fitting(found, nested(*stages), set(found), limit))
        for limit in (0, 10**6, 10**7, 10**8, 10**9, 10**10)
    ]
    assert sizes == sorted(sizes)


def test_stages_of_one_cut_take_the_room_of_one() -> None:
    stages = {0: stage(12), 1: stage(12, epochs=3), 2: stage(11)}
    assert stored_bytes(stages, {0, 1}) == stages[0].size
    assert stored_bytes(stages, {0, 1, 2}) == 2 * stages[0].size


# Estimates


def test_preparing_an_input_counts_where_the_cut_spares_it() -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 224, 224), "labels": torch.zeros(2)}
    spared = Cut(CUT.slots, {}, {"pixel_values": Absent(("batch", 3, 224, 224), torch.float32)}, {})
    assert seconds_of(1e9, batch, spared) > seconds_of(1e9, batch, CUT) > 0
    assert seconds_of(2e9, batch, CUT) == pytest.approx(2 * seconds_of(1e9, batch, CUT))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (3000, "3 kB"), (1.5e9, "1.5 GB"), (2e16, "2e+04 TB")],
)
def test_sizes_are_written_for_people(size: float, text: str) -> None:
    assert describe(size) == text
