"""CovarianceTracker: covariances of inputs and output gradients, collected while a training step runs anyway.

The step's own backward pass brings the gradients, so labels are "empirical": the targets of the training. While armed
it adds what the covariances cost and nothing else; while not, nothing. In a compiled graph what it does is one opaque
operator per tensor, in the graph of armed steps only.
"""

from __future__ import annotations

import contextlib
import copy
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.training.analysis import P, is_split, measured_modules
from orthofast.training.capture import recomputing
from orthofast.training.covariance import merge_over_ranks
from orthofast.training.factors import Factors, LayerFactors
from orthofast.training.layers import Select, Skipped
from orthofast.training.passes import unwrapped
from orthofast.training.report import Report, of_layer
from orthofast.training.taps import refuse

Rows: TypeAlias = "tuple[Tensor | None, Tensor | None]"  # of a call: which count, which were drawn
Number: TypeAlias = "float | Tensor | Callable[[], float | Tensor]"
START = -1  # slot of the model itself
LATE = (
    "the model was compiled before the tracker was attached, and torch.compile ignores hooks that join later; attach "
    "it before the first compiled call, or call torch._dynamo.reset() once after attaching it"
)

_trackers: weakref.WeakValueDictionary[int, CovarianceTracker] = weakref.WeakValueDictionary()


@torch.library.custom_op("orthofast::track", mutates_args=("token",))
def _track(token: Tensor, x: Tensor, tracker: int, slot: int, gradient: bool) -> None:
    """Hand an input or an output gradient over from a compiled graph; the token's mutation keeps the call alive."""
    found = _trackers.get(tracker)
    if found is not None:
        found.see(slot, x, gradient)


@_track.register_fake
def _(token: Tensor, x: Tensor, tracker: int, slot: int, gradient: bool) -> None:
    return None


@torch.library.custom_op("orthofast::through", mutates_args=())
def _through(out: Tensor, tracker: int, slot: int) -> Tensor:
    """A copy of a layer's output, whose backward hands the gradient over: what a compiled graph has for a hook."""
    return out.clone()


@torch.library.custom_op("orthofast::through_back", mutates_args=())
def _through_back(gradient: Tensor, tracker: int, slot: int) -> Tensor:
    found = _trackers.get(tracker)
    if found is not None:
        found.see(slot, gradient, True)
    return gradient.clone()


@_through.register_fake
def _(out: Tensor, tracker: int, slot: int) -> Tensor:
    return torch.empty_like(out)


@_through_back.register_fake
def _(gradient: Tensor, tracker: int, slot: int) -> Tensor:
    return torch.empty_like(gradient)


def _keep_names(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.tracker, ctx.slot = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _through_back(gradient, ctx.tracker, ctx.slot), None, None


_through.register_autograd(_backward, setup_context=_keep_names)


@dataclass(slots=True, eq=False)
class _Slot:
    """One layer that is tracked."""

    path: str
    module: nn.Module
    factors: LayerFactors | None = None
    calls: list[Rows] = field(default_factory=list)


class CovarianceTracker:
    """Adds up covariances of a model's layers during training steps; arm it for those that count.

    Passes of the model without gradients, as of a validation, are not looked at.

    Args:
        model: that is trained; DDP, FSDP2, compiled (attached before its first call) or plain.
        layers: which, as in :func:`orthofast.training.find_layers`; None for all.
        factors: how rows are made and added up; ``group`` as in :class:`orthofast.training.factors.Factors`.
        terms: how many terms the loss of one pass is the mean of: a number, or a function asked in every pass; None:
            entries of the batch. For a mean over tokens, their number.
        loss_scale: what this mean was multiplied by before its backward pass: 1 / steps where gradients are accumulated
            over steps, a GradScaler's scale, the number of terms where the loss is their sum. A number or a function.
        p: shares of eigenvalues of the report.

    Attributes:
        skipped: weights that are not tracked, with reasons.
        gradients: whether output gradients are looked at; inputs always are.
        entries: of the batch at hand.
        idle: whether the pass at hand is not looked at.
        own_s: host seconds spent adding up so far, outside of compiled graphs and in them.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> tracker = CovarianceTracker(model)
    >>> with tracker:
    ...     loss = torch.nn.functional.cross_entropy(model(torch.randn(64, 4)), torch.randint(3, (64,)))
    ...     loss.backward()
    >>> report = tracker.report()
    >>> (report.labels, report.n, report.layers["0"].n_over_d)
    ('empirical', 64, 16.0)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Select = None,
        factors: Factors | None = None,
        terms: Number | None = None,
        loss_scale: Number = 1.0,
        p: Sequence[float] = P,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model needs a torch.nn.Module, got {type(model).__name__}")
        self.how = factors or Factors()
        if self.how.mask is not None:
            raise InputError(
                "mask= reads batches, which a training step does not show; use conditioning(model, loader)"
            )
        self.terms, self.loss_scale = terms, loss_scale
        self.p = tuple(p)
        self._split = is_split(model)
        self._model = unwrapped(model)
        modules, self.skipped = measured_modules(self._model, layers)
        self.armed, self.gradients, self.own_s = False, True, 0.0
        self.token = torch.zeros((), device="cpu")
        self.key = id(self)
        _trackers[self.key] = self
        self._slots = [_Slot(path, module) for path, module in modules.items()]
        self.entries = 0  # of the pass at hand
        self.idle = False  # this pass is without gradients
        self._n = 0
        self._order: dict[str, None] = {}
        self.eager: set[int] = set()  # slots whose hooks ran outside a compiled graph
        self._handles: dict[int, Any] = {}
        self._hook()

    def arm(self) -> None:
        """Add up what passes from now on."""
        self._hook()
        self.armed = True

    def rest(self) -> None:
        """Look no more, and take the hooks off modules that run eagerly until armed again."""
        self.armed = False
        for slot in self.eager & set(self._handles):
            self._handles.pop(slot).remove()

    def __enter__(self) -> CovarianceTracker:
        self.arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.armed = False

    def reset(self) -> None:
        """Forget what was added up."""
        self._order, self._n = {}, 0
        for slot in self._slots:
            slot.factors = None

    def decay(self, factor: float) -> None:
        """Weigh all steps so far by ``factor``: an exponential average over steps."""
        for slot in self._slots:
            if slot.factors is not None:
                slot.factors.x.decay(factor)
                slot.factors.g.decay(factor)

    def close(self) -> None:
        """Remove the hooks."""
        self.armed = False
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _hook(self) -> None:
        for at in (START, *range(len(self._slots))):
            if at in self._handles:
                continue
            if at == START:
                self._handles[at] = self._model.register_forward_pre_hook(Hook(self), with_kwargs=True)
            else:
                module = self._slots[at].module
                self._handles[at] = module.register_forward_hook(Hook(self, at), with_kwargs=True)

    def take(self) -> dict[str, LayerFactors]:
        """Hand over what this process added up, by path, and start anew; what is handed over changes no more."""
        taken = {path: self._of(path) for path in self._order}
        for slot in self._slots:
            slot.factors = None
        self._order, self._n = {}, 0
        return taken

    def report(self) -> Report:
        """Spectra of what was added up. Of a DDP or FSDP2 model over all its processes, which must all call it.

        Raises:
            InputError: if nothing was, saying why that may be.
        """
        seen = {path: self._of(path) for path in self._order}
        if not seen:
            raise InputError(f"the tracker saw no layer called; arm it around a step: with tracker: .... Or {LATE}")
        silent = [path for path, factors in seen.items() if not factors.g.n]
        if len(silent) == len(seen):
            raise InputError("the tracker saw no gradient; call backward() while it is armed")
        n = self._n
        if self._split or self.how.group is not None:
            # collected further afterwards, sums must stay this process's
            copies = {path: _copied(factors) for path, factors in seen.items()}
            merge_over_ranks([m for factors in copies.values() for m in (factors.x, factors.g)], self.how.group)
            whole = torch.tensor([n], device=next(iter(copies.values())).x.device)
            torch.distributed.all_reduce(whole, group=self.how.group)
            seen, n = copies, int(whole)
        rows = {path: of_layer(factors, self.p) for path, factors in seen.items()}
        never = [Skipped(slot.path, "was not called as a module") for slot in self._slots if slot.path not in seen]
        notes = ("labels are the training's targets: once the model fits them this is no Fisher",)
        return Report(rows, "empirical", n, self.p, (*self.skipped, *never), notes, list(seen)[-1])

    def path_of(self, slot: int) -> str:
        """Path of a slot's layer."""
        return self._slots[slot].path

    def _of(self, path: str) -> LayerFactors:
        (found,) = [slot.factors for slot in self._slots if slot.path == path and slot.factors is not None]
        return found

    def see(
        self, at: int, x: Tensor, gradient: bool, rows: Rows | None = None, entries: int | None = None
    ) -> Rows | None:
        """Add the rows of a call's input, or of its output's gradient.

        Args:
            at: the layer's slot.
            x: the tensor.
            gradient: which of the two it is.
            rows: of a gradient, what the call's input gave here; None takes the last call.
            entries: of a gradient, those of the call's batch; None takes the last one's.
        """
        if at == START:
            self.entries = len(x) if x.dim() else 1
            self._n += self.entries
            for slot in self._slots:
                slot.calls = []
            return None
        slot, started = self._slots[at], time.perf_counter()
        kind = x.device.type
        full = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        with torch.no_grad(), full:
            if gradient:
                self._see_gradient(slot, x.detach(), rows, entries)
            else:
                rows = self._see_input(slot, x.detach())
        self.own_s += time.perf_counter() - started
        return rows

    def _see_input(self, slot: _Slot, x: Tensor) -> Rows:
        if slot.factors is None:
            slot.factors = LayerFactors(slot.path, slot.module, self.how, x.device)
        self._order[slot.path] = None
        keep = slot.factors.keep(x, None)
        if not slot.calls:
            slot.factors.add_terms(self._terms(self.entries or len(x)))
        rows = (keep, slot.factors.add_inputs(x, keep))
        slot.calls.append(rows)
        return rows

    def _see_gradient(self, slot: _Slot, g: Tensor, rows: Rows | None, entries: int | None) -> None:
        if slot.factors is None or not slot.calls:
            return
        if rows is None:
            rows = slot.calls.pop() if len(slot.calls) > 1 else slot.calls[0]  # last called, first back
        else:  # of a pass that others may have followed
            slot.calls = [call for call in slot.calls if call is not rows] or [rows]
        scale = self._terms(entries or self.entries or len(g)) / _number(self.loss_scale)
        slot.factors.add_gradient(g, scale=scale**2, keep=rows[0], drawn=rows[1])

    def _terms(self, entries: int) -> float:
        return float(entries) if self.terms is None else _number(self.terms)


class Hook:
    """A forward hook of one slot, or the pre-hook of the model. Copied or pickled with its module, it does nothing."""

    def __init__(self, tracker: CovarianceTracker | None = None, slot: int = START) -> None:
        self.tracker = tracker
        self.slot = slot

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()

    def __call__(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any = None) -> Any:
        """What torch calls: an output in the layer's place, or nothing."""
        tracker, slot = self.tracker, self.slot
        if tracker is None:
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling:
            tracker.eager.add(slot)
        if not tracker.armed:
            return None
        if slot == START and not compiling:
            tracker.idle = not torch.is_grad_enabled()  # reentrant checkpointing turns gradients off further inside
        if not torch.is_grad_enabled() if compiling else tracker.idle:
            return None
        tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
        if slot == START:
            if tensors:
                _hand_over(tracker, tensors[0], slot)
            return None
        refuse(tracker.path_of(slot), tensors[0] if tensors else None, output)
        if compiling:
            _track(tracker.token, tensors[0].detach(), tracker.key, slot, False)
            return _through(output, tracker.key, slot) if output.requires_grad and tracker.gradients else None
        rows = None if recomputing() else tracker.see(slot, tensors[0], False)
        replaced, entries = None, tracker.entries
        if output.requires_grad and tracker.gradients:
            if output._is_view():  # writing over a view in place would put another node in this one's place
                replaced = output = torch.ops.aten._unsafe_view(output, output.shape)
            output.register_hook(lambda gradient: _returned(tracker, slot, gradient, rows, entries))
        return replaced


def _returned(tracker: CovarianceTracker, slot: int, gradient: Tensor, rows: Rows | None, entries: int) -> None:
    tracker.see(slot, gradient, True, rows, entries)


def _hand_over(tracker: CovarianceTracker, x: Tensor, slot: int) -> None:
    if torch.compiler.is_compiling():
        _track(tracker.token, x.detach(), tracker.key, slot, False)
    elif not recomputing():
        tracker.see(slot, x, False)


def _number(given: Number) -> float:
    return float(given() if callable(given) else given)


def _copied(factors: LayerFactors) -> LayerFactors:
    """With sums of its own."""
    made = copy.copy(factors)
    made.x, made.g = copy.deepcopy(factors.x), copy.deepcopy(factors.g)
    return made
