"""The files a command writes: refused before the work where they would fail after it, written whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from orthofast.commands.exits import PARTIAL, say
from orthofast.commands.terminal import print_result
from orthofast.errors import InputError
from orthofast.scan.result import ScanResult, form_of

NAMED = 20  # failures that are listed on stderr


def check_targets(targets: Sequence[Path]) -> None:
    """Refuse a suffix, a missing package or a missing folder before a long scan."""
    for target in targets:
        form_of(target)
        check_folder(target)


def check_folder(target: Path) -> None:
    """Refuse a file whose folder is not there."""
    if not target.parent.is_dir():
        raise InputError(f"the folder of {target} does not exist; make it first")


def conclude(result: ScanResult, as_json: bool, quiet: bool, long: bool) -> None:
    """Print the result, and tell failures by the exit code.

    Raises:
        typer.Exit: with code 3 where some tensor failed.
    """
    if as_json:
        sys.stdout.write(result.to_json())
        sys.stdout.flush()
    elif not quiet:
        print_result(result, long)
    if result.failed:
        failed = list(dict.fromkeys(f"{row.name}: {row.error}" for row in result.failed))
        say(f"orthofast: the other tensors were measured; failed: {len(failed)}")
        for sentence in failed[:NAMED]:
            say(f"  {sentence}")
        raise typer.Exit(PARTIAL)


def write(result: ScanResult, targets: Sequence[Path], quiet: bool) -> None:
    """Write every file, and say so; one that cannot be written costs no other.

    Raises:
        InputError: at the end, if one could not be written.
    """
    failed: list[str] = []
    for target in targets:
        try:
            result.write(target)
        except InputError as error:
            failed.append(str(error))
            continue
        if not quiet:
            say(f"wrote {target}")
    if failed:
        raise InputError("; ".join(failed))
