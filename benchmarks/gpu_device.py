"""The device a GPU run measures on: its clock, its memory, its telemetry; and a stand-in that rehearses on a CPU."""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

# read only: settings of the card are never changed
QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
COLUMNS = ("sm_mhz", "memory_mhz", "power_w", "temperature_c", "throttle")
EVERY_MS = 250
HEAD_START_S = 0.02  # most of the device's waiting while the host enqueues a sample
SLEEP_CLOCK_HZ = 2.0e9  # cycles of the waiting kernel; only its rough length matters
MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class Reading:
    """One line of telemetry; None where the driver gives no number."""

    at_s: float
    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttle: str


def parse_reading(line: str, at_s: float) -> Reading | None:
    """A comma-separated line of ``nvidia-smi``; None if it is no such line."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(COLUMNS):
        return None
    numbers: list[float | None] = []
    for cell in cells[:4]:
        try:
            numbers.append(float(cell))
        except ValueError:
            numbers.append(None)
    return Reading(at_s, numbers[0], numbers[1], numbers[2], numbers[3], cells[4])


@dataclass
class Telemetry:
    """Clocks, power and temperature several times a second, from one ``nvidia-smi`` that runs beside."""

    readings: list[Reading] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self, index: int = 0) -> None:
        """Begin reading; without the tool there are no readings."""
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return
        command = [tool, f"--id={index}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
        with suppress(OSError):
            self.process = subprocess.Popen(
                [*command, f"--loop-ms={EVERY_MS}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            reading = parse_reading(line, time.perf_counter())
            if reading is not None:
                self.readings.append(reading)

    def stop(self) -> None:
        """End the tool."""
        if self.process is not None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)

    def between(self, start_s: float, stop_s: float) -> dict[str, Any]:
        """Largest clocks, power and temperature seen between two host times, the nearest reading if none was."""
        seen = [reading for reading in self.readings if start_s <= reading.at_s <= stop_s]
        seen = seen or [reading for reading in self.readings if reading.at_s <= stop_s][-1:]
        if not seen:
            return {}
        found: dict[str, Any] = {}
        for name in COLUMNS[:4]:
            values = [value for reading in seen if (value := getattr(reading, name)) is not None]
            found[name] = max(values) if values else None
        found["throttle"] = sorted({reading.throttle for reading in seen})
        return found


class Device(Protocol):
    """What a measurement needs of the machine."""

    dry: bool
    torch_device: torch.device
    telemetry: Telemetry

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""

    def device_ms(self, call: Callable[[int], object], calls: int, host_s: float) -> float:
        """Milliseconds on the device of one of ``calls`` calls in a row; ``call`` gets its number."""

    def extra_bytes(self, call: Callable[[], object]) -> int | None:
        """Most bytes allocated at a time during a call, above those before it."""

    def facts(self) -> dict[str, Any]:
        """What the device is, for the results file."""

    def l2_bytes(self) -> int:
        """Size of the last cache, which rotating inputs must exceed."""


class CudaDevice:
    """One CUDA device, timed by its own events."""

    dry = False

    def __init__(self, index: int = 0) -> None:
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.properties = torch.cuda.get_device_properties(index)
        self.telemetry = Telemetry()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def device_ms(self, call: Callable[[int], object], calls: int, host_s: float) -> float:
        """Events around all calls; the device first waits a little, so that the host is never the slower one."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ahead_s = min(HEAD_START_S, 1.5 * host_s * calls)
        gc.collect()
        torch.cuda.synchronize(self.torch_device)
        torch.cuda._sleep(int(ahead_s * SLEEP_CLOCK_HZ))
        start.record()
        result: object = None
        for number in range(calls):
            result = None  # a large result is freed before the next is made
            result = call(number)
        stop.record()
        stop.synchronize()
        del result
        return float(start.elapsed_time(stop)) / calls

    def extra_bytes(self, call: Callable[[], object]) -> int | None:
        self.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        result = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.torch_device)
        del result
        return int(peak - before)

    def facts(self) -> dict[str, Any]:
        found = self.properties
        driver = ask_driver(self.torch_device.index or 0)
        return {
            "model": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "l2_mib": round(self.l2_bytes() / MIB, 1),
            "devices": torch.cuda.device_count(),
            **driver,
        }

    def l2_bytes(self) -> int:
        return int(getattr(self.properties, "L2_cache_size", 64 << 20))


class DryDevice:
    """A rehearsal on the CPU: the same calls, host time for device time, made-up telemetry. Numbers mean nothing."""

    dry = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.telemetry = Telemetry([Reading(0.0, 1.0, 1.0, 1.0, 1.0, "dry")])

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def device_ms(self, call: Callable[[int], object], calls: int, host_s: float) -> float:
        """Host time."""
        start = time.perf_counter()
        for number in range(calls):
            call(number)
        return (time.perf_counter() - start) * 1e3 / calls

    def extra_bytes(self, call: Callable[[], object]) -> int | None:
        call()
        return None

    def facts(self) -> dict[str, Any]:
        return {
            "model": f"dry run on {platform.machine()}", "capability": "", "multiprocessors": 0, "memory_gib": 0.0,
            "l2_mib": 0.0, "devices": 0, "driver": "", "mig": "",
        }  # fmt: skip

    def l2_bytes(self) -> int:
        return 1 << 12


def ask_driver(index: int) -> dict[str, Any]:
    """Driver version, power limit, largest clocks and MIG mode as the driver tells them; empty strings where not."""
    names = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "mig.mode.current", "ecc.mode.current")
    keys = ("driver", "power_limit_w", "max_sm_mhz", "max_memory_mhz", "mig", "ecc")
    tool = shutil.which("nvidia-smi")
    cells: Sequence[str] = ()
    if tool is not None:
        command = [tool, f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            cells = [cell.strip() for cell in done.stdout.splitlines()[0].split(",")] if done.stdout else ()
    return dict(zip(keys, cells if len(cells) == len(keys) else [""] * len(keys), strict=True))


def host_us(device: Device, call: Callable[[], object], samples: int) -> list[float]:
    """Microseconds of single Python calls that return before the device is done, each on an empty queue."""
    taken: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(samples):
            device.synchronize()
            start = time.perf_counter_ns()
            result = call()
            taken.append((time.perf_counter_ns() - start) / 1e3)
            del result
    finally:
        if collecting:
            gc.enable()
    device.synchronize()
    return taken
