"""The threads that run the numba loops, beside a BLAS held to one thread.

Plain Python threads run the loops, which hold no lock. Numba's own layers would start a second pool, or reset torch's
number of threads, or abort after a fork. A BLAS whose setting is not known keeps its threads.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# pairs of (set, get) in the libraries SciPy is built with
BLAS_SETTINGS = tuple(
    (f"{prefix}openblas_set_num_threads{suffix}", f"{prefix}openblas_get_num_threads{suffix}")
    for prefix in ("scipy_", "")
    for suffix in ("", "64_")
)


class Machine:
    """The threads that run the loops, and BLAS held to one thread while they do; one call at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0
        self._setting: tuple[Callable[[int], Any], Callable[[], int]] | None = None
        self._asked = False
        self._blas_threads = 0

    @property
    def blas_is_held(self) -> bool:
        """Whether SciPy's BLAS is known and now runs on one thread."""
        return self._setting is not None

    def __enter__(self) -> Machine:
        self._lock.acquire()
        if not self._asked:
            self._setting, self._asked = _blas_setting(), True
        if self._setting is not None:
            hold, read = self._setting
            self._blas_threads = read()
            hold(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._setting is not None:
            self._setting[0](self._blas_threads)
        self._lock.release()

    def run(self, works: Sequence[Callable[[], Any]]) -> None:
        """Run the works side by side, the first on this thread; an exception is raised once all have ended."""
        if len(works) < 2:
            for work in works:
                work()
            return
        if self._pool is None or self._size < len(works) - 1:
            if self._pool is not None:
                self._pool.shutdown()
            self._size = len(works) - 1
            self._pool = ThreadPoolExecutor(self._size, thread_name_prefix="orthofast")
        others = [self._pool.submit(work) for work in works[1:]]
        try:
            works[0]()
        finally:
            failures = [other.exception() for other in others]
        for failure in failures:
            if failure is not None:
                raise failure


def _blas_setting() -> tuple[Callable[[int], Any], Callable[[], int]] | None:
    """How to set and read the number of threads of SciPy's BLAS, if it is a known one."""
    module = importlib.import_module("scipy.linalg.cython_blas")
    try:
        library = ctypes.CDLL(module.__file__)  # symbols are searched in the libraries it links, too
    except (OSError, TypeError):
        return None
    for write, read in BLAS_SETTINGS:
        if hasattr(library, write) and hasattr(library, read):
            return getattr(library, write), getattr(library, read)
    return None


_machine = Machine()


def machine() -> Machine:
    """The process's own, to be entered for the time of a call."""
    return _machine


def _after_fork() -> None:
    """A forked child has none of the parent's threads, and may have copied a held lock."""
    global _machine
    _machine = Machine()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
