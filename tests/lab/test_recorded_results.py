"""The recorded runs of docs/results: complete, judged as when they were recorded, turned by changed numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from docs import recorded
from docs.recorded import ABSOLUTE, Judged, Record, expected, judge, records
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED

ROOT = Path(__file__).parents[2]
RECORDS = records()
LARGEST = 600_000  # bytes

every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda one: one.key)


def numbers(value: Any, change: Callable[[float], Any]) -> Any:
    """The same with every number changed."""
    if isinstance(value, dict):
        return {key: numbers(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [numbers(one, change) for one in value]
    return change(value) if isinstance(value, float | int) and not isinstance(value, bool) else value


CHANGES: tuple[Callable[[Any], Any], ...] = (
    lambda raws: numbers(raws, lambda number: -number),
    lambda raws: numbers(raws, lambda number: type(number)(1)),
    lambda raws: numbers(raws, lambda number: number * 1000),
    lambda raws: json.loads(json.dumps(raws), object_pairs_hook=lambda pairs: turned(dict(pairs))),
)


def turned(held: dict[str, Any]) -> dict[str, Any]:
    """Every list of numbers the other way round: what rose falls."""
    return {
        key: value[::-1] if isinstance(value, list) and all(isinstance(one, float | int) for one in value) else value
        for key, value in held.items()
    }


def judged(one: Judged, change: Callable[[Any], Any]) -> str:
    """The verdict on changed numbers; an error stops the manual, which names the experiment."""
    try:
        return one.experiment.verdict(change(one.run.raws)).status
    except (TypeError, ValueError, ZeroDivisionError, KeyError, IndexError):
        return "an error"


def test_digits_are_recorded_first() -> None:
    assert [record.key for record in RECORDS][:1] == ["digits"]


@every_record
def test_every_experiment_that_runs_on_the_data_is_recorded(record: Record) -> None:
    assert sorted(record.runs) == sorted(one.id for one in expected(record.data)), (
        "record a new run: python -m docs.recorded FOLDER FILE"
    )


@every_record
def test_verdicts_from_the_rounded_numbers_are_those_recorded(record: Record) -> None:
    found = judge(record)
    assert {key: one.verdict.status for key, one in found.items()} == {
        key: run.status for key, run in record.runs.items()
    }
    assert {run.status for run in record.runs.values()} <= {REPRODUCED, NOT_REPRODUCED}


@every_record
def test_statistical_claims_have_the_same_seeds_and_numbers_for_each(record: Record) -> None:
    seeds = {tuple(run.seeds) for key, run in record.runs.items() if recorded.RUNNABLE[key].statistical}
    assert len(seeds) == 1
    if record.whole:
        assert len(seeds.pop()) >= 3
    assert all(len(run.raws) == len(run.seeds) for run in record.runs.values())


@every_record
def test_the_file_is_small_and_names_no_machine(record: Record) -> None:
    file = recorded.RESULTS / f"lab-{record.key}.json"
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    assert recorded.text_of(record) == text
    assert not re.search(r"NaN|Infinity", text)
    assert ABSOLUTE.search(text) is None
    assert re.fullmatch(r"[0-9a-f]{7,40}", record.about["commit"])


@every_record
def test_changed_numbers_turn_every_claim_that_is_reproduced(record: Record) -> None:
    """Other signs, all alike, a thousandfold, lists the other way round: one of them at least is noticed."""
    for key, one in judge(record).items():
        if one.verdict.status == REPRODUCED:
            assert NOT_REPRODUCED in {judged(one, change) for change in CHANGES}, key


@every_record
def test_missing_numbers_reproduce_nothing(record: Record) -> None:
    for key, one in judge(record).items():
        assert judged(one, lambda raws: numbers(raws, lambda number: None)) != REPRODUCED, key


@pytest.mark.parametrize("page", ["README.md", "docs/lab.md"])
def test_the_pages_count_what_is_recorded(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    body = render.lab_pages(RECORDS)[page]
    assert render.between(text, body, page, render.LAB_BEGIN, render.LAB_END) == text, "run python -m benchmarks.render"
