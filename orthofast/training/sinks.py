"""Where rows go: console, JSON lines, CSV, any callable, TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

from orthofast.errors import InputError
from orthofast.training.rows import PREFIX, Row

Log: TypeAlias = "Callable[..., object] | Sink | Sequence[Callable[..., object] | Sink] | None"


@runtime_checkable
class Sink(Protocol):
    """Takes rows."""

    def write(self, row: Row) -> None:
        """Take one row. What it raises is reported once, and the sink gets no more rows."""

    def close(self) -> None:
        """No more rows will come."""


class Call:
    """Any ``callable(values, step=step)``, such as ``wandb.log`` or a method of your own logger."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def write(self, row: Row) -> None:
        """Hand over a fresh dict and the step."""
        self.function(dict(row.values), step=row.step)

    def close(self) -> None:
        """Nothing to close."""


class Console:
    """One line a row: mean and worst value of every metric, and where it is. Coloured on a terminal if rich is there.

    Args:
        stream: where to write; stderr when None.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream
        self._print: Callable[[str], object] | None = None

    def write(self, row: Row) -> None:
        """Print it."""
        stream = self.stream or sys.stderr
        if self._print is None:
            self._print = self._coloured(stream)
        line = console_line(row)
        if self._print is None:
            stream.write(line + "\n")
            stream.flush()
        else:
            self._print(line)

    def close(self) -> None:
        """The stream stays open."""

    def _coloured(self, stream: IO[str]) -> Callable[[str], object] | None:
        if not stream.isatty():
            return None
        try:
            from rich.console import Console as Terminal
        except ImportError:
            return None
        terminal = Terminal(file=stream, highlight=True, soft_wrap=True)
        return lambda line: terminal.print(line, markup=False)


def console_line(row: Row) -> str:
    """A row in one line of text."""
    parts = []
    for key, value in row.values.items():
        _, metric, last = [*key.split("/", 2), ""][:3]
        if last in ("min", "max"):
            mean = row.values[f"{PREFIX}/{metric}/mean"]
            parts.append(f"{metric} {mean:.4g} ({last} {value:.4g} at {row.values[f'{PREFIX}/{metric}/arg{last}']})")
        elif metric == "nonfinite":
            parts.append(f"{last}: {value:.0f} vectors with NaN or Inf")
        elif metric == "error":
            parts.append(f"{last}: {value}")
        elif metric == "overhead" and not math.isnan(float(value)):
            parts.append(f"overhead {100 * float(value):.2g} %")
    return f"orthofast step {row.step}: " + " | ".join(parts)


class JsonLines:
    """One JSON object a line, appended; NaN and infinities are null.

    Args:
        path: of the file; folders are made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def write(self, row: Row) -> None:
        """Append and flush."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.values.items()}
        self._file.write(json.dumps({"step": row.step, **values}, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Csv:
    """A table ``step,key,value`` with one value a line, appended: keys may come and go between rows.

    Args:
        path: of the file; folders are made, the header is written into an empty file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def write(self, row: Row) -> None:
        """Append and flush."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", newline="")
            if self._file.tell() == 0:
                csv.writer(self._file).writerow(("step", "key", "value"))
        csv.writer(self._file).writerows((row.step, key, value) for key, value in row.values.items())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard:
    """Scalars for TensorBoard; needs the package tensorboard.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter`` of yours, which stays open; or a folder for one of its own.
    """

    def __init__(self, writer: Any) -> None:
        self._owned = isinstance(writer, str | Path)
        self.writer = _summary_writer(writer) if self._owned else writer

    def write(self, row: Row) -> None:
        """One scalar a number; texts are left out."""
        for key, value in row.numbers.items():
            self.writer.add_scalar(key, value, row.step)

    def close(self) -> None:
        """Flush; close a writer of its own."""
        if self._owned:
            self.writer.close()
        else:
            self.writer.flush()


def _summary_writer(folder: str | Path) -> Any:
    try:
        package = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise InputError("TensorBoard needs the package tensorboard; pip install tensorboard") from error
    return package.SummaryWriter(str(folder))


class WandB:
    """Weights & Biases; needs the package wandb and a run.

    The step is logged as ``orthofast/step`` and set as the x-axis of all keys: a row that arrives after the run's own
    step counter has moved on is kept, where ``run.log(..., step=)`` would drop it.

    Args:
        run: what ``wandb.init`` returned; None takes the run at hand when the first row comes.
    """

    def __init__(self, run: Any = None) -> None:
        self.run = run
        self._defined = False

    def write(self, row: Row) -> None:
        """Log all values, texts too."""
        run = self.run if self.run is not None else _wandb_run()
        if not self._defined:
            run.define_metric(f"{PREFIX}/step")
            run.define_metric(f"{PREFIX}/*", step_metric=f"{PREFIX}/step")
            self._defined = True
        run.log({**row.values, f"{PREFIX}/step": row.step})

    def close(self) -> None:
        """The run stays open."""


def _wandb_run() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError("WandB needs the package wandb; pip install wandb") from error
    if wandb.run is None:
        raise InputError("WandB needs a run; call wandb.init() first, or pass WandB(run)")
    return wandb.run


class MLflow:
    """MLflow metrics; needs the package mlflow or mlflow-skinny and an active run.

    Keys keep their slashes; signs MLflow refuses, such as the brackets of "in_proj_weight[q]", become underscores.

    Args:
        run_id: of the run; None logs to the active one.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def write(self, row: Row) -> None:
        """One call a row; texts are left out."""
        numbers = {re.sub(r"[^\w\-. :/]", "_", key): value for key, value in row.numbers.items()}
        _mlflow().log_metrics(numbers, step=row.step, run_id=self.run_id)

    def close(self) -> None:
        """The run stays open."""


def _mlflow() -> Any:
    try:
        import mlflow
    except ImportError as error:
        raise InputError("MLflow needs the package mlflow; pip install mlflow-skinny") from error
    return mlflow


class Sinks:
    """All sinks of a monitor; one that raises is reported once and dropped, and training goes on."""

    def __init__(self, log: Log) -> None:
        entries: Iterable[Any] = (Console(),) if log is None else log if isinstance(log, Sequence) else (log,)
        self.open: list[Sink] = []
        for entry in entries:
            if isinstance(entry, Sink) and not isinstance(entry, type):
                self.open.append(entry)
            elif callable(entry) and not isinstance(entry, type):
                self.open.append(Call(entry))
            else:
                raise InputError(
                    "log needs a callable(values, step=...), a sink such as orthofast.training.Console(), or a list of "
                    f"these, got {entry!r}; pass [] to log nowhere"
                )

    def write(self, row: Row) -> None:
        """Hand the row to each."""
        for sink in list(self.open):
            try:
                sink.write(row)
            except Exception as error:  # noqa: BLE001 - a logger's trouble is not the training's
                self.open.remove(sink)
                self._report(sink, error)

    def close(self) -> None:
        """Close each."""
        for sink in self.open:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - as above
                self._report(sink, error)
        self.open = []

    @staticmethod
    def _report(sink: Sink, error: Exception) -> None:
        name = type(sink).__name__
        if isinstance(sink, Call):
            name = getattr(sink.function, "__qualname__", name)
        report(f"the sink {name} raised {type(error).__name__}: {error}; it gets no more rows, training goes on")


def report(sentence: str) -> None:
    """One warning that cannot stop a training, even where warnings are errors."""
    try:
        warnings.warn(f"orthofast: {sentence}", RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        sys.stderr.write(f"orthofast: {sentence}\n")
