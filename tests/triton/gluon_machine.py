"""A model of one Hopper multiprocessor that runs the Gluon kernel's own source in numpy, in random order.

Gluon has no interpreter. Here its functions run as plain Python with the language's names replaced: roles become
threads of which one at a time moves, picked by a seeded generator; a copy lands, and a product reads its operands, at a
random later moment, as late as the kernel's waits allow. An mbarrier counts arrivals and bytes and shows its parity.
So an operand overwritten too early gives a wrong sum, and a lost phase ends in :class:`DeadlockError`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class DeadlockError(AssertionError):
    """Nobody can move and somebody waits."""


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes announced have come."""

    def __init__(self) -> None:
        self.count = self.arrived = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = count

    def update(self, arrivals: int = 0, announced: int = 0, came: int = 0) -> None:
        self.arrived += arrivals
        self.bytes += announced - came
        assert self.arrived <= self.count, "more arrivals in a phase than the barrier counts"
        if self.arrived == self.count and self.bytes == 0:
            self.arrived, self.phase = 0, self.phase ^ 1

    def passed(self, parity: int) -> bool:
        return self.phase != parity


class Shared:
    """A ring of tiles or of barriers in shared memory."""

    def __init__(self, stages: list[Any]) -> None:
        self.stages = stages

    def index(self, stage: int) -> Any:
        return self.stages[stage]


class Tile:
    """One stage's operand; filled with NaN, so that reading too early shows."""

    def __init__(self, shape: list[int]) -> None:
        self.values = np.full(shape, np.nan, np.float32)

    def permute(self, order: tuple[int, int]) -> Tile:
        view = Tile([0, 0])
        view.values = self.values.transpose(order)
        return view


class Pointer:
    """An address in a flat array; loads and stores go through offsets, as in the kernel."""

    def __init__(self, array: NDArray[Any], offset: Any = 0) -> None:
        self.array, self.offset = array, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.array, self.offset + other)


class Descriptor:
    """A TMA descriptor of a 2-D array: blocks may hang over its end and are zero there."""

    def __init__(self, array: Floats, block_shape: list[int]) -> None:
        self.array, self.block_shape, self.dtype, self.layout = array, block_shape, None, None

    def read(self, at: list[int]) -> Floats:
        rows, columns = self.block_shape
        assert at[0] >= 0
        assert at[1] >= 0
        inside = self.array[at[0] : at[0] + rows, at[1] : at[1] + columns]
        out = np.zeros((rows, columns), np.float32)
        out[: inside.shape[0], : inside.shape[1]] = inside
        return out


class Product:
    """Products queued by one warpgroup: the newest accumulator, and what is still to be read."""

    def __init__(self, acc: Floats, queue: list[tuple[Tile, Tile]]) -> None:
        self.acc, self.queue = acc, queue

    def retire(self) -> None:
        left, right = self.queue.pop(0)
        self.acc += left.values @ right.values


class Role(threading.Thread):
    """A thread that moves only when it is told to."""

    def __init__(self, machine: Machine, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.machine, self.work = machine, work
        self.go, self.ready = threading.Semaphore(0), True
        self.waiting: Callable[[], bool] | None = None
        self.products: list[Product] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.machine.stopped:
                self.work()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - told where the machine runs
            self.error = error
        self.ready = False
        self.machine.turn.release()

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Give the turn away; come back when told to, and not before ``until`` holds."""
        self.waiting = until
        self.machine.turn.release()
        self.go.acquire()
        if self.machine.stopped:
            raise Stopped


class Stopped(BaseException):
    """The machine ends; a role unwinds."""


class Machine:
    """One block of the grid: ``source`` is the kernels' module, ``constants`` replace its tile sizes."""

    def __init__(self, source: ModuleType, constants: dict[str, Any], seed: int, program: int, programs: int) -> None:
        self.random = random.Random(seed)
        self.turn = threading.Semaphore(0)
        self.stopped = False
        self.roles: list[Role] = []
        self.copies: list[Callable[[], None]] = []
        self.program, self.programs = program, programs
        self.names: dict[str, Any] = {"range": range, "__builtins__": __builtins__, **_plain(source), **constants}
        language = {"gl": _Language(self), "mbarrier": _Barriers(self), "tma": _Copies(self)}
        self.names.update(language)
        self.names["warpgroup_mma"], self.names["warpgroup_mma_wait"] = self.multiply, self.wait_products
        self.names["fence_async_shared"] = lambda: None
        for name, value in vars(source).items():
            if hasattr(value, "fn"):
                self.names[name] = FunctionType(value.fn.__code__, self.names, name, value.fn.__defaults__)

    def run(self, *args: Any, **options: Any) -> None:
        self.names["abs_sum_kernel"](*args, **options)

    def role(self) -> Role:
        current = threading.current_thread()
        assert isinstance(current, Role)
        return current

    def start(self, works: list[Callable[[], None]]) -> None:
        """Run the roles to their end, one step of one of them at a time."""
        self.roles = [Role(self, work) for work in works]
        for role in self.roles:
            role.start()
        try:
            while any(role.ready for role in self.roles):
                self.step()
        finally:
            self.stopped = True
            for role in self.roles:
                role.go.release()
            for role in self.roles:
                role.join(10)
        assert not self.copies, "a copy was never waited for"

    def step(self) -> None:
        movable = [role for role in self.roles if role.ready and (role.waiting is None or role.waiting())]
        products = [product for role in self.roles for product in role.products if product.queue]
        # waiting for nothing but a product means nothing: products end by themselves, so roles come first
        kinds = ["role"] * (3 * len(movable)) + ["copy"] * len(self.copies) + ["product"] * len(products)
        if not kinds:
            raise DeadlockError(f"{sum(role.ready for role in self.roles)} roles wait for ever")
        kind = self.random.choice(kinds)
        if kind == "copy":
            self.copies.pop(self.random.randrange(len(self.copies)))()
        elif kind == "product":
            self.random.choice(products).retire()
        else:
            role = self.random.choice(movable)
            role.waiting = None
            role.go.release()
            self.turn.acquire()
            if role.error is not None:
                raise role.error

    def multiply(self, left: Tile, right: Tile, acc: Floats, is_async: bool) -> Product:
        assert is_async
        role = self.role()
        role.pause()
        last = next((product for product in role.products if product.acc is acc), None)
        if last is None:
            last = Product(acc, [])
            role.products.append(last)
        last.queue.append((left, right))
        return last

    def wait_products(self, pending: int, deps: list[Any]) -> Floats:
        role = self.role()
        product = next(p for p in role.products if p is deps[0] or p.acc is deps[0])
        role.pause(lambda: len(product.queue) <= pending)
        if pending == 0:
            role.products.remove(product)
        return product.acc


def _plain(source: ModuleType) -> dict[str, Any]:
    """The module's constants as Python values."""
    return {name: getattr(value, "value", value) for name, value in vars(source).items() if name.isupper()}


class _Language:
    int64 = "int64"
    float32 = np.float32

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def program_id(self, axis: int) -> int:
        return self.machine.program

    def num_programs(self, axis: int) -> int:
        return self.machine.programs

    def static_range(self, stop: int) -> range:
        return range(stop)

    def load(self, at: Pointer, mask: Any = None, other: float = 0.0) -> Any:
        if mask is None:
            return at.array[at.offset].item()
        safe = np.where(mask, at.offset, 0)
        return np.where(mask, at.array[safe], np.float32(other))

    def store(self, at: Pointer, value: Any) -> None:
        at.array[at.offset] = value

    def zeros(self, shape: tuple[int, int], dtype: Any, layout: Any) -> Floats:
        return np.zeros(shape, dtype)

    def arange(self, start: int, stop: int, layout: Any) -> NDArray[np.int64]:
        return np.arange(start, stop)

    def NVMMADistributedLayout(self, **_: Any) -> None:
        return None

    def SliceLayout(self, axis: int, layout: Any) -> None:
        return None

    expand_dims = staticmethod(np.expand_dims)
    where = staticmethod(np.where)
    abs = staticmethod(np.abs)
    sum = staticmethod(np.sum)

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        barriers = dtype == self.int64
        return Shared([Barrier() if barriers else Tile(shape[1:]) for _ in range(shape[0])])

    def warp_specialize(self, roles: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(warps) == len(registers) == len(roles) - 1
        self.machine.start([lambda work=work, args=args: work(*args) for work, args in roles])


class _Barriers:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def MBarrierLayout(self) -> None:
        return None

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.init(count)

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.machine.role().pause(lambda: barrier.passed(parity))

    def arrive(self, barrier: Barrier, pred: bool = True) -> None:
        self.machine.role().pause()
        if pred:
            barrier.update(arrivals=1)

    def expect(self, barrier: Barrier, size: int) -> None:
        self.machine.role().pause()
        barrier.update(arrivals=1, announced=size)


class _Copies:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def async_copy_global_to_shared(self, source: Descriptor, at: list[int], barrier: Barrier, tile: Tile) -> None:
        self.machine.role().pause()

        def land() -> None:
            tile.values[:] = source.read(at)
            barrier.update(came=2 * tile.values.size)  # 16-bit elements

        self.machine.copies.append(land)
