"""Which tensors are penalised, and which configs say so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hfft.errors import InputError
from hfft.layers import find_layer_groups
from hfft.penalties import Penalty, WeightPenalty, register
from hfft.penalties import penalty as registry
from hfft.penalties.coverage import Coverage, find_coverage, new_parameters
from hfft.penalties.penalty import get, kinds, make_penalty
from hfft.sections import PenaltyConfig

from ..families import bert


def coverage(
    strength: Any = 0.1, kind: str = "l2_sp", freeze: Any = "none", **options: Any
) -> Coverage:
    model = bert()
    groups = find_layer_groups(model)
    frozen = groups.frozen(freeze)
    penalty = make_penalty(PenaltyConfig(kind=kind, strength=strength, **options))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in frozen}
    return find_coverage(penalty, strength, shapes, groups.head.parameters, lambda: groups)


def test_what_is_frozen_or_new_is_not_penalised() -> None:
    found = coverage(freeze=2)
    assert found.to_source
    assert not [name for name in found.to_source if ".0." in name or "classifier" in name]
    assert not found.to_zero


def test_the_new_head_has_a_strength_of_its_own() -> None:
    found = coverage(head_strength=0.3)
    assert found.to_zero == {"classifier.weight": 0.3, "classifier.bias": 0.3}


def test_the_first_pattern_that_matches_counts_and_what_none_matches_is_left_out() -> None:
    found = coverage({"*layer.0": 0.5, "*layer.0.output*": 9.0, "*layer.1": 0.2})
    strengths = dict(found.to_source)
    assert {value for name, value in strengths.items() if "layer.0." in name} == {0.5}
    assert {value for name, value in strengths.items() if "layer.1." in name} == {0.2}
    assert not [name for name in strengths if "layer.2." in name or "embeddings" in name]


def test_orthogonal_covers_matrices_only() -> None:
    found = coverage(kind="orthogonal")
    assert all(name.endswith("weight") and "LayerNorm" not in name for name in found.to_source)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strength": {"*layr.0": 0.1}}, "strength: the pattern '*layr.0' matches no parameter"),
        ({"freeze": "backbone"}, "kind: nothing that l2_sp covers learns here"),
        ({"strength": {"*layer.0": 0.1}, "freeze": 2}, "kind: nothing that l2_sp covers learns"),
    ],
)
def test_a_penalty_of_nothing_is_an_error(arguments: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        coverage(**arguments)
    assert said in str(caught.value)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(InputError, match="no penalty 'l2sp'; did you mean 'l2_sp'"):
        get("l2sp")


def test_a_mode_that_a_kind_has_not_is_an_error() -> None:
    with pytest.raises(InputError, match="mode: spd has no decoupled form"):
        make_penalty(PenaltyConfig(kind="spd", strength=1.0, mode="decoupled"))


def test_an_unknown_option_of_a_kind_is_named() -> None:
    with pytest.raises(InputError, match="head_strenth: unknown key; did you mean 'head_strength'"):
        make_penalty(PenaltyConfig(kind="l2_sp", strength=1.0, head_strenth=1.0))  # type: ignore[call-arg]


@pytest.fixture
def _restored() -> Iterator[None]:
    before = dict(registry._kinds)
    yield
    registry._kinds.clear()
    registry._kinds.update(before)


@pytest.mark.usefixtures("_restored")
def test_anybody_can_register_a_kind_and_nobody_can_take_one() -> None:
    @register("lasso")
    class Lasso(WeightPenalty):
        """The sum of absolute differences."""

        def value_and_gradient(self, theta, source):  # type: ignore[no-untyped-def]
            differences = [t - s for t, s in zip(theta, source, strict=True)]
            return sum(d.abs().sum() for d in differences), [d.sign() for d in differences]

    assert "lasso" in kinds()
    assert coverage(kind="lasso").to_source
    with pytest.raises(ValueError, match="there is a penalty 'l2_sp' already"):

        @register("l2_sp")
        class Other(Penalty):
            """Not this one."""

    with pytest.raises(ValueError, match="is no name"):
        register("l2 sp")(Lasso)


def test_what_the_source_did_not_bring_is_new(tmp_path: Any) -> None:
    import transformers

    model = bert()
    assert new_parameters(model) == frozenset()  # made here: it is its own source
    model.bert.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert new_parameters(loaded) == {"classifier.weight", "classifier.bias"}
    assert new_parameters(torch.nn.Linear(2, 2)) == frozenset()


@pytest.mark.usefixtures("_restored")
def test_kinds_of_other_packages_are_found_and_a_broken_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Entry:
        name, value, dist = "lasso", "theirs.lasso", None

        def load(self) -> None:
            register("lasso")(type("Lasso", (WeightPenalty,), {}))

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])
    assert get("lasso").kind == "lasso"

    class Broken(Entry):
        name = "ridge"

        def load(self) -> None:
            raise ImportError("no module named theirs")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken()])
    with pytest.raises(InputError, match="'ridge', which can't be loaded: no module named theirs"):
        get("ridge")
