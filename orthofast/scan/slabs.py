"""Memory that is allocated once and used again: a pool of slabs on the host, a ring of regions on a device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from orthofast.errors import OrthofastError


class Event(Protocol):
    """A point in a device's work that can be waited for."""

    def synchronize(self) -> None:
        """Return when everything before this point is done."""


class ClosedError(OrthofastError):
    """The pool was closed while somebody waited for a slab."""


class Slabs:
    """A fixed number of equal pieces of host memory, taken by readers and given back with the copy that empties them.

    Args:
        count: how many.
        nbytes: size of each.
        allocate: makes one, a (nbytes,) uint8 tensor; pinned where a device copies from it.
    """

    def __init__(self, count: int, nbytes: int, allocate: Callable[[int], Tensor]) -> None:
        self.nbytes = nbytes
        self._free = [allocate(nbytes) for _ in range(count)]
        self._emptied: deque[tuple[Tensor, Event]] = deque()  # a copy from them is under way
        self._changed = threading.Condition()
        self._closed = False

    def take(self) -> Tensor:
        """A slab that nothing reads from any more; waits for one.

        Raises:
            ClosedError: if the pool was closed.
        """
        with self._changed:
            while not self._closed and not self._free and not self._emptied:
                self._changed.wait()
            if self._closed:
                raise ClosedError("the pool of slabs was closed")
            if self._free:
                return self._free.pop()
            slab, copied = self._emptied.popleft()
        copied.synchronize()  # outside the lock: others may give and take meanwhile
        return slab

    def give(self, slab: Tensor, copied: Event | None = None) -> None:
        """Put a slab back; ``copied`` is the end of the copy that still reads from it."""
        with self._changed:
            if copied is None:
                self._free.append(slab)
            else:
                self._emptied.append((slab, copied))
            self._changed.notify()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Ring:
    """Regions of one piece of memory, reserved and released in the same order.

    Args:
        nbytes: size of the memory.

    >>> ring = Ring(10)
    >>> ring.reserve(6), ring.reserve(3), ring.reserve(4)
    (0, 6, None)
    >>> ring.release()
    >>> ring.reserve(4)
    0
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._spans: deque[tuple[int, int]] = deque()

    def reserve(self, nbytes: int) -> int | None:
        """First byte of a free region, or None while there is none."""
        nbytes = max(nbytes, 1)  # an empty region has its place in the order too
        start = 0
        if self._spans:
            oldest, newest = self._spans[0][0], self._spans[-1]
            start = newest[1]
            if newest[0] < oldest:  # wrapped around: free up to the oldest
                limit = oldest
            else:
                limit = self.nbytes
                if start + nbytes > limit:
                    start, limit = 0, oldest
        else:
            limit = self.nbytes
        if start + nbytes > limit:
            return None
        self._spans.append((start, start + nbytes))
        return start

    def release(self) -> None:
        """Free the oldest region."""
        self._spans.popleft()
