"""What monitoring costs a training: in turns, bare, with our monitor, with wandb.watch, with a plain loop.

``python -m benchmarks.monitor`` trains a 4-layer transformer and a small ResNet. Every contestant trains a copy of its
own on the same data. A round is ``BLOCK`` steps of each, in turns of ``SLICE`` steps in changing order, so that all see
the same machine. The overhead of a round is the contestant's process CPU time over that of the bare training, less 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.timing import spread, turns

STEPS = 300
BLOCK = 100  # steps of a round: the default interval, so that each round has one due step
SLICE = 10  # steps in turn
WARM_STEPS = 2
EVERY = 100
TARGET_FRAC = 0.01
OURS = "Monitor"
BARE = "bare"


class Transformer(nn.Module):
    """Token embedding, 4 encoder layers of width 256, a head of 1000; batches of 8 x 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(tokens)))
        return out

    @staticmethod
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(1000, (8, 65), generator=torch.Generator().manual_seed(seed))
        return tokens[:, :-1], tokens[:, 1:]


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU()
        narrow = stride == 1 and inner == outer
        self.short = nn.Identity() if narrow else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        joined: Tensor = self.relu(out + self.short(x))
        return joined


class ResNet(nn.Module):
    """ResNet-14 for 32 x 32 images, widths 16, 32, 64; batches of 32."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(*(Residual(*width) for width in widths))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return out

    @staticmethod
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(32, 3, 32, 32, generator=generator)
        return images, torch.randint(10, (32,), generator=generator)


MODELS: dict[str, type[Transformer] | type[ResNet]] = {"transformer": Transformer, "resnet": ResNet}


def naive_pii(model: nn.Module) -> dict[str, float]:
    """The loop a user writes: every matrix by itself, the n x n matrix stored, one number read at a time."""
    found = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                rows = nn.functional.normalize(weight.flatten(1), dim=1)
                cosines = (rows @ rows.T).abs()
                n = len(rows)
                found[name] = ((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))).item()
    return found


@dataclass(slots=True)
class Runner:
    """One contestant: its copy of the model, what it does after each step, what it has cost."""

    name: str
    model: nn.Module
    after: Callable[[int], None]
    close: Callable[[], None]
    make: Callable[[int], tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    cpu_s: list[float] = field(default_factory=list)  # a block each
    wall_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def run(self, steps: int) -> tuple[float, float]:
        """Train on; process CPU and wall seconds."""
        torch.manual_seed(self.step)  # dropout draws the same for all
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            self.step += 1
            x, y = self.make(self.step)
            loss = nn.functional.cross_entropy(self.model(x).flatten(0, -2), y.flatten())
            loss.backward()
            self.optimizer.step()
            self.after(self.step)
            self.optimizer.zero_grad()
        return time.process_time() - cpu, time.perf_counter() - wall


def contestants(kind: type[Transformer] | type[ResNet], folder: Path) -> list[Runner]:
    """Bare training and the ways to watch it, each on a copy of the same model."""
    from orthofast.training import Monitor

    torch.manual_seed(0)
    first = kind()

    def runner(name: str, start: Callable[[nn.Module], tuple[Callable[[int], None], Callable[[], None]]]) -> Runner:
        model = copy.deepcopy(first)
        after, close = start(model)
        return Runner(name, model, after, close, kind.batch)

    def bare(model: nn.Module) -> tuple[Callable[[int], None], Callable[[], None]]:
        return (lambda step: None), (lambda: None)

    def ours(every: int, **given: Any) -> Callable[[nn.Module], tuple[Callable[[int], None], Callable[[], None]]]:
        def start(model: nn.Module) -> tuple[Callable[[int], None], Callable[[], None]]:
            monitor = Monitor(model, every_n_steps=every, log=[], **given)
            return (lambda step: monitor.step()), monitor.close

        return start

    def loop(model: nn.Module) -> tuple[Callable[[int], None], Callable[[], None]]:
        return (lambda step: naive_pii(model) and None if step % EVERY == 0 else None), (lambda: None)

    made = [
        runner(BARE, bare),
        runner(OURS, ours(EVERY)),
        runner("Monitor, never due", ours(10**9)),
        runner("Monitor, every step", ours(1, overhead=None)),
        runner("naive loop", loop),
    ]
    wandb = _wandb()
    if wandb is not None:
        made += [
            runner(f"wandb.watch {what}, log_freq={log_freq}", _watch(wandb, folder, what, log_freq))
            for log_freq in (EVERY, 1)
            for what in ("gradients", "all")
        ]
    return made


def _watch(wandb: Any, folder: Path, what: str, log_freq: int) -> Any:
    def start(model: nn.Module) -> tuple[Callable[[int], None], Callable[[], None]]:
        # watch writes to the process's one run, so all share it
        run = wandb.run or wandb.init(mode="offline", dir=str(folder), project="benchmark")
        wandb.watch(model, log=what, log_freq=log_freq)

        def after(step: int) -> None:
            run.log({"step": step})  # watch hands its histograms over with the next log

        return after, run.finish

    return start


def _wandb() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        return None
    return wandb


def race(model: str, steps: int, block: int, only: Sequence[str] | None = None) -> dict[str, Any]:
    """All contestants on one model, or those named and bare training, ``steps`` steps each."""
    with tempfile.TemporaryDirectory() as folder:
        runners = {
            runner.name: runner
            for runner in contestants(MODELS[model], Path(folder))
            if only is None or runner.name in (BARE, *only)
        }
        try:
            for runner in runners.values():
                runner.run(WARM_STEPS)
                runner.step = 0
            for _ in range(max(1, steps // block)):
                spent = {name: [0.0, 0.0] for name in runners}
                for number in range(max(1, block // SLICE)):
                    for name in turns(list(runners), number):
                        cpu_s, wall_s = runners[name].run(min(SLICE, block))
                        spent[name][0] += cpu_s
                        spent[name][1] += wall_s
                for name, (cpu_s, wall_s) in spent.items():
                    runners[name].cpu_s.append(cpu_s)
                    runners[name].wall_s.append(wall_s)
        finally:
            for runner in runners.values():
                runner.close()
    bare = runners[BARE]
    same = {
        name: all(torch.equal(a, b) for a, b in zip(bare.model.parameters(), runner.model.parameters(), strict=True))
        for name, runner in runners.items()
    }
    return {
        "model": model,
        "block_steps": block,
        "step_cpu_ms": 1000 * statistics.median(bare.cpu_s) / block,
        "contestants": {
            name: {
                "same_weights": same[name],
                "cpu_s": runner.cpu_s,
                "wall_s": runner.wall_s,
                "overhead_frac": [own / base - 1 for own, base in zip(runner.cpu_s, bare.cpu_s, strict=True)],
            }
            for name, runner in runners.items()
        },
    }


def own_share(model: str) -> dict[str, float]:
    """What a due step and a step that is not due take by themselves, over a training step: below what turns resolve."""
    from orthofast.training import Monitor

    torch.manual_seed(0)
    net = MODELS[model]()
    trainer = Runner(BARE, net, lambda step: None, lambda: None, MODELS[model].batch)
    trainer.run(WARM_STEPS)
    step_s = trainer.run(5)[0] / 5
    every_step, never = Monitor(net, every_n_steps=1, overhead=None, log=[]), Monitor(net, every_n_steps=10**9, log=[])
    every_step.step()
    never.step()
    due_s = min(_cpu_s(every_step.step, 5) for _ in range(5))
    idle_s = min(_cpu_s(never.step, 100_000) for _ in range(3))
    return {"due_over_step": due_s / step_s, "idle_over_step": idle_s / step_s, "idle_ns": 1e9 * idle_s}


def _cpu_s(call: Callable[[], object], calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - started) / calls


def report(found: dict[str, Any]) -> str:
    """A table for the terminal."""
    lines = [
        f"\n{found['model']}: {found['step_cpu_ms']:.1f} ms of CPU time a step, rounds of {found['block_steps']} steps"
    ]
    lines.append(f"  {'':<36}{'overhead %':>11}{'p20':>8}{'p80':>8}  same weights")
    for name, measured in found["contestants"].items():
        if name != BARE:
            over = spread([100 * value for value in measured["overhead_frac"]])
            lines.append(
                f"  {name:<36}{over.median:>11.2f}{over.p20:>8.2f}{over.p80:>8.2f}"
                f"  {'yes' if measured['same_weights'] else 'NO'}"
            )
    share = found["own"]
    lines.append(
        f"  a due step costs {100 * share['due_over_step']:.1f} % of a training step, "
        f"so every {EVERY} steps {100 * share['due_over_step'] / EVERY:.3f} %; "
        f"a step that is not due {share['idle_ns']:.0f} ns"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 if our monitor at its defaults takes more than its share, or changes a weight."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    made.add_argument("--model", action="append", choices=list(MODELS), help="this one alone; may be repeated")
    made.add_argument("--steps", type=int, default=STEPS, help=f"of each contestant (default {STEPS})")
    made.add_argument("--block", type=int, default=BLOCK, help=f"steps of a round (default {BLOCK})")
    made.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    made.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    made.add_argument("--only", action="append", metavar="CONTESTANT", help="beside bare training; may be repeated")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    data: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **machine.commit(),
        "machine": machine.processor(),
        "versions": machine.versions(),
        "threads": options.threads,
        "models": [],
    }
    passed = True
    for name in options.model or list(MODELS):
        found = {**race(name, options.steps, options.block, options.only), "own": own_share(name)}
        data["models"].append(found)
        print(report(found), flush=True)
        ours = found["contestants"][OURS]
        share = found["own"]["due_over_step"] / EVERY + found["own"]["idle_over_step"]
        passed &= ours["same_weights"] and share < TARGET_FRAC
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"\ntarget, at most {100 * TARGET_FRAC:.0f} % and the same weights: {'met' if passed else 'MISSED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
