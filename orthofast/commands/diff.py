"""``orthofast diff``: two checkpoints or two results side by side."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orthofast.commands.amounts import role_names
from orthofast.commands.exits import PARTIAL, exit_codes, say
from orthofast.commands.outputs import check_folder
from orthofast.commands.scan import (
    CHECKPOINT_HELP,
    Backend,
    Device,
    Exclude,
    Include,
    Layers,
    NoProgress,
    Precision,
    Quiet,
    Roles,
    Vectors,
    run,
)
from orthofast.commands.terminal import line, print_lines, progress_bar, small
from orthofast.scan.comparison import Comparison, compare, comparison_form
from orthofast.scan.diffing import compare_checkpoints
from orthofast.scan.plan import Plan, layer_numbers, make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.result import ScanResult
from orthofast.scan.selection import keep_roles
from orthofast.scan.tables import number, percent

LISTED = 20  # names of one kind
HELP = f"The .json file of a scan, or a checkpoint. {CHECKPOINT_HELP}"


def diff(
    before: Annotated[str, typer.Argument(help=HELP)],
    after: Annotated[str, typer.Argument(help="The same, later.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON instead of tables.")] = False,
    output: Annotated[
        list[Path] | None, typer.Option("-o", "--output", help="Also write FILE (.json, .csv, .md, .html). Repeatable.")
    ] = None,
    vectors: Vectors = "both",
    drift: Annotated[
        bool, typer.Option("--drift/--no-drift", help="Of two checkpoints: how far the angles moved, pair by pair.")
    ] = True,
    include: Include = None,
    exclude: Exclude = None,
    roles: Roles = None,
    layers: Layers = None,
    device: Device = None,
    precision: Precision = "auto",
    backend: Backend = None,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
    long: Annotated[bool, typer.Option("--long", help="One line per matrix and side.")] = False,
) -> None:
    """Compare two results, or two checkpoints: PII before and after by role, what changed, what is on one side only.

    Of two checkpoints also the drift of the angles and the size of the weights' change; a result against a checkpoint
    is compared by PII alone. Exit codes: 0 compared, 2 unreadable input or wrong usage, 3 some tensors failed.
    """
    with exit_codes():
        targets = output or []
        for target in targets:
            comparison_form(target)
            check_folder(target)
        wanted = role_names(roles)
        selected = layer_numbers(layers) if layers else None

        def plan_of(checkpoint: str) -> Plan:
            plan = make_plan(
                open_checkpoint(checkpoint), include=include, exclude=exclude, vectors=vectors, layers=selected
            )
            return plan if wanted is None else keep_roles(plan, wanted)

        show = not (quiet or no_progress)
        quietly = partial(run, show=False, device=device, precision=precision, backend=backend)
        if _is_result(before) or _is_result(after):
            first, second = (
                ScanResult.load(source)
                if _is_result(source)
                else run(plan_of(source), show=show, device=device, precision=precision, backend=backend)
                for source in (before, after)
            )
            comparison = compare(first, second)
        else:
            plans = plan_of(before), plan_of(after)
            with progress_bar(sum(plan.nbytes for plan in plans), show) as progress:
                comparison = compare_checkpoints(
                    *plans,
                    quietly,
                    drift=drift,
                    progress=progress,
                    device=device,
                    precision=precision,
                    backend=backend,
                )
        for target in targets:
            comparison.write(target)
            if not quiet:
                say(f"wrote {target}")
        if json_:
            sys.stdout.write(comparison.to_json())
        elif not quiet:
            _print(comparison, long)
        failed = [change for change in comparison.changes if change.status == "failed"]
        if failed:
            sentences = list(dict.fromkeys(f"  {change.name}: {change.note}" for change in failed))
            say(f"orthofast: {len(sentences)} tensors failed on one side or both")
            for sentence in sentences[:LISTED]:
                say(sentence)
            raise typer.Exit(PARTIAL)


def _is_result(source: str) -> bool:
    """An index of shards is a checkpoint, every other .json file a result."""
    return source.endswith(".json") and not source.endswith(".index.json")


def _print(comparison: Comparison, long: bool) -> None:
    measured = [change for change in comparison.changes if change.status in ("changed", "equal")]
    with_drift = any(change.drift is not None for change in measured)
    with_size = any(change.relative_change is not None for change in measured)
    extra = (["drift"] if with_drift else []) + (["|dW|/|W|"] if with_size else [])

    def tail(found: object) -> list[str]:
        values = [("drift", with_drift), ("relative_change", with_size)]
        return [small(getattr(found, name)) for name, there in values if there]

    if long:
        heads = ["name", "layer", "role", "vectors", "status", "before", "after", "change", *extra]
        rows = [
            [
                c.name,
                c.layer or "",
                c.role or "",
                c.vectors,
                c.status,
                number(c.before),
                number(c.after),
                percent(c.relative),
                *tail(c),
            ]
            for c in comparison.changes
            if c.head is None
        ]
        print_lines("every matrix", heads, rows)
    else:
        heads = ["role", "vectors", "matrices", "before", "after", "change", "smallest", "largest", *extra]
        rows = [
            [
                role,
                side,
                str(s.count),
                number(s.before),
                number(s.after),
                percent(s.mean),
                percent(s.least),
                percent(s.most),
                *tail(s),
            ]
            for (side, role), s in comparison.by_role().items()
        ]
        if rows:
            print_lines("PII by role", heads, rows)
        rows = [
            [
                layer,
                side,
                str(s.count),
                number(s.before),
                number(s.after),
                percent(s.mean),
                percent(s.least),
                percent(s.most),
                *tail(s),
            ]
            for (side, layer), s in comparison.by_layer().items()
        ]
        if rows:
            print_lines("PII by layer", ["layer", *heads[1:]], rows)
        most = comparison.most_changed(LISTED)
        if most:
            rows = [[c.name, c.vectors, number(c.before), number(c.after), percent(c.relative), *tail(c)] for c in most]
            print_lines("changed most", ["name", "vectors", "before", "after", "change", *extra], rows)
    for status, title in (("missing", "only before"), ("added", "only after"), ("reshaped", "other sizes")):
        names = comparison.names(status)
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            line(f"{title}: {', '.join(names[:LISTED])}{more}")
    line(", ".join(f"{count} {status}" for status, count in comparison.counts().items()) or "nothing to compare")
