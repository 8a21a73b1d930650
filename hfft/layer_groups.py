"""What a model's layer groups are, and which of their parameters a freeze covers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

from hfft.complaints import nearest
from hfft.errors import InputError

Freeze = Literal["none", "backbone"] | int | Sequence[str]
TowerFreeze = Literal["none", "backbone"] | int
"""What of one tower: nothing, all of it, or a number of groups from the input."""


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that freeze and thaw together, by their names in the model."""

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class LayerGroups:
    """The groups of a model: one list per tower, each from input to output, and the head on top.

    Attributes:
        towers: tower name to its groups. A model with one tower calls it `backbone`.
        head: what is task-specific: the classifier, or a two-tower model's projections.
        ordered: False where no order could be found; the tower is then one group.
    """

    towers: dict[str, tuple[LayerGroup, ...]]
    head: LayerGroup
    ordered: bool = True
    model_name: str = field(default="the model", compare=False)

    @property
    def depth(self) -> int:
        """The number of groups below the head, in the deepest tower."""
        return max(len(groups) for groups in self.towers.values())

    def __iter__(self) -> Iterator[LayerGroup]:
        for groups in self.towers.values():
            yield from groups
        if self.head.parameters:
            yield self.head

    def with_head(self, names: Collection[str]) -> LayerGroups:
        """Return the groups with further parameters in the head."""
        if not names:
            return self
        towers = {
            tower: tuple(
                LayerGroup(group.name, tuple(n for n in group.parameters if n not in names))
                for group in groups
            )
            for tower, groups in self.towers.items()
        }
        found = (name for group in self for name in group.parameters)
        own = {*self.head.parameters, *names}
        head = LayerGroup(self.head.name, tuple(name for name in found if name in own))
        return replace(self, towers=towers, head=head)

    def require_order(self, wanted_by: str) -> None:
        """Raise InputError where there is no order for `wanted_by` to follow."""
        if not self.ordered:
            raise InputError(
                f"{wanted_by} needs an order of layers, and none can be found in "
                f"{self.model_name}; what works: freeze: none, freeze: backbone, or a list of "
                f"parameter name patterns under stages"
            )

    def tower(self, name: str) -> tuple[LayerGroup, ...]:
        """Return the groups of a tower.

        Raises:
            InputError: the model has no such tower.
        """
        if name not in self.towers:
            raise InputError(
                f"towers.{name}: {self.model_name} has no such tower{nearest(name, self.towers)}"
            )
        return self.towers[name]

    def distance_to_head(self) -> dict[str, int]:
        """Map each parameter's name to the number of groups from its own up to the head (0)."""
        distance = dict.fromkeys(self.head.parameters, 0)
        for groups in self.towers.values():
            for steps, group in enumerate(reversed(groups), start=1):
                distance.update(dict.fromkeys(group.parameters, steps))
        return distance

    def frozen(
        self, freeze: Freeze, towers: Mapping[str, TowerFreeze] = MappingProxyType({})
    ) -> frozenset[str]:
        """Return the names of the parameters that a stage's `freeze` covers.

        A number n covers the lowest n groups of every tower. A pattern is a shell pattern over
        parameter names, module names (all that is inside) and group names.

        Args:
            freeze: of the model.
            towers: of towers in which it is another.

        Raises:
            InputError: a tower or a number of groups that there is not, or a pattern that matches
                nothing.
        """
        covered = set(self._covered(freeze))
        for name, own in towers.items():
            groups = self.tower(name)
            if isinstance(own, int):
                place = f"towers.{name}.freeze: {own}"
                self.require_order(place)
                self._check_number(place, own, len(groups), f"the groups of tower {name}")
                count = own
            else:
                count = len(groups) if own == "backbone" else 0
            covered -= _names(groups)
            covered |= _names(groups[:count])
        return frozenset(covered)

    def _covered(self, freeze: Freeze) -> Iterable[str]:
        if freeze == "none":
            return ()
        if freeze == "backbone":
            return self._lowest(self.depth)
        if isinstance(freeze, int):
            place = f"freeze: {freeze}"
            self.require_order(place)
            self._check_number(place, freeze, self.depth, "the groups below the head")
            return self._lowest(freeze)
        return (name for pattern in freeze for name in self.matching(str(pattern), "freeze: "))

    def _check_number(self, place: str, number: int, most: int, groups: str) -> None:
        if not 0 <= number <= most:
            raise InputError(
                f"{place} is not a number from 0 to {most}, {groups} of {self.model_name} "
                f"(hfft plan lists them)"
            )

    def matching(self, pattern: str, place: str = "") -> list[str]:
        """Return the names of the parameters that a pattern covers.

        Args:
            pattern: as for `frozen`.
            place: what the message of an error begins with.

        Raises:
            InputError: it matches nothing.
        """
        matches = [
            name
            for group in self
            for name in group.parameters
            if fnmatchcase(name, pattern)
            or fnmatchcase(name, f"{pattern}.*")
            or fnmatchcase(group.name, pattern)
        ]
        if not matches:
            names = {group.name for group in self} | {n for g in self for n in g.parameters}
            raise InputError(
                f"{place}the pattern {pattern!r} matches no parameter of {self.model_name}"
                f"{nearest(pattern, names) or '; hfft plan lists the groups'}"
            )
        return matches

    def _lowest(self, count: int) -> Iterator[str]:
        for groups in self.towers.values():
            yield from _names(groups[:count])


def _names(groups: Iterable[LayerGroup]) -> set[str]:
    return {name for group in groups for name in group.parameters}
