"""A plan cut down to the matrices of some roles, rows to some sides."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from orthofast.errors import InputError
from orthofast.scan.plan import Plan, natural
from orthofast.scan.result import Row

REASON = "not of the selected roles"


def keep_roles(plan: Plan, roles: Collection[str]) -> Plan:
    """The same plan with the matrices of these roles only; a weight that has none is skipped with the reason.

    Raises:
        InputError: if no matrix is left.
    """
    items, skipped = [], list(plan.skipped)
    for item in plan.items:
        kept = tuple(matrix for matrix in item.matrices if matrix.role in roles)
        if kept:
            items.append(replace(item, matrices=kept))
        else:
            skipped.append((item.weight.name, REASON))
    if not items:
        there = sorted({matrix.role for item in plan.items for matrix in item.matrices})
        raise InputError(f"roles leaves no matrix to measure: there are {', '.join(there) or 'none'}")
    faults = [(fault, reading) for fault, reading in plan.faults if fault.whole_file or reading.role in roles]
    return replace(plan, items=items, skipped=sorted(skipped, key=lambda pair: natural(pair[0])), faults=faults)


def keep_sides(rows: Iterable[Row], sides: Mapping[str, Collection[str]]) -> list[Row]:
    """Rows of the sides that each role names; what failed stays."""
    return [row for row in rows if row.error is not None or row.vectors in sides.get(row.role or "", ())]
