"""Processes joined by gloo that make claims together: each runs the same function, and answers or fails by name."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PATIENCE = 60  # seconds that one claim may take


def serve(rank: int, count: int, store: str, line: Connection) -> None:
    """One rank: make claims as they come, until told to stop."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    while (task := line.recv()) is not None:
        claim, arguments = task
        try:
            torch.manual_seed(0)
            line.send((True, claim(*arguments)))
        except Exception:  # noqa: BLE001  the parent fails with it
            line.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """A number of ranks, started with the first claim and anew after one that left them hanging."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self.processes: list[Any] = []
        self.lines: list[Connection] = []
        self.starts = 0

    def __call__(self, claim: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the claim answers on every rank; fails with the tracebacks of the ranks where it does not hold."""
        if not self.processes:
            self._start()
        for line in self.lines:
            line.send((claim, arguments))
        deadline = time.monotonic() + PATIENCE
        answers = []
        for rank, line in enumerate(self.lines):
            if not line.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                raise AssertionError(f"rank {rank} of {self.count} has not answered {claim.__name__} in {PATIENCE} s")
            answers.append(line.recv())
        failed = [f"rank {rank}:\n{answer}" for rank, (held, answer) in enumerate(answers) if not held]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = self.folder / f"store{self.starts}"
        self.starts += 1
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
        try:
            for rank in range(self.count):
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(rank, self.count, str(store), there), daemon=True)
                process.start()
                there.close()
                self.processes.append(process)
                self.lines.append(here)
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before

    def stop(self) -> None:
        """End the processes: politely those that listen, at once those that hang."""
        for line in self.lines:
            try:
                line.send(None)
            except OSError:
                continue
        deadline = time.monotonic() + 3
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for line in self.lines:
            line.close()
        self.processes, self.lines = [], []
