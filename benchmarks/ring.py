"""`python -m benchmarks.ring`: the half ring against gathering the matrix on every rank, processes joined by gloo.

Every contestant folds a DTensor of row shards, one thread per process, fresh random numbers each round, in turns. A
sample is the wall time of the slowest rank from one barrier on, and the CPU time of all ranks together. Nothing is
timed before all contestants agree on the value (the gate). One process per core, nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

import orthofast
from benchmarks import machine
from benchmarks.timing import spread, turns

SHAPES = ((1003, 512), (4096, 1024), (8192, 512))
TARGET, RIVAL = 0.6, "gather"  # of the time of gathering, two processes
AGREE = 1e-6  # relative, float32


def ring(weight: DTensor) -> Tensor:
    """Ours: blocks of rows travel, the matrix is nowhere whole."""
    return orthofast.pii(weight)


def gather(weight: DTensor) -> Tensor:
    """Our fold of the gathered matrix, the same on every rank."""
    return orthofast.pii(weight.full_tensor())


def expression(weight: DTensor) -> Tensor:
    """The formula written in torch, on the DTensor itself: what sharding users write today."""
    units = weight / weight.norm(dim=1, keepdim=True)
    cosines = (units @ units.T).abs()
    found = (cosines.sum() - weight.shape[0]) / (weight.shape[0] * (weight.shape[0] - 1))
    return found.full_tensor() if isinstance(found, DTensor) else found


CONTESTANTS: dict[str, Callable[[DTensor], Tensor]] = {"ring": ring, "gather": gather, "dtensor": expression}


def sample(call: Callable[[DTensor], Tensor], weight: DTensor, gradient: bool) -> tuple[float, float, float]:
    """Wall seconds of the slowest rank, CPU seconds of all ranks, and the value."""
    shards = cast(DTensor, weight.detach().requires_grad_(gradient))
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    value = call(shards)
    if gradient:
        value.backward()
    taken = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)
    slowest, together = taken[:1].clone(), taken[1:].clone()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(together)
    return slowest.item(), together.item(), value.item()


def race(n: int, d: int, gradient: bool, rounds: int) -> dict[str, Any]:
    """One shape: gate, then rounds in turns; on every rank alike."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds + 1):  # the first warms up and is the gate
        numbers = torch.Generator().manual_seed(1000 * n + number)
        weight = distribute_tensor(torch.randn(n, d, generator=numbers), mesh, [Shard(0)])
        found = {name: sample(CONTESTANTS[name], weight, gradient) for name in turns(tuple(CONTESTANTS), number)}
        values = [value for _, _, value in found.values()]
        if max(values) - min(values) > AGREE * max(values):
            raise ValueError(f"{n} x {d}: contestants disagree: { {k: v[2] for k, v in found.items()} }")
        if number:
            for name, taken in found.items():
                samples[name].append(taken)
    return {
        "n": n,
        "d": d,
        "gradient": gradient,
        "ranks": dist.get_world_size(),
        "wall_s": {name: [wall for wall, _, _ in taken] for name, taken in samples.items()},
        "cpu_s": {name: [cpu for _, cpu, _ in taken] for name, taken in samples.items()},
    }


def _serve(rank: int, ranks: int, store: str, rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    rows = [race(n, d, gradient, rounds) for gradient in (False, True) for n, d in SHAPES]
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()  # a rank that leaves early breaks off what another still receives
    dist.destroy_process_group()


def measure(ranks: int, rounds: int) -> list[dict[str, Any]]:
    """Race all shapes on fresh processes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    with tempfile.TemporaryDirectory() as folder:
        store, out = Path(folder) / "store", Path(folder) / "rows.json"
        spawn(_serve, (ranks, str(store), rounds, str(out)), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios first: time of the ring over that of each rival, medians; then the medians."""
    lines = ["shape        what            ranks  ring/gather wall (CPU)  ring/dtensor wall (CPU)  ring ms  verdict"]
    for row in rows:
        middle = {
            kind: {name: spread(values).median for name, values in row[kind].items()} for kind in ("wall_s", "cpu_s")
        }
        ratio = {
            (kind, rival): values["ring"] / values[rival]
            for kind, values in middle.items()
            for rival in (RIVAL, "dtensor")
        }
        judged = row["ranks"] == 2 and not row["gradient"]
        verdict = ("met" if ratio["wall_s", RIVAL] <= TARGET else "not met") if judged else ""
        lines.append(
            f"{row['n']:>5} x {row['d']:<5}{'value+gradient' if row['gradient'] else 'value':<16}{row['ranks']:>5}  "
            f"{ratio['wall_s', RIVAL]:>12.2f} ({ratio['cpu_s', RIVAL]:.2f})      "
            f"{ratio['wall_s', 'dtensor']:>12.2f} ({ratio['cpu_s', 'dtensor']:.2f})   "
            f"{1000 * middle['wall_s']['ring']:>10.1f}  {verdict}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Race, print, and write where asked to; 1 if a judged ratio is above the target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ring", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="samples per contestant (default 9)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results file, JSON; default: none is written")
    options = parser.parse_args(arguments)
    if options.ranks < 2 or options.rounds < 1:
        print("--ranks needs at least 2 and --rounds at least 1", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    rows = measure(options.ranks, options.rounds)
    print(table(rows))
    print(f"load before: {load:.1f} on {os.cpu_count()} cores; target: ring / gather at most {TARGET} in wall time")
    if options.out is not None:
        data = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **machine.commit(),
            "machine": machine.processor(),
            "versions": machine.versions(),
            "load_before": load,
            "rows": rows,
        }
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    judged = [row for row in rows if row["ranks"] == 2 and not row["gradient"]]
    walls = [{name: spread(values).median for name, values in row["wall_s"].items()} for row in judged]
    return int(any(wall["ring"] > TARGET * wall[RIVAL] for wall in walls))


if __name__ == "__main__":
    sys.exit(main())
