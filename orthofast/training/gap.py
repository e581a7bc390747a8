"""How orthogonal the samples of a batch are, layer after layer, in a real network over a loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.metrics.gram import orthogonality_gap, singular_value_gap
from orthofast.metrics.theory import gap_bounds
from orthofast.training.layers import Select, Skipped, selector
from orthofast.training.passes import first_tensor, forward_passes, modules_by_path, unwrapped

GAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonality_gap": orthogonality_gap,
    "singular_value_gap": singular_value_gap,
}
INPUT = "(input)"  # name of what the model is given


@dataclass(frozen=True, slots=True)
class LayerGap:
    """The gap of one module's outputs.

    Attributes:
        mean: over batches.
        std: between batches, of a population; 0 for one.
        low: the least value n samples of length d can have.
        high: the largest, of rank one.
        n: samples of a batch.
        d: numbers of a sample, in the first batch.
        batches: how many were averaged: those with as many samples as the first.
        nonfinite: batches whose outputs held NaN or Inf, or were all 0; left out of the mean.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int
    d: int
    batches: int
    nonfinite: int


@dataclass(frozen=True, slots=True)
class GapReport:
    """Gaps by layer; ``print`` it.

    Attributes:
        metric: "orthogonality_gap" or "singular_value_gap".
        layers: by path, in the order they ran; "(input)" is what the model was given, "a#2" the second call of a.
        batches: how many ran.
        uneven: how many of these had another number of samples than the first; they are left out, since the values a
            gap can take depend on that number.
        skipped: modules without a gap, with the reason.
    """

    metric: str
    layers: dict[str, LayerGap]
    batches: int
    uneven: int
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "metric": self.metric,
            "batches": self.batches,
            "uneven": self.uneven,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        width = max([len("layer"), *map(len, self.layers)])
        lines = [f"{'layer':{width}}  {'mean':>8}  {'std':>8}  {'low':>8}  {'high':>8}  samples"]
        for name, layer in self.layers.items():
            numbers = "  ".join(f"{value:8.4f}" for value in (layer.mean, layer.std, layer.low, layer.high))
            lines.append(f"{name:{width}}  {numbers}  {layer.n} x {layer.d}")
        lines.append(f"{self.metric}, mean of {self.batches - self.uneven} batches")
        if self.uneven:
            lines.append(f"left out: {self.uneven} batches of another size than the first")
        lines += [f"not measured: {name or '(model)'} {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


@dataclass(slots=True)
class _Seen:
    """Gaps of one module's outputs, one a batch of n samples."""

    n: int
    d: int
    values: list[Tensor] = field(default_factory=list)  # () float64 each, not read before the end


def representation_gaps(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    select: Select = None,
    metric: str = "orthogonality_gap",
    positions: bool = False,
    training: bool | None = None,
    batches: int | None = None,
    inputs: Callable[[Any], Any] | None = None,
) -> GapReport:
    """Orthogonality gap of the samples of each batch at every layer of a network, averaged over a loader.

    Daneshmand et al. 2021, Section 5 and Appendix Fig. 6: with batch norm the gap falls from layer to layer and
    settles, without it rises. A sample is all a module makes of one entry of the batch, maps and positions flattened.
    The model runs once over the data, eagerly and without gradients; its mode, buffers, hooks and random numbers are as
    before afterwards. Under data or model parallelism the gaps are those of this process's batches.

    Args:
        model: any.
        loader: of inputs, of (inputs, targets), or of mappings, taken as keyword arguments. All batches of one size:
            others are left out and counted.
        select: which modules, by path or type as in :func:`orthofast.training.find_layers`; containers too. None: the
            model's input and every module that holds no others.
        metric: "orthogonality_gap", Eq. 2; "singular_value_gap", what the public code records of the logits in
            training (select the last layer).
        positions: every position of a sequence or an image is a sample, and a vector of the last dimension (of a
            convolution or an image: of its channels).
        training: the mode to run in: batch norm with the statistics of the batch (True), as in the paper, or with its
            running ones (False). None: as the model is.
        batches: how many of the loader's; None for all.
        inputs: what the model takes of a batch, where the above is not it.

    Returns:
        :class:`GapReport`.

    Raises:
        InputError: if an argument cannot be used, nothing is chosen, or no batch runs.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64))))
    >>> data = [torch.randn(8, 64) + 2 for _ in range(3)]  # samples that point the same way
    >>> found = representation_gaps(net, data, select=["(input)", nn.BatchNorm1d], training=True).layers
    >>> list(found)[:3], found["(input)"].mean > 0.7, found["15"].mean < 0.3
    (['(input)', '1', '3'], True, True)
    """
    if metric not in GAPS:
        raise InputError(f"metric needs one of {', '.join(GAPS)}, got {metric!r}")
    if not isinstance(model, nn.Module):
        raise InputError(f"model needs a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    chosen = _chosen(model, select)
    watcher = _Watcher(GAPS[metric], positions)
    with ExitStack() as hooks:
        for path, module in chosen.items():
            if module is model and path == INPUT:
                hook = model.register_forward_pre_hook(watcher.before, with_kwargs=True)
            else:
                hook = module.register_forward_hook(watcher.after(path))
            hooks.callback(hook.remove)
        passes = forward_passes(model, loader, training=training, batches=batches, inputs=inputs)
        with closing(passes):
            sizes = [watcher.settle() for _ in passes]
    layers = {name: _row(seen, metric) for name, seen in watcher.seen.items()}
    never = [Skipped(path, "was never called as a module") for path in chosen if path not in watcher.known]
    if not layers and not watcher.reasons:
        raise InputError(f"model called none of the {len(chosen)} modules that are chosen; leave select out to see all")
    reasons = [Skipped(name, reason) for name, reason in watcher.reasons.items() if name not in layers]
    return GapReport(metric, layers, len(sizes), watcher.uneven, (*reasons, *never))


class _Watcher:
    """Hooks of one call of :func:`representation_gaps`."""

    def __init__(self, gap: Callable[[Tensor], Tensor], positions: bool) -> None:
        self.gap, self.positions = gap, positions
        self.seen: dict[str, _Seen] = {}
        self.reasons: dict[str, str] = {}
        self.known: set[str] = set()
        self.uneven = 0
        self._size: int | None = None  # samples of the first batch
        self._batch: list[tuple[str, Tensor, int, int, int]] = []
        self._calls: dict[str, int] = {}

    def before(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """The model's input."""
        self._see(INPUT, module, (*given, *named.values()))

    def after(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        """The hook of one module."""

        def hook(module: nn.Module, given: Any, output: Any) -> None:
            self._see(path, module, output)

        return hook

    def settle(self) -> int:
        """After a batch: keep its gaps if it is of the first one's size, which is returned."""
        rows, self._batch = self._batch, []
        self._calls.clear()
        entries = max((entries for *_, entries in rows), default=0)
        self._size = entries if self._size is None else self._size
        if entries != self._size:
            self.uneven += 1
            return entries
        for name, value, n, d, _ in rows:
            seen = self.seen.setdefault(name, _Seen(n, d))
            if seen.n == n:
                seen.values.append(value)
        return entries

    def _see(self, path: str, module: nn.Module, output: Any) -> None:
        self.known.add(path)
        call = self._calls[path] = self._calls.get(path, 0) + 1
        name = path if call == 1 else f"{path}#{call}"
        x = first_tensor(output)
        if x is None or x.dim() < 2:
            self.reasons[name] = "gives no floating-point tensor with samples and features"
            return
        rows = samples_of(module if path != INPUT else None, x.detach(), self.positions)
        n, d = rows.shape
        if n < 2 or d < 1:
            self.reasons[name] = f"gives {n} sample{'' if n == 1 else 's'} of length {d}, and a gap needs two samples"
            return
        with torch.autocast(x.device.type, enabled=False):
            self._batch.append((name, self.gap(rows), n, d, len(x)))


def samples_of(module: nn.Module | None, x: Tensor, positions: bool) -> Tensor:
    """The samples a tensor holds, a row each: (entries, all the rest), or each position for itself.

    Args:
        module: that made it; of convolutions, and of tensors of more than three dimensions, channels come second.
        x: (entries, ...).
        positions: see :func:`representation_gaps`.
    """
    if not positions:
        return x.flatten(1)
    channels_second = x.dim() > 3 or isinstance(module, nn.modules.conv._ConvNd)
    x = x.movedim(1, -1) if channels_second and x.dim() > 2 else x
    return x.reshape(-1, x.shape[-1])


def _chosen(model: nn.Module, select: Select) -> dict[str, nn.Module]:
    modules = modules_by_path(model)
    if select is None:
        leaves = {path: module for path, module in modules.items() if path and _is_leaf(module)}
        return {INPUT: model, **(leaves or {"": model})}
    chosen = selector(select)
    found = {INPUT: model} if chosen(INPUT, nn.Identity()) else {}
    found |= {path: module for path, module in modules.items() if chosen(path, module)}
    if not found:
        some = ", ".join([INPUT, *filter(None, modules)][:5])
        raise InputError(f"select={select!r} chooses none of the model's modules; there are {some}, ...")
    return found


def _is_leaf(module: nn.Module) -> bool:
    """Whether it holds no modules but those that compute its weight."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def _row(seen: _Seen, metric: str) -> LayerGap:
    values = torch.stack(seen.values)
    known = values[values.isfinite()]
    if metric == "orthogonality_gap":
        low, high = gap_bounds(seen.n, seen.d)
    else:
        low, high = 0.0, math.sqrt(2 - 2 / math.sqrt(min(seen.n, seen.d)))
    return LayerGap(
        mean=known.mean().item() if len(known) else math.nan,
        std=known.std(correction=0).item() if len(known) else math.nan,
        low=low,
        high=high,
        n=seen.n,
        d=seen.d,
        batches=len(known),
        nonfinite=len(values) - len(known),
    )
