"""A thread for what takes long on the host: LAPACK lets go of the interpreter, so training goes on beside it.

The queue is bounded; what does not fit is dropped and counted. A job that fails is told once, and nothing else happens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Job: TypeAlias = "Callable[[], Any]"


@dataclass(slots=True)
class Done:
    """A finished job.

    Attributes:
        step: it belongs to.
        value: what it returned; None where it failed.
        error: a sentence where it failed.
        own_s: seconds of processor time it took.
    """

    step: int
    value: Any = None
    error: str = ""
    own_s: float = 0.0


@dataclass(slots=True)
class Worker:
    """Runs jobs one after the other in a thread of its own, started with the first.

    Attributes:
        waiting: how many jobs may wait.
        dropped: how many found no room.
    """

    waiting: int = 2
    dropped: int = 0
    _jobs: queue.Queue[tuple[int, Job] | None] = field(init=False)
    _done: queue.SimpleQueue[Done] = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._jobs = queue.Queue(self.waiting)

    def submit(self, step: int, job: Job) -> bool:
        """Queue a job; False if there is no room."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="orthofast-spectra", daemon=True)
            self._thread.start()
        try:
            self._jobs.put_nowait((step, job))
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def finished(self) -> list[Done]:
        """Jobs that ended since this was last asked, in order; waits for nothing."""
        found = []
        while True:
            try:
                found.append(self._done.get_nowait())
            except queue.Empty:
                return found

    def drain(self, patience_s: float = 60.0) -> bool:
        """Wait until nothing is queued or running; False if that takes longer."""
        limit = time.monotonic() + patience_s
        while self._jobs.unfinished_tasks:
            if time.monotonic() > limit:
                return False
            time.sleep(0.002)
        return True

    def close(self) -> None:
        """End the thread after the job at hand; those that wait are dropped."""
        if self._thread is None:
            return
        while True:
            try:
                self._jobs.get_nowait()
                self._jobs.task_done()
                self.dropped += 1
            except queue.Empty:
                break
        self._jobs.put(None)
        self._thread.join(timeout=60)
        self._thread = None

    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            step, job = entry
            started = time.thread_time()
            done = Done(step)
            try:
                done.value = job()
            except BaseException as error:  # noqa: BLE001 - told to the training's thread, which goes on
                done.error = f"{type(error).__name__}: {error}"
            done.own_s = time.thread_time() - started
            self._done.put(done)
            self._jobs.task_done()
        self._jobs.task_done()
