"""The registry: every table and figure of the specification, each either runnable or with the reason it is not."""

from __future__ import annotations

import re

import pytest

from orthofast.lab.absent import ABSENT
from orthofast.lab.experiment import PAPERS
from orthofast.lab.registry import ORDER, REGISTRY, ROOMS, RUNNABLE

# the specification's tables of experiments
SPECIFIED = {
    "S0": ("T1", "T2", "T3", "T4", "T5", "F1", "F2", "A1", "A2", "A3", "A4", "M1", "M2", "M3"),
    "S1": ("F1", "F2a", "F2b", "F3", "T1", "F4a", "F4b", "F5", "F6", "F6b", "F7", "X1", "X2", "X3"),
    "S2": ("F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "T1", "T1b", "T2", "X1", "X2", "X3"),
    "S3": ("T1", "F2", "T2"),
}
# what a reason may say is missing
MISSING = re.compile(r"\bneeds \w+|\bnot at hand\b|\b(no|not a) measurement\b")


@pytest.mark.parametrize("paper", SPECIFIED)
def test_every_table_and_figure_of_the_specification_has_an_entry(paper: str) -> None:
    assert {f"{paper}-{key}" for key in SPECIFIED[paper]} <= set(REGISTRY)
    assert set(SPECIFIED) == set(PAPERS)


def test_no_identifier_stands_twice() -> None:
    runnable = [one.id for room in ROOMS for one in room.EXPERIMENTS]
    absent = [one.id for one in ABSENT]
    assert len(set(runnable)) == len(runnable)
    assert len(set(absent)) == len(absent)
    assert set(runnable) & set(absent) == set()
    assert set(runnable) | set(absent) == set(REGISTRY)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("entry", ABSENT, ids=lambda one: one.id)
def test_a_reason_names_what_is_missing(entry) -> None:
    assert MISSING.search(entry.reason), f"{entry.id}: {entry.reason!r} names nothing that is missing"
    assert entry.title
    assert entry.claim.endswith(".")


def test_what_is_runnable_says_on_what() -> None:
    for entry in RUNNABLE.values():
        assert entry.title, entry.id
        assert entry.claim.endswith("."), entry.id
        assert entry.needs or not entry.size.startswith("digits"), f"{entry.id} names digits but needs none"
