"""Exit codes, and one sentence on stderr instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()
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
        _drop_stdout()
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        _drop_stdout()
        where = "the output cannot be written" if error.filename is None else f"{error.filename} cannot be used"
        say(f"orthofast: {where}: {error.strerror or error}")
        raise typer.Exit(UNREADABLE) from None


def _drop_stdout() -> None:
    """Let what is still buffered go nowhere, or Python fails on it at exit, with a code of its own."""
    with suppress(OSError, ValueError, AttributeError):  # no file of the system
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def say(sentence: str) -> None:
    """One line on stderr, whatever foreign names it holds."""
    typer.echo(printable(sentence), err=True)
