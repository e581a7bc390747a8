"""``orthofast check``: a gate for continuous integration on the result of a scan."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from orthofast.commands.exits import GATE_FAILED, PARTIAL, exit_codes, say
from orthofast.commands.terminal import line
from orthofast.errors import InputError
from orthofast.scan.document import finite
from orthofast.scan.gate import Verdict, Violation, judge, parse_condition
from orthofast.scan.result import ScanResult
from orthofast.scan.tables import percent, printable

FORMATS = ("human", "json", "github")
SHOWN = 20  # violations of one condition that are listed


def check(
    result: Annotated[Path, typer.Argument(help="The .json file of a scan.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", help='Fail where this holds, such as "role=Query: pii > 0.1". Repeatable.'),
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="The .json file of an older scan.")] = None,
    max_delta: Annotated[
        str | None, typer.Option(help="Fail where PII changed by more than this, such as 10%, or a matrix is gone.")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="human, json or github.")] = "human",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Exit with 0 though some tensors failed or were not reached.")
    ] = False,
) -> None:
    """Hold a result against conditions; exit with 1 and say what failed.

    A condition is [FIELD=GLOB,...:] MEASURE SIGN BOUND. Fields: role, layer, name, vectors, head, expert, adapter.
    Measures: pii, ratio, max_abs, zero, nonfinite, standard_error, drift, relative_change, failed, and with --baseline
    change. mean(...), min(...), max(...), count(...) judge all selected matrices together.

    Exit codes: 0 passed, 1 failed, 2 unreadable result or condition, 3 passed, but the result is of a scan in which
    tensors failed or which was interrupted.
    """
    with exit_codes():
        if format_ not in FORMATS:
            raise InputError(f"--format needs one of {', '.join(FORMATS)}, got {format_!r}")
        conditions = [parse_condition(text) for text in fail_if or ()]
        limit = None if max_delta is None else _fraction(max_delta)
        found = ScanResult.load(result)
        old = None if baseline is None else ScanResult.load(baseline)
        verdicts = judge(found, conditions, old, limit)
        passed = all(verdict.passed for verdict in verdicts)
        incomplete = _incomplete(found)
        if format_ == "json":
            document = {
                "schema_version": 1,
                "passed": passed,
                "complete": not incomplete,
                "checks": [finite(verdict.to_dict()) for verdict in verdicts],
            }
            sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        elif format_ == "github":
            _print_github(verdicts, incomplete)
        else:
            _print_human(verdicts)
        if incomplete and format_ != "github":
            say(f"orthofast: {incomplete}")
        if not passed:
            raise typer.Exit(GATE_FAILED)
        if incomplete and not allow_partial:
            raise typer.Exit(PARTIAL)


def _fraction(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"--max-delta needs a share such as 10% or 0.1, got {text!r}")
    return value


def _incomplete(result: ScanResult) -> str:
    """Why not all of the checkpoint was judged; empty where it was."""
    failed = len({row.name for row in result.failed})
    if result.provenance.get("interrupted"):
        return "the scan was interrupted: what it did not reach was not judged"
    return f"tensors that the scan could not measure, and that were not judged: {failed}" if failed else ""


def _print_human(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        text = verdict.condition.text
        if verdict.passed:
            line(f"passed  none of {verdict.rows} values: {text}", style="green")
            continue
        count = f"{len(verdict.violations)} of {verdict.rows} values"
        line(f"FAILED  {verdict.condition.summary or count}: {text}", style="bold red")
        for violation in verdict.violations[:SHOWN]:
            line(f"        {_described(violation, verdict)}")
        if len(verdict.violations) > SHOWN:
            line(f"        and {len(verdict.violations) - SHOWN} more")


def _print_github(verdicts: Sequence[Verdict], incomplete: str) -> None:
    """Annotations of a workflow run, one for each violation."""
    for verdict in verdicts:
        for violation in verdict.violations[:SHOWN]:
            message = f"{verdict.condition.text}: {_described(violation, verdict)}"
            sys.stdout.write(f"::error title=orthofast check::{_escaped(message)}\n")
        if len(verdict.violations) > SHOWN:
            more = f"{verdict.condition.text}: and {len(verdict.violations) - SHOWN} more"
            sys.stdout.write(f"::error title=orthofast check::{_escaped(more)}\n")
        if verdict.passed:
            sys.stdout.write(f"::notice title=orthofast check::{_escaped(f'passed: {verdict.condition.text}')}\n")
    if incomplete:
        sys.stdout.write(f"::warning title=orthofast check::{_escaped(incomplete)}\n")


def _described(violation: Violation, verdict: Verdict) -> str:
    changed = verdict.condition.measure == "change"
    if changed and violation.value != violation.value:
        value = "gone or not measured"
    else:
        value = percent(violation.value) if changed else f"{violation.value:.6g}"
    inside = "" if violation.head is None else f" head {violation.head}"
    return printable(" ".join(filter(None, (violation.name + inside, violation.vectors, value))))


def _escaped(text: str) -> str:
    """What would end or steer a workflow command becomes its code."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
