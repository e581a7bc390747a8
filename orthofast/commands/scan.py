"""``orthofast scan``: measure every matrix of a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from orthofast.commands.amounts import memory_bytes, role_names
from orthofast.commands.exits import INTERRUPTED, exit_codes, say
from orthofast.commands.outputs import check_folder, check_targets, conclude, write
from orthofast.commands.terminal import print_result, progress_bar, seconds
from orthofast.errors import InputError
from orthofast.kernels import Sample
from orthofast.scan.adapters import open_adapter, with_adapter
from orthofast.scan.forecast import OFFER_PAIRS, forecast
from orthofast.scan.journal import discard
from orthofast.scan.options import ScanOptions
from orthofast.scan.plan import Plan, layer_numbers, make_plan
from orthofast.scan.presets import preset as choices
from orthofast.scan.provenance import Interrupted, measure
from orthofast.scan.ranks import launched, local_device, team_from_environment
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.result import ScanResult
from orthofast.scan.selection import keep_roles, keep_sides

JOURNAL_SUFFIX = ".journal"
LONG_FLOPS = 1e13  # of a scan for which a forecast is made: minutes on a processor
DRAWN = (".html", ".png", ".svg")  # forms with histograms in them
CHECKPOINT_HELP = "A file, an index, a folder, or ORG/NAME on the Hugging Face hub."

Checkpoint = Annotated[str, typer.Argument(help=CHECKPOINT_HELP)]
Include = Annotated[list[str] | None, typer.Option(help="Measure only names matching GLOB. Repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave out names matching GLOB. Repeatable.")]
Roles = Annotated[list[str] | None, typer.Option(help="Measure only these roles, such as query,keys. Repeatable.")]
Layers = Annotated[str | None, typer.Option(help="Measure only these layers, such as 0-3,7 or decoder.0.")]
Vectors = Annotated[str, typer.Option("--vectors", "--axis", help="rows, cols or both.")]
Precision = Annotated[str, typer.Option(help="auto, highest, high or float64.")]
Backend = Annotated[str | None, typer.Option(help="Use this backend or refuse; see 'orthofast doctor'.")]
Device = Annotated[str | None, typer.Option(help="Where the folds run, such as cuda or cuda:1; the processor if left.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print no tables, only errors.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Show no progress bar.")]


def scan(
    checkpoint: Checkpoint,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "-o", "--output", help="Also write FILE (.json, .csv, .parquet, .md, .html, .png, .svg). Repeatable."
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A LoRA adapter of this base: folder or ORG/NAME; measures base, merged and delta."),
    ] = None,
    vectors: Vectors = "both",
    heads: Annotated[bool, typer.Option("--heads", help="Also measure each attention head by itself.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    roles: Roles = None,
    layers: Layers = None,
    preset: Annotated[
        str | None, typer.Option(help="'paper': the layers and sides of Lu et al. 2024, Table 5.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(help="Estimate each PII from about N random pairs, with its standard error.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which pairs --sample draws.")] = 0,
    detail: Annotated[
        bool | None,
        typer.Option(
            "--detail/--no-detail",
            help="Also the largest cosine with its pair, and a histogram.",
            show_default="for .html",
        ),
    ] = None,
    device: Device = None,
    host_mem: Annotated[str, typer.Option(help="Memory for weights that are read, such as 4GiB.")] = "1GiB",
    gpu_mem: Annotated[str | None, typer.Option(help="Memory of the GPU to use, such as 20GiB.")] = None,
    engine: Annotated[str, typer.Option(help="How files are read: positional or fastsafetensors.")] = "positional",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier scan ended.")] = False,
    journal: Annotated[
        Path | None, typer.Option(help="Keep finished weights in FILE.", show_default="beside the first -o FILE")
    ] = None,
    precision: Precision = "auto",
    backend: Backend = None,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
    long: Annotated[bool, typer.Option("--long", help="One line per matrix and side.")] = False,
) -> None:
    """Measure every matrix of a checkpoint, rows and columns, beside the isotropic baseline.

    Ctrl-C writes what is known and exits with 130; --resume goes on from there.

    Exit codes: 0 all measured, 2 unreadable input or wrong usage, 3 finished but some tensors failed, 4 an optional
    package is missing, 130 interrupted.
    """
    with exit_codes():
        targets = [] if _follows() else output or []
        check_targets(targets)
        wanted = role_names(roles)
        selected = layer_numbers(layers) if layers else None
        kept = _journal(journal, output or [], resume)
        drawn = any(target.suffix.lower() in DRAWN for target in output or [])
        options = ScanOptions(
            detail=drawn if detail is None else detail,
            host_mem=memory_bytes(host_mem, "--host-mem"),
            gpu_mem=None if gpu_mem is None else memory_bytes(gpu_mem, "--gpu-mem"),
            engine=engine,
            journal=kept,
            resume=resume,
        )
        catalog = open_checkpoint(checkpoint)
        chosen = None if preset is None else choices(preset, catalog.config)
        if chosen is not None and selected is None:
            selected = chosen.layers
        plan = make_plan(catalog, include=include, exclude=exclude, vectors=vectors, layers=selected)
        if adapter is not None:
            plan = with_adapter(plan, open_adapter(adapter))
        if chosen is not None:
            plan = keep_roles(plan, chosen.sides)
        if wanted is not None:
            plan = keep_roles(plan, wanted)
        if sample is None and not quiet and not _follows():
            _offer_sample(plan, heads=heads, device=device, precision=precision, backend=backend, options=options)
        try:
            result = run(
                plan,
                show=not (quiet or no_progress or _follows()),
                heads=heads,
                sample=None if sample is None else Sample(sample, seed),
                device=device,
                precision=precision,
                backend=backend,
                options=options,
            )
            interrupted = False
        except Interrupted as stopped:
            result, interrupted = stopped.result, True
        if chosen is not None:
            result.rows = keep_sides(result.rows, chosen.sides)
            result.provenance["preset"] = preset
        if interrupted:
            _keep_partial(result, targets, kept, quiet, json_)
            raise typer.Exit(INTERRUPTED)
        write(result, targets, quiet)
        if kept is not None and journal is None and not _follows():
            discard(kept)  # the files hold all of it
        conclude(result, json_ and not _follows(), quiet or _follows(), long)


def run(
    plan: Plan,
    *,
    show: bool,
    heads: bool = False,
    sample: Sample | None = None,
    device: str | None = None,
    precision: str = "auto",
    backend: str | None = None,
    options: ScanOptions | None = None,
) -> ScanResult:
    """Measure a plan with a progress bar, with the other ranks of a launch if there are any.

    What is known to be wrong is said before the first read.
    """
    known = [f"note: {note}" for note in plan.catalog.notes]
    known += dict.fromkeys(fault.error for fault, _ in (*plan.faults, *plan.unmerged))
    for sentence in known if not _follows() else ():
        say(f"orthofast: {sentence}")
    with progress_bar(plan.nbytes, show) as progress:
        result = measure(
            plan,
            precision=precision,
            backend=backend,
            heads=heads,
            sample=sample,
            device=None if device is None else local_device(device),
            options=options,
            progress=progress,
            team=team_from_environment(),
        )
    notes = result.provenance["notes"]
    for note in notes[len(plan.catalog.notes) :] if isinstance(notes, list) and not _follows() else ():
        say(f"orthofast: {note}")  # found while reading
    return result


def _offer_sample(plan: Plan, *, device: str | None, **settings: Any) -> None:
    """Say what an exact scan would take, where that is long and an estimate much shorter."""
    matrices = [matrix for item in plan.items for matrix in item.matrices]
    if sum(m.out * m.inward * (m.out + m.inward) for m in matrices) < LONG_FLOPS:
        return
    cost = forecast(plan, device=None if device is None else local_device(device), **settings)
    if cost.worth_sampling:
        say(
            f"orthofast: an exact scan takes about {seconds(cost.seconds)} here; --sample {OFFER_PAIRS} about "
            f"{seconds(cost.sampled_s)}, with a standard error"
        )


def _follows() -> bool:
    """Whether another process of the same launch prints and writes."""
    return launched() and os.environ["RANK"] != "0"


def _journal(given: Path | None, outputs: Sequence[Path], resume: bool) -> Path | None:
    """Where finished weights are taken down: the file named, or one beside the first output."""
    if given is None and not outputs:
        if resume:
            raise InputError("--resume needs the -o FILE or the --journal FILE of the scan that ended early")
        return None
    kept = given or outputs[0].with_name(outputs[0].name + JOURNAL_SUFFIX)
    check_folder(kept)
    if kept.exists() and not resume:
        raise InputError(
            f"{kept} is there: an earlier scan did not finish; go on with it by --resume, or remove the file"
        )
    return kept


def _keep_partial(
    result: ScanResult, targets: Sequence[Path], journal: Path | None, quiet: bool, as_json: bool
) -> None:
    """What is known when the user stops a scan: to the files, as JSON if asked for, else to the terminal."""
    if _follows():
        return
    result.provenance["interrupted"] = True
    write(result, targets, quiet)
    if as_json:
        sys.stdout.write(result.to_json())
    elif not targets and not quiet:
        print_result(result, False)
    weights = result.provenance.get("weights")
    missing = weights["missing"] if isinstance(weights, dict) else "some"
    go_on = f"; go on with --resume, which uses {journal}" if journal is not None else ""
    say(f"orthofast: interrupted, {missing} weights were not reached{go_on}")
