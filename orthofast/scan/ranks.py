"""Several processes measure one checkpoint: each draws work from the store of torch.distributed, all get the result.

Started by any launcher that sets the variables of torch.distributed, such as ``torchrun --nproc-per-node 8 -m orthofast
scan MODEL``. No collective is used, so nobody hangs on a rank that is gone: ranks beat, and what a silent one had drawn
is drawn again. Folds give the same bits everywhere, so work done twice does no harm.

Keys in the store: ``plan`` what all must agree on, ``next`` the draw, ``owner/i`` who works on unit i, ``rows/i`` what
came of it, ``beat/r`` signs of life, ``left`` ranks that have everything.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from orthofast.errors import InputError, OrthofastError
from orthofast.scan.journal import row_from
from orthofast.scan.result import Row

BEAT_S = 0.5  # between two signs of life
PATIENCE_S = 30.0  # of silence, and a rank counts as lost
JOIN_S = 300.0  # for all ranks to come
POLL_S = 0.05

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
Rows = dict[int, list[Row]]  # by index of the weight in the plan


class Team:
    """This process among those that share the work.

    Args:
        store: what all of them reach.
        rank: number of this process.
        size: how many there are.
        patience_s: silence after which a rank counts as lost.
    """

    def __init__(self, store: Store, rank: int, size: int, *, patience_s: float = PATIENCE_S) -> None:
        self.rank, self.size = rank, size
        self._store, self._patience_s = store, patience_s
        self._scans = 0

    def begin(self, plan_digest: str) -> Scan:
        """Start the next scan; all ranks start the same ones in the same order.

        Raises:
            InputError: if the ranks do not see the same checkpoint with the same settings.
            OrthofastError: if the store cannot be reached.
        """
        self._scans += 1
        own = dist.PrefixStore(f"orthofast/{self._scans}", self._store)  # type: ignore[attr-defined]
        scan = Scan(own, self.rank, self.size, self._patience_s)
        scan.agree(plan_digest)
        return scan


class Scan:
    """The work of one scan, shared.

    Args:
        store: of this scan alone.
        rank: number of this process.
        size: how many processes there are.
        patience_s: silence after which a rank counts as lost.
    """

    def __init__(self, store: Store, rank: int, size: int, patience_s: float) -> None:
        self.rank, self.size = rank, size
        self._store, self._patience_s = store, patience_s
        self._units = 0
        self._stopped = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (last beat, when it was seen)
        self._beats = threading.Thread(target=self._beat, name="orthofast-beat", daemon=True)

    def agree(self, plan_digest: str) -> None:
        """Make sure that all ranks do the same, and begin to beat.

        Raises:
            InputError: if they do not.
        """
        said = _guarded(lambda: self._store.compare_set("plan", "", plan_digest))
        if said.decode() != plan_digest:
            raise InputError(
                f"rank {self.rank} sees another checkpoint or other settings than the first one; start all alike"
            )
        self._beats.start()

    def share(self, known: Rows | None) -> Rows:
        """What rank 0 knows from its journals, on all ranks; the others pass None."""
        if known is not None:
            self._put("known", known)
        return self._get("known")

    def draw(self, units: int) -> Iterator[int]:
        """Numbers of units that nobody has drawn yet."""
        self._units = units
        while (number := _guarded(lambda: self._store.add("next", 1)) - 1) < units:
            self._store.set(f"owner/{number}", str(self.rank))
            yield number

    def lost(self, units: int) -> Iterator[int]:
        """Units whose ranks are silent, one after the other; ends when every unit is done.

        Call it when everything this rank drew is done, and hand each unit to :meth:`done` before asking for the next.
        """
        left = set(range(units))
        silent_since = time.monotonic()
        while True:
            left = {number for number in left if not _guarded(self._is_done(number))}
            if not left:
                return
            for number in sorted(left):
                owner = self._owner(number)
                if owner is None:
                    gone = time.monotonic() - silent_since > self._patience_s  # drawn, but not signed
                else:
                    gone = owner != self.rank and self._is_silent(owner)
                if gone and self._claim(number, owner):
                    yield number
            time.sleep(POLL_S)

    def done(self, number: int, rows: Rows) -> None:
        """Publish what came of a unit."""
        self._put(f"rows/{number}", rows)

    def rows(self, number: int) -> Rows:
        """What came of a unit that is done."""
        return self._get(f"rows/{number}")

    def published(self) -> Iterator[Rows]:
        """What came of the units that are done so far."""
        for number in range(self._units):
            if _guarded(self._is_done(number)):
                yield self.rows(number)

    def leave(self) -> None:
        """Stop beating; the rank that may host the store waits until the others have left or are silent."""
        try:
            self._store.add("left", 1)
            while self.rank == 0 and self._store.add("left", 0) < self.size:
                others = [rank for rank in range(1, self.size) if not self._is_silent(rank)]
                if not others:
                    break
                time.sleep(POLL_S)
        except RuntimeError:
            pass  # the store is gone, and with it everybody who could wait for us
        finally:
            self._stopped.set()

    def stop(self) -> None:
        """Fall silent: others take over what this rank has drawn."""
        self._stopped.set()

    def _put(self, key: str, rows: Rows) -> None:
        text = json.dumps({str(index): [asdict(row) for row in found] for index, found in rows.items()})
        _guarded(lambda: self._store.set(key, text))

    def _get(self, key: str) -> Rows:
        document = json.loads(_guarded(lambda: self._store.get(key)))
        return {int(index): [row_from(fields) for fields in found] for index, found in document.items()}

    def _is_done(self, number: int) -> Callable[[], bool]:
        return lambda: bool(self._store.check([f"rows/{number}"]))

    def _owner(self, number: int) -> int | None:
        key = f"owner/{number}"
        return int(self._store.get(key)) if _guarded(lambda: self._store.check([key])) else None

    def _claim(self, number: int, owner: int | None) -> bool:
        """Take a unit over, unless another rank was quicker."""
        mine = str(self.rank)
        said = _guarded(lambda: self._store.compare_set(f"owner/{number}", "" if owner is None else str(owner), mine))
        return said.decode() == mine

    def _is_silent(self, rank: int) -> bool:
        beat, now = _guarded(lambda: self._store.add(f"beat/{rank}", 0)), time.monotonic()
        last = self._heard.get(rank)
        if last is None or last[0] != beat:
            self._heard[rank] = beat, now
            return False
        return now - last[1] > self._patience_s

    def _beat(self) -> None:
        try:
            while not self._stopped.wait(BEAT_S):
                self._store.add(f"beat/{self.rank}", 1)
        except RuntimeError:
            pass  # the store is gone: the next call of the other thread says so


def launched() -> bool:
    """Whether the variables of torch.distributed describe several processes, of which this is one."""
    environment = os.environ
    return environment.get("WORLD_SIZE", "1") != "1" and "RANK" in environment and "MASTER_ADDR" in environment


def team_from_environment() -> Team | None:
    """The team that the variables of torch.distributed describe; None for a process of its own.

    Raises:
        OrthofastError: if the store cannot be reached.
    """
    if not launched():
        return None
    wait = timedelta(seconds=JOIN_S)
    store, rank, size = _guarded(lambda: next(dist.rendezvous("env://", timeout=wait)))  # type: ignore[attr-defined]
    return Team(store, rank, size)


def restarted() -> bool:
    """Whether torchrun started this process again after a failure: what was finished lies in the journals."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(device: str) -> str:
    """The GPU of this process where the launcher gave each one of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def units_of(costs: Sequence[float], size: int) -> list[list[int]]:
    """Neighbouring weights of about equal cost, the dearest first: many for each rank, so that all end together.

    Args:
        costs: of each weight, in reading order.
        size: number of ranks.

    >>> units_of([1, 1, 1, 1, 600, 1], 2)
    [[4], [0, 1, 2, 3], [5]]
    """
    limit = sum(costs) / (64 * size)
    units: list[list[int]] = []
    spent = 0.0
    for index, cost in enumerate(costs):
        if not units or spent + cost > limit:
            units.append([])
            spent = 0.0
        units[-1].append(index)
        spent += cost
    return sorted(units, key=lambda unit: -sum(costs[index] for index in unit))


def _guarded(call: Callable[[], T]) -> T:
    """A call of the store, whose errors say nothing to a user."""
    try:
        return call()
    except RuntimeError as error:
        raise OrthofastError(
            f"the store of torch.distributed cannot be reached ({str(error).splitlines()[0][:120]}): the rank that "
            "holds it is gone, or not all ranks started; what was finished is in the journals, go on with resume"
        ) from None
