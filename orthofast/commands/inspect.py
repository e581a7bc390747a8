"""``orthofast inspect``: what a checkpoint holds and what a scan would cost, from the headers alone."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from orthofast.commands.amounts import role_names
from orthofast.commands.exits import PARTIAL, exit_codes, say
from orthofast.commands.scan import Checkpoint, Exclude, Include, Layers, Roles, Vectors
from orthofast.commands.terminal import line, print_lines, seconds, size
from orthofast.scan.forecast import OFFER_PAIRS, Forecast, forecast
from orthofast.scan.inspection import SHAPES, Inspection, inspect_plan
from orthofast.scan.plan import Plan, layer_numbers, make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.selection import keep_roles

LISTED = 40  # lines of unmapped and skipped names without --long


def inspect(
    checkpoint: Checkpoint,
    json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    vectors: Vectors = "both",
    include: Include = None,
    exclude: Exclude = None,
    roles: Roles = None,
    layers: Layers = None,
    cost: Annotated[
        bool,
        typer.Option("--forecast/--no-forecast", help="Try reads and folds for a moment to say what a scan costs."),
    ] = True,
    long: Annotated[bool, typer.Option("--long", help="One line per matrix.")] = False,
) -> None:
    """Show roles, shapes, stored types, what no rule describes, what would be skipped, and what a scan would cost.

    Headers are read, and for the forecast a few places of the files; --no-forecast reads headers alone.

    Exit codes: 0 all can be read, 2 unreadable input or wrong usage, 3 some tensors cannot be read.
    """
    with exit_codes():
        wanted = role_names(roles)
        catalog = open_checkpoint(checkpoint, headers_only=True)
        selected = layer_numbers(layers) if layers else None
        plan = make_plan(catalog, include=include, exclude=exclude, vectors=vectors, layers=selected)
        if wanted is not None:
            plan = keep_roles(plan, wanted)
        found = inspect_plan(plan)
        estimate = forecast(plan) if cost else None
        found.forecast = estimate.to_dict() if estimate is not None else {}
        if json_:
            sys.stdout.write(found.to_json())
        else:
            _print(found, plan, long)
            if estimate is not None:
                _print_cost(estimate)
        for name, error in found.failed:
            say(f"orthofast: {error}" if name in error else f"orthofast: {name}: {error}")
        if found.failed:
            raise typer.Exit(PARTIAL)


def _print(found: Inspection, plan: Plan, long: bool) -> None:
    kind = ", ".join(filter(None, (found.format, found.model_type, found.quantization)))
    files = f"{len(found.files)} file{'s' if len(found.files) != 1 else ''} of {size(sum(found.files.values()))}"
    line(f"{found.checkpoint} ({kind}): {files}, {len(found.layers)} layers, {size(found.nbytes)} to read", "bold")
    for note in found.notes:
        line(f"note: {note}")
    line("")
    if long:
        heads = ["name", "layer", "role", "out", "in", "dtype"]
        rows = [
            [m.name, m.layer or "", m.role, str(m.out), str(m.inward), item.weight.first.dtype]
            for item in plan.items
            for m in item.matrices
        ]
        print_lines("matrices", heads, rows)
    else:
        heads = ["role", "matrices", "layers", "experts", "heads", "shapes", "dtype"]
        rows = [
            [
                role.role,
                str(role.matrices),
                str(role.layers or ""),
                str(role.experts or ""),
                str(role.heads or ""),
                _shapes(role.shapes),
                ", ".join(role.dtypes),
            ]
            for role in found.roles
        ]
        print_lines("roles; shapes as (out, in)", heads, rows)
    if found.unmapped:
        rows = [[name, f"{shape[0]}x{shape[1]}", str(count)] for name, shape, count in found.unmapped]
        print_lines(
            "role Other: measured, but in no column of the table", ["name", "shapes", "matrices"], _some(rows, long)
        )
    if found.tied:
        line(f"tied: {', '.join(f'{name} is {stored}' for name, stored in found.tied.items())}")
    if found.skipped:
        rows = [[name, str(count), reason] for name, reason, count in found.skipped]
        print_lines("would be skipped", ["name", "tensors", "reason"], _some(rows, long))


def _print_cost(cost: Forecast) -> None:
    parts = [("reading", cost.read_s), ("decoding", cost.decode_s), ("folding", cost.fold_s)]
    named = ", ".join(f"{name} {seconds(spent)}" for name, spent in parts if spent)
    line(f"a scan here: about {seconds(cost.seconds)} ({named}), {size(cost.host_bytes)} of memory for weights")
    if cost.worth_sampling:
        line(f"an estimate by --sample {OFFER_PAIRS}: about {seconds(cost.sampled_s)}")


def _some(rows: list[list[str]], long: bool) -> list[list[str]]:
    if long or len(rows) <= LISTED:
        return rows
    return [*rows[:LISTED], [f"and {len(rows) - LISTED} more lines, shown by --long", "", ""]]


def _shapes(shapes: dict[tuple[int, int], int]) -> str:
    named = [f"{out}x{inward}" + (f" ({count})" if len(shapes) > 1 else "") for (out, inward), count in shapes.items()]
    return ", ".join(named[:SHAPES]) + (f" and {len(named) - SHAPES} more" if len(named) > SHAPES else "")
