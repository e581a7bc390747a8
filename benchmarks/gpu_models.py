"""Blocks of many matrices and of gradients: a whole model, ten thousand filters, value with gradient, drift."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

import orthofast
from benchmarks import gate
from benchmarks.gpu_cases import GpuCase, bert_on, draw, filters_shape, gaussian, gradient_case
from benchmarks.gpu_device import Device
from benchmarks.gpu_peers import backends
from benchmarks.gpu_race import GpuMeasurement, race, settle
from benchmarks.peers import OURS, RIVAL, Contestant, naive
from orthofast.errors import OrthofastError
from orthofast.kernels import gram_stats, gram_stats_many
from orthofast.records import GramStats

if TYPE_CHECKING:
    from benchmarks.gpu_blocks import Context

GRADIENT_TOLERANCE = 2e-2  # relative; a cosine within rounding of 0 may take either sign
DRIFT_TOLERANCE = 1e-3
BLOCK = 1024


class ListContest:
    """Data that is no single matrix: drawn, and judged, by functions."""

    def __init__(
        self,
        names: tuple[str, str, int, int, str],
        rounds: tuple[int, int],
        item_bytes: int,
        draw_data: Callable[[int], Any],
        error: Callable[[Any, Any], float],
        limit: Callable[[Contestant], float],
    ) -> None:
        self.names = names
        self.least, self.most = rounds
        self.item_bytes, self.every_round = item_bytes, False
        self.draw, self.error, self.limit = draw_data, error, limit

    def blank(self, contestant: Contestant) -> GpuMeasurement:
        return GpuMeasurement(*self.names, contestant.name, contestant.group)

    def refuses(self, contestant: Contestant) -> str | None:
        """Nobody is refused by shape; who cannot says so when called."""
        return None

    def check(self, measured: GpuMeasurement, contestant: Contestant, result: Any, seed: int, data: Any) -> None:
        settle(measured, self.error(result, data), self.limit(contestant))


def _race(context: Context, section: str, contest: ListContest, contestants: list[Contestant], share: float) -> None:
    label = f"{section} {contest.names[4]}"
    if label in context.journal.done:
        return
    for measured in race(contest, contestants, context.device, context.left_s * share, context.journal):
        context.journal.row(section, measured.as_dict())
    context.journal.case_done(label)


def _alone(x: Tensor, backend: str) -> Callable[[], object]:
    return lambda: gram_stats(x, backend=backend)


# --- a whole model ---------------------------------------------------------------------------------------------------


def model(context: Context) -> None:
    """Rows and columns of all matrices of a BERT-base body in one call; beside it a replayed graph and naive loops."""
    device = context.device
    for left, dtype in ((0.6, "bfloat16"), (1.0, "float32")):
        contest = ListContest(
            ("rehearsal body" if context.dry else "BERT-base body", "rows+cols", 4 if context.dry else 144, 0, dtype),
            (2, 2) if context.dry else (7, 21),
            (768 if context.dry else 85_000_000) * getattr(torch, dtype).itemsize,
            partial(_body, device.torch_device, dtype, dry=context.dry),
            _many_error,
            lambda contestant: 5e-2 if contestant.group == RIVAL else 1e-4,
        )
        entries = [Contestant("naive loop", RIVAL, lambda xs: lambda: [naive(x) for x in xs], None)]
        for name in backends():
            entries.append(Contestant(name, OURS, partial(_together, backend=name), None))
            if not context.dry and name != "reference":
                entries.append(Contestant(f"{name}@graph", OURS, partial(_captured, backend=name), None))
        _race(context, "model", contest, entries, left)


def _together(sets: list[Tensor], backend: str) -> Callable[[], object]:
    return lambda: gram_stats_many(sets, backend=backend)


def _captured(sets: list[Tensor], backend: str) -> Callable[[], object]:
    """The same call, captured once and replayed: no Python in between."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gram_stats_many(sets, backend=backend)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        records = gram_stats_many(sets, backend=backend)

    def replay() -> list[GramStats]:
        graph.replay()
        return records

    return replay


def _body(device: torch.device, dtype: str, seed: int, *, dry: bool) -> list[Tensor]:
    return bert_on(device, dtype, seed, dry=dry)


def _many_error(result: Any, sets: list[Tensor]) -> float:
    """Largest error of any matrix, in cosines, over the mean |cos|."""
    if len(result) != len(sets):
        return float("inf")
    worst = 0.0
    for found, vectors in zip(result, sets, strict=True):
        value = float(found) if isinstance(found, Tensor) else float(found.abs_sum.sum() / found.pairs.sum())
        error = gate.relative_error(value, gate.expected_pii(vectors))
        worst = error if not error <= worst else worst
    return worst


# --- small filters ---------------------------------------------------------------------------------------------------


def filters(context: Context) -> None:
    """Ten thousand sets of 64 filters: memory-bound, so beside one read of the data at the copy's bandwidth."""
    device = context.device
    items, n, d = shape = filters_shape(dry=context.dry)
    for share, dtype in ((0.6, "bfloat16"), (1.0, "float32")):
        contest = ListContest(
            ("x".join(map(str, shape)), "rows", n, d, dtype),
            (2, 2) if context.dry else (7, 21),
            items * n * d * getattr(torch, dtype).itemsize,
            partial(_filters_of, shape, dtype, device.torch_device),
            _batch_error,
            lambda contestant: 5e-2 if contestant.group == RIVAL else 1e-4,
        )
        entries = [Contestant("naive batched", RIVAL, lambda x: lambda: _naive_batched(x), None)]
        entries += [Contestant(name, OURS, partial(_alone, backend=name), None) for name in backends()]
        _race(context, "filters", contest, entries, share)


def _filters_of(shape: tuple[int, int, int], dtype: str, device: torch.device, seed: int) -> Tensor:
    return gaussian(shape, dtype, seed, device)


def _naive_batched(x: Tensor) -> Tensor:
    """(b,) mean |cos| by one batched product."""
    unit = functional.normalize(x, dim=2)
    size = (unit @ unit.transpose(1, 2)).abs()
    n = x.shape[1]
    whole = size.sum((1, 2), dtype=torch.float32) - size.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float32)
    return whole / (n * (n - 1))


def _batch_error(result: Any, x: Tensor) -> float:
    """Relative error of the mean over all items, and the largest of any item, in means of |cos|."""
    value = result if isinstance(result, Tensor) else result.abs_sum / result.pairs
    n, worst = x.shape[1], torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), BLOCK):
        unit = functional.normalize(x[start : start + BLOCK].double(), dim=2)
        true = (unit @ unit.transpose(1, 2)).abs().triu(1).sum((1, 2)) / (n * (n - 1) / 2)
        worst = torch.maximum(worst, ((value[start : start + BLOCK].double() - true).abs() / true).nan_to_num(9).max())
    return float(worst)


# --- value with gradient ---------------------------------------------------------------------------------------------


def gradient(context: Context) -> None:
    """Value with gradient of ours and of autograd through naive torch, beside the value alone."""
    case = gradient_case(dry=context.dry)
    contest = ListContest(
        (*case.place[::2], case.n, case.d, case.dtype),
        (case.least, case.most),
        case.item_bytes,
        lambda seed: draw(case, seed, context.device.torch_device),
        _gradient_error(case, context.device),
        lambda contestant: GRADIENT_TOLERANCE if contestant.group == OURS else 5e-2,
    )
    entries = [Contestant("autograd", RIVAL, lambda x: lambda: _backward(naive, x), None)]
    for name in backends():
        entries.append(Contestant(f"{name}+gradient", OURS, partial(_own_gradient, backend=name), None))
        entries.append(Contestant(name, OURS, partial(_alone, backend=name), None))
    _race(context, "gradient", contest, entries, 1.0)


def _backward(mean: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = mean(leaf)
        if not value.requires_grad:
            raise RuntimeError("the value is not differentiable here")
        value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def _own_gradient(x: Tensor, backend: str) -> Callable[[], object]:
    return lambda: _backward(lambda leaf: orthofast.pii(leaf, backend=backend), x)


def _gradient_error(case: GpuCase, device: Device) -> Callable[[Any, Tensor], float]:
    known: list[tuple[int, Tensor]] = []

    def error(result: Any, x: Tensor) -> float:
        if isinstance(result, GramStats):
            assert result.abs_sum is not None
            return gate.relative_error(float(result.abs_sum / result.pairs), gate.expected_pii(x))
        if not known or known[0][0] != x.data_ptr():
            known[:] = [(x.data_ptr(), true_gradient(x))]
        truth = known[0][1]
        return float((result[1].double() - truth).norm() / truth.norm())

    return error


def true_gradient(x: Tensor) -> Tensor:
    """d mean |cos| / dx (n, d) in float64: (G - (G . u) u) / |w| with G_i = sum of sign(c_ij) u_j over the pairs."""
    n = len(x)
    wide = x.double()
    length = wide.square().sum(1, keepdim=True).sqrt()
    unit = wide / length
    pull = torch.empty_like(unit)
    for start in range(0, n, BLOCK):
        sign = (unit[start : start + BLOCK] @ unit.T).sign_()
        sign.diagonal(start).zero_()
        pull[start : start + BLOCK] = sign @ unit
    pull -= (pull * unit).sum(1, keepdim=True) * unit
    return pull / length / (n * (n - 1) / 2)


# --- drift -----------------------------------------------------------------------------------------------------------


def drift(context: Context) -> None:
    """Mean over pairs of | |cos before| - |cos after| |, from both matrices in one pass, beside the naive two."""
    ours = _drift_function()
    if ours is None:
        context.journal.row("left_out", {"place": ["drift"], "reason": "orthofast has no conformal_drift yet"})
        return
    case = gradient_case(dry=context.dry)

    def pair(seed: int) -> tuple[Tensor, Tensor]:
        before = draw(case, seed, context.device.torch_device)
        noise = gaussian(before.shape, case.dtype, seed + 10_000, context.device.torch_device)
        return before, before + 0.1 * noise

    contest = ListContest(
        (*case.place[::2], case.n, case.d, case.dtype),
        (case.least, case.most),
        2 * case.item_bytes,
        pair,
        lambda result, both: gate.relative_error(_first(result), _true_drift(*both)),
        lambda contestant: DRIFT_TOLERANCE if contestant.group == OURS else 5e-2,
    )
    entries = [
        Contestant("naive", RIVAL, lambda both: lambda: _naive_drift(*both), None),
        Contestant("ours", OURS, lambda both: lambda: ours(*both), None),
    ]
    _race(context, "drift", contest, entries, 1.0)


def _drift_function() -> Callable[..., Any] | None:
    """The public function, where this version has one."""
    for module in ("orthofast", "orthofast.metrics", "orthofast.metrics.drift"):
        try:
            found = getattr(import_module(module), "conformal_drift", None)
        except (ImportError, OrthofastError):
            continue
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None


def _naive_drift(before: Tensor, after: Tensor) -> Tensor:
    sizes = [(unit @ unit.T).abs() for unit in (functional.normalize(w, dim=1) for w in (before, after))]
    n = len(before)
    return (sizes[0] - sizes[1]).abs_().sum(dtype=torch.float32) / (n * (n - 1))


def _true_drift(before: Tensor, after: Tensor) -> float:
    n = len(before)
    units = [functional.normalize(w.double(), dim=1) for w in (before, after)]
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    for start in range(0, n, BLOCK):
        sizes = [(unit[start : start + BLOCK] @ unit.T).abs_() for unit in units]
        moved = (sizes[0] - sizes[1]).abs_()
        moved.diagonal(start).zero_()
        total += moved.sum()
    return float(total) / (n * (n - 1))


def _first(result: Any) -> float:
    """The change of sizes, where a function returns several figures."""
    if isinstance(result, Tensor | float):
        return float(result)
    named = getattr(result, "abs_drift", None)
    return float(named if named is not None else result[0])
