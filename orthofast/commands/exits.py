"""Exit codes, and one sentence on stderr instead of a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from orthofast.errors import MissingPackageError, OrthofastError
from orthofast.scan.tables import printable

GATE_FAILED, UNREADABLE, PARTIAL, MISSING_PACKAGE, INTERRUPTED = 1, 2, 3, 4, 130
CODES = (
    "Exit codes: 0 done, 1 the gate failed, 2 unreadable input or wrong usage, 3 finished but some tensors failed, "
    "4 an optional package is missing, 130 interrupted."
)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what a command may raise into its exit code."""
    try:
        yield
    except MissingPackageError as error:
        say(f"orthofast: {error}")
        raise typer.Exit(MISSING_PACKAGE) from None
    except OrthofastError as error:
        say(f"orthofast: {error}")
        raise typer.Exit(UNREADABLE) from None
    except KeyboardInterrupt:
        say("orthofast: interrupted, nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        raise typer.Exit(128 + signal.SIGPIPE) from None


def say(sentence: str) -> None:
    """One line on stderr, whatever foreign names it holds."""
    typer.echo(printable(sentence), err=True)
