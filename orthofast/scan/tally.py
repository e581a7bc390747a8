"""What a scan has found so far, weight by weight; from it the rows of a result, whole or not, in one fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from orthofast.scan.adapters_update import BASE, DELTA, VERSIONS
from orthofast.scan.folding import fault_rows
from orthofast.scan.plan import Item, Plan, layer_order, natural
from orthofast.scan.result import Row, Skipped
from orthofast.scan.roles import ROLES

UNREACHED = "not reached: the scan was interrupted"


class Tally:
    """Rows of a plan's weights as they become known, in any order.

    Args:
        plan: what is scanned.
        copies: index of a weight -> index of an earlier one with the same bytes, which alone is folded.
    """

    def __init__(self, plan: Plan, copies: dict[int, int]) -> None:
        self._plan, self._copies = plan, copies
        self._index = {id(item): index for index, item in enumerate(plan.items)}
        self._rows: dict[int, list[Row]] = {}
        self._groups: dict[int, list[int]] = {}  # first of equal weights -> all of them
        for copy, first in copies.items():
            self._groups.setdefault(first, [first]).append(copy)
        self._sizes = [item.weight.nbytes for item in plan.items]
        self.done_bytes = 0

    @property
    def items(self) -> list[Item]:
        """All weights of the plan."""
        return self._plan.items

    @property
    def missing(self) -> list[Item]:
        """Weights that are to be folded and are not yet, in reading order."""
        items = enumerate(self._plan.items)
        return [item for index, item in items if index not in self._copies and index not in self._rows]

    def index(self, item: Item) -> int:
        """Place of a weight in the plan."""
        return self._index[id(item)]

    def add(self, item: Item, rows: Iterable[Row]) -> None:
        """The rows of a weight are known."""
        index = self.index(item)
        if index not in self._rows:
            self.done_bytes += sum(self._sizes[other] for other in self._groups.get(index, [index]))
        self._rows[index] = list(rows)

    def known(self) -> Iterator[tuple[int, list[Row]]]:
        """Place in the plan and rows of every weight that was folded."""
        yield from sorted(self._rows.items())

    def rows(self) -> list[Row]:
        """All rows, in the order of a result."""
        plan = self._plan
        version = None if plan.adapter is None else BASE
        found = [row for fault, reading in plan.faults for row in fault_rows(fault, reading, plan.sides)]
        found = [replace(row, adapter=version) for row in found]
        for fault, reading in plan.unmerged:
            found += [replace(row, adapter=DELTA) for row in fault_rows(fault, reading, plan.sides)]
        aliases: dict[str, list[str]] = {}
        for alias, stored in sorted(plan.catalog.tied.items()):
            aliases.setdefault(stored, []).append(alias)
        for index, item in enumerate(plan.items):
            first = self._copies.get(index, index)
            known = self._rows.get(first)
            if known is None:
                continue
            twins = [plan.items[other].weight.name for other in self._groups.get(first, ()) if other != index]
            others = [alias for extent in item.weight.parts.values() for alias in aliases.get(extent.name, ())]
            tied = tuple(dict.fromkeys((*twins, *others)))
            places = dict(zip(_keys(plan.items[first]), item.matrices, strict=True))
            for row in known:
                matrix = places[row.name, row.expert]
                found.append(
                    replace(
                        row,
                        name=matrix.name,
                        layer=matrix.layer,
                        role=matrix.role,
                        adapter=row.adapter or version,
                        tied=tied,
                    )
                )
        return sorted(found, key=_order)

    def skipped(self) -> list[Skipped]:
        """What was not measured and why; of a scan that was interrupted also what it did not reach."""
        listed = list(self._plan.skipped)
        unreached = [i for i in range(len(self._sizes)) if self._copies.get(i, i) not in self._rows]
        listed += [(self._plan.items[index].weight.name, UNREACHED) for index in unreached]
        return [Skipped(name, reason) for name, reason in sorted(listed, key=lambda pair: natural(pair[0]))]


def _keys(item: Item) -> list[tuple[str, int | None]]:
    return [(matrix.name, matrix.expert) for matrix in item.matrices]


def _order(row: Row) -> tuple[object, ...]:
    """Layers first, top to bottom, then what lies outside; whole matrices before their heads; the same every time."""
    role = ROLES.index(row.role) if row.role in ROLES else len(ROLES)
    inside = -1 if row.expert is None else row.expert, row.vectors != "rows", -1 if row.head is None else row.head
    version = VERSIONS.index(row.adapter)
    return row.layer is None, layer_order(row.layer or ""), role, natural(row.name), *inside, version
