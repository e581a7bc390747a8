"""Hooks that turn activations into records, armed on due steps only, in eager and in compiled models.

Eager modules carry a hook only while armed. A hook added to a compiled graph would be ignored without a word, so hooks
are there from the start, in case the model is compiled by its first call; they leave the modules that turn out to be
eager. In a compiled graph a hook is one opaque operator, in the graph of armed steps only: two graphs, no breaks.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.kernels import gram_stats
from orthofast.metrics.gram import orthogonality_gap_from
from orthofast.metrics.neurons import FiringCounts, dying_frac, firing_counts, full_frac, merge_counts

SAMPLES = 256  # rows of a batch the gap is taken of, evenly spaced
FIRING = (nn.ReLU, nn.ReLU6, nn.Threshold)  # exactly 0 where a neuron does not fire
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
START = -1  # slot of the model itself: its call starts a pass
CURE = (
    "no activation was seen, so activation metrics have no values: torch.compile ignores hooks that join a model after "
    "its first compiled call; make the Monitor before that call, or call torch._dynamo.reset() once after making it "
    "(a model in eval mode is not looked at either)"
)

_captures: weakref.WeakValueDictionary[int, Capture] = weakref.WeakValueDictionary()


@torch.library.custom_op("orthofast::observe", mutates_args=("token",))
def _observe(token: Tensor, x: Tensor, capture: int, slot: int) -> None:
    """Hand a real activation over from a compiled graph; the token's mutation keeps the call alive and in order."""
    found = _captures.get(capture)
    if found is not None:
        found.see(slot, x)


@_observe.register_fake
def _(token: Tensor, x: Tensor, capture: int, slot: int) -> None:
    return None


@torch.compiler.assume_constant_result
def _traced(capture: int, slot: int) -> bool:
    """Runs while a graph is traced: this slot's hook is part of it."""
    found = _captures.get(capture)
    if found is not None and slot != START:
        found.traced.add(slot)
    return True


@dataclass(slots=True)
class Slot:
    """One hooked module and what it was seen to do on this armed step."""

    path: str
    module: nn.Module
    gap: bool
    firing: bool
    handle: Any = None
    compiled: bool = False
    calls: int = 0  # in this pass
    gaps: list[Tensor] = field(default_factory=list)  # () each, by call
    counts: list[list[FiringCounts]] = field(default_factory=list)  # by call, by pass


class Capture:
    """Watches the activations of a model on the steps it is armed for.

    Args:
        model: whose calls start a pass; it is looked at in training mode only.
        gaps: modules by path whose outputs' orthogonality gap is wanted.
        firing: modules by path whose dying and full neurons are wanted.

    Attributes:
        own_s: host seconds spent in hooks since the last :meth:`take`.
        ran: slots whose hooks ran outside a compiled graph.
        traced: slots whose hooks are part of one.
        trouble: the last error inside a hook.
    """

    def __init__(self, model: nn.Module, gaps: Mapping[str, nn.Module], firing: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.armed = False
        self.own_s = 0.0
        self.ran: set[int] = set()
        self.traced: set[int] = set()
        self.trouble: Exception | None = None
        self.token = torch.zeros((), device="cpu")
        self.key = id(self)
        _captures[self.key] = self
        paths = list(dict.fromkeys([*gaps, *firing]))
        self._slots = [Slot(p, gaps.get(p) or firing[p], p in gaps, p in firing) for p in paths]
        self._channels: set[tuple[int, ...]] = set()  # shapes of what one-dimensional convolutions gave
        self._passes = 0
        self._start: Any = None
        self._hook()

    def arm(self) -> None:
        """Look at the coming passes."""
        self._forget()
        self._hook()
        self.armed = True

    def settle(self) -> None:
        """After the first step: take the hooks off what is eager, and say so if a compiled model will ignore them."""
        if START in self.ran and self._start is not None:
            self._start.remove()
            self._start = None
        for index, slot in enumerate(self._slots):
            slot.compiled = index not in self.ran
            if not slot.compiled:
                self._unhook(slot)

    @property
    def ignored(self) -> bool:
        """Whether nothing was seen so far, neither running nor traced."""
        return not self.ran - {START} and not self.traced

    def disarm(self) -> None:
        """Look no more, and forget what was seen."""
        self.armed = False
        self._forget()
        self.settle()

    def take(self) -> dict[str, dict[str, Tensor]]:
        """Stop looking, and give metric -> path -> () float64; empty if no pass was seen."""
        self.armed = False
        found: dict[str, dict[str, Tensor]] = {"orthogonality_gap": {}, "dying_frac": {}, "full_frac": {}}
        for slot in self._slots:
            for call, gap in enumerate(slot.gaps):
                found["orthogonality_gap"][self._named(slot, call)] = gap
            for call, counts in enumerate(self._merged(slot)):
                found["dying_frac"][self._named(slot, call)] = dying_frac(counts)
                found["full_frac"][self._named(slot, call)] = full_frac(counts)
        if any(found.values()):
            self.settle()
        self._forget()
        return {metric: values for metric, values in found.items() if values}

    def close(self) -> None:
        """Remove every hook."""
        self.armed = False
        for slot in self._slots:
            self._unhook(slot)
        if self._start is not None:
            self._start.remove()
            self._start = None

    def see(self, slot: int, x: Tensor) -> None:
        """Take one activation. Whatever goes wrong here is kept, never raised into the model's forward."""
        started = time.perf_counter()
        try:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._see(slot, x.detach())
        except Exception as error:  # noqa: BLE001 - a monitor's trouble is not the training's
            self.trouble = error
        self.own_s += time.perf_counter() - started

    def _see(self, index: int, x: Tensor) -> None:
        if index == START:
            self._passes += 1
            for slot in self._slots:
                slot.calls = 0
            return
        slot = self._slots[index]
        call, slot.calls = slot.calls, slot.calls + 1
        if isinstance(slot.module, CONVOLUTIONS) and x.dim() == 3:
            self._channels.add(tuple(x.shape))
        if slot.gap and self._passes <= 1 and call == len(slot.gaps):
            slot.gaps.append(representation_gap(x, isinstance(slot.module, CONVOLUTIONS)))
        if slot.firing:
            counts = firing_counts(x, self._axis(slot.module, x))
            while len(slot.counts) <= call:
                slot.counts.append([])
            slot.counts[call].append(counts)

    def _axis(self, module: nn.Module, x: Tensor) -> int:
        """Along which dimension the neurons lie."""
        if x.dim() > 3 or isinstance(module, CONVOLUTIONS) or tuple(x.shape) in self._channels:
            return 1
        return -1

    def _merged(self, slot: Slot) -> list[FiringCounts]:
        if self._passes:
            return [merge_counts(passes) for passes in slot.counts]
        # without the model's own calls passes cannot be told apart: calls of the same neurons are one
        by_width: dict[int, list[FiringCounts]] = {}
        for counts in (counts for passes in slot.counts for counts in passes):
            by_width.setdefault(len(counts.fired), []).append(counts)
        return [merge_counts(records) for records in by_width.values()]

    def _named(self, slot: Slot, call: int) -> str:
        return slot.path if call == 0 else f"{slot.path}#{call + 1}"

    def _forget(self) -> None:
        self._passes, self.own_s = 0, 0.0
        self._channels.clear()
        for slot in self._slots:
            slot.calls = 0
            slot.gaps, slot.counts = [], []

    def _hook(self) -> None:
        if self._start is None:
            self._start = self.model.register_forward_pre_hook(Hook(self))
        for index, slot in enumerate(self._slots):
            if slot.handle is None:
                slot.handle = slot.module.register_forward_hook(Hook(self, index))

    def _unhook(self, slot: Slot) -> None:
        if slot.handle is not None:
            slot.handle.remove()
            slot.handle = None


class Hook:
    """A forward hook of one slot, or the pre-hook of the model. Copied or pickled with its module, it does nothing."""

    def __init__(self, watcher: Capture | None = None, slot: int = START) -> None:
        self.watcher = watcher
        self.slot = slot

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> None:
        """What torch calls: the output for a slot, nothing for the model."""
        watcher, slot = self.watcher, self.slot
        if watcher is None:
            return
        looking = watcher.armed and watcher.model.training
        activation = watcher.token if slot == START else output
        if torch.compiler.is_compiling():
            _traced(watcher.key, slot)
            if looking and isinstance(activation, Tensor):
                _observe(
                    watcher.token,
                    activation.detach().clone() if slot == START else activation.detach(),
                    watcher.key,
                    slot,
                )
            return
        watcher.ran.add(slot)
        if looking and isinstance(activation, Tensor) and not recomputing():
            watcher.see(slot, activation)


def recomputing() -> bool:
    """Whether autograd is running: activation checkpointing calls a module a second time from there."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def representation_gap(x: Tensor, convolution: bool) -> Tensor:
    """Orthogonality gap of up to ``SAMPLES`` representations, () float64.

    Args:
        x: outputs: (samples, features); (..., features), where each position is a sample; or of a convolution,
            (samples, channels, *positions), where all of an image is one representation.
        convolution: whether it is that.
    """
    rows = x.flatten(1) if convolution or x.dim() > 3 else x.reshape(-1, x.shape[-1])
    rows = rows[:: max(1, -(-len(rows) // SAMPLES))]
    n, d = rows.shape
    smaller = rows.T if n > d else rows
    return orthogonality_gap_from(gram_stats(smaller, normalize=False, want=("sq_sum",)), n)[0]


def firing_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by path whose outputs are 0 exactly where a neuron does not fire."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FIRING)}
