"""``orthofast lab``: hands its arguments to ``python -m orthofast.lab``, which stands above the commands."""

from __future__ import annotations

import runpy
import sys

import typer

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lab(context: typer.Context) -> None:
    """Measure the papers' tables and figures again: `orthofast lab --help`."""
    sys.argv = ["orthofast lab", *context.args]
    runpy.run_module("orthofast.lab", run_name="__main__", alter_sys=True)
