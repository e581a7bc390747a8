"""Records of a group's requests: a field is cut out of the results when it is read; unread ones cost nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orthofast.kernels.contract import ABS_MAX, ABS_SUM, SQ_SUM, SUM
from orthofast.kernels.triton_launch import Results
from orthofast.kernels.triton_plan import Group
from orthofast.records import GramStats

COUNTS = {"pairs": 0, "zero": 1, "nonfinite": 2}  # rows of the table of counts
SUMS = {"abs_sum": (0, ABS_SUM), "sq_sum": (1, SQ_SUM), "sum": (2, SUM), "abs_max": (3, ABS_MAX)}
FLOOR = 4  # row of the table of sums
FIELDS = frozenset(GramStats.__slots__)


class GroupRecord(GramStats):
    """The record of one request; its fields are views of the group's results."""

    __slots__ = ("_group", "_made", "_place")
    _group: Group
    _made: Results
    _place: int

    @classmethod
    def cut(cls, group: Group, made: Results, place: int) -> GroupRecord:
        """The record of the group's request in this place; its slots are filled when they are read."""
        record = cls.__new__(cls)
        record._group, record._made, record._place = group, made, place
        record.cross = group.method.cross
        return record

    def __getattr__(self, name: str) -> Tensor | None:
        if name not in FIELDS:
            raise AttributeError(f"GramStats has no field {name!r}")
        value = _field(self._group, self._made, self._place, name)
        setattr(self, name, value)  # the empty slot asks only once
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return GramStats, tuple(getattr(self, name) for name in GramStats.__slots__)


def _field(group: Group, made: Results, place: int, name: str) -> Tensor | None:
    method = group.method
    begin, count = group.first_problem[place], group.items[place]
    if name in COUNTS:
        return made.counts[COUNTS[name]].narrow(0, begin, count)
    if name in SUMS:
        row, bit = SUMS[name]
        return made.sums[row].narrow(0, begin, count) if method.want & bit else None
    if name == "floor":
        return made.sums[FLOOR].narrow(0, begin, count) if method.decides else None
    if name == "argmax":
        return made.counts[3:5].T.narrow(0, begin, count) if method.want & ABS_MAX else None
    if name == "hist":
        return None if made.hist is None else made.hist.narrow(0, begin, count)
    if name == "standard_error":
        return None
    if name.endswith("_y") and not method.cross:
        return None
    whole = made.norm_sq if name.startswith("norm_sq") else made.row_abs
    if whole is None:
        return None
    end = (2 * place + name.endswith("_y")) if method.cross else place
    vectors = group.vector_counts[end]
    return whole.narrow(0, group.first_vector[end], vectors).view(count, vectors // count)
