"""What a block of a GPU run leaves behind line by line: a crash or a hang loses one case and names the culprit.

A kernel that never ran before may hang, or break the CUDA context for all calls after it. So each block is a process of
its own: it writes a line when a contestant begins and ends and when a row is done; a watchdog ends the process when one
contestant takes too long; whoever started it reads the lines, leaves the culprit out and starts the block again.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# exit codes: a contestant took too long; a contestant broke the device's context; the block's time is over
STUCK, BROKEN, OUT_OF_TIME = 75, 76, -1
TURN_LIMIT_S = 60.0


def backend_of(contestant: str) -> str:
    """The contestant without its variant: ``name@highest`` and ``name+gradient`` fall with ``name``."""
    return re.split("[@+]", contestant, maxsplit=1)[0]


@dataclass
class Journal:
    """The writing side; without a path nothing is written, and nothing watches.

    Attributes:
        excluded: backend -> why it takes no part any more.
        done: labels of cases that are measured already.
    """

    path: Path | None = None
    limit_s: float = TURN_LIMIT_S
    excluded: dict[str, str] = field(default_factory=dict)
    done: frozenset[str] = frozenset()
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _current: str | None = None
    _since: float = 0.0

    def watch(self) -> None:
        """Start the watchdog."""
        if self.path is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(min(0.5, self.limit_s / 4))
            current, since = self._current, self._since
            if current is not None and time.monotonic() - since > self.limit_s:
                self._write({"ended": current, "reason": f"took more than {self.limit_s:.0f} s and was stopped"})
                os._exit(STUCK)

    @contextmanager
    def turn(self, contestant: str) -> Iterator[None]:
        """While this contestant runs, a crash or a hang is its own."""
        self._write({"begin": contestant})
        self._current, self._since = contestant, time.monotonic()
        try:
            yield
        finally:
            self._current = None
            self._write({"end": contestant})

    def row(self, section: str, row: dict[str, Any]) -> None:
        """One finished row of a section of the results file."""
        self.rows.append((section, row))
        self._write({"section": section, "row": row})

    def case_done(self, label: str) -> None:
        """This case need not be repeated after a restart."""
        self._write({"done": label})

    def broken(self, contestant: str, reason: str) -> None:
        """End the process: the device serves nobody any more."""
        self._write({"ended": contestant, "reason": f"broke the device's context: {reason}"})
        if self.path is None:
            raise RuntimeError(f"{contestant} broke the device's context: {reason}")
        os._exit(BROKEN)

    def refusal(self, contestant: str) -> str | None:
        """Why a contestant takes no part any more: its backend was the culprit of an earlier start, or it was."""
        return self.excluded.get(backend_of(contestant))

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


@dataclass
class Story:
    """The reading side: everything a process wrote before it ended, however it ended."""

    rows: list[tuple[str, dict[str, Any]]]
    done: frozenset[str]
    culprit: str | None
    reason: str


def read(path: Path, code: int) -> Story:
    """The journal of a process that ended with ``code``; who was running when it ended badly, if anybody was."""
    rows: list[tuple[str, dict[str, Any]]] = []
    pending: list[tuple[str, dict[str, Any]]] = []
    done: set[str] = set()
    running, culprit, reason = None, None, ""
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last line of a process that was killed
        if "row" in line:
            pending.append((line["section"], line["row"]))
        elif "done" in line:
            done.add(line["done"])
            rows += pending
            pending = []
        elif "begin" in line:
            running = line["begin"]
        elif "end" in line:
            running = None
        elif "ended" in line:
            culprit, reason = line["ended"], line["reason"]
    if code and culprit is None and running is not None:
        culprit, reason = running, f"ended the process (exit code {code})"
    # a case that a crash cut short is repeated; one that ended for lack of time is not
    return Story(rows + (pending if code in (0, OUT_OF_TIME) else []), frozenset(done), culprit, reason)
