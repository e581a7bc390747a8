"""Batch norm as a regulariser over a whole model: which layer each batch norm follows, and what it makes of its weight.

A batch norm belongs to the layer whose output is its very input. With data that is seen while the model runs; without,
the model is traced by ``torch.fx``, and a model that cannot be traced is refused rather than paired by names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from orthofast.errors import InputError
from orthofast.metrics.batchnorm import (
    BATCH_NORMS,
    CONVOLUTIONS,
    LINEAR,
    POWERS,
    TRANSPOSED,
    EffectiveNorms,
    OutputMoments,
    effective_norms,
    equivalent_from,
    merge_moments,
    moments_of_outputs,
    running_variance,
    variance_from,
)
from orthofast.training.layers import Skipped
from orthofast.training.passes import forward_passes, modules_by_path, unwrapped

LAYERS = LINEAR + CONVOLUTIONS + TRANSPOSED


class Pair(NamedTuple):
    """A layer and the batch norm that takes its output.

    Attributes:
        layer: its path.
        bn: the batch norm's.
    """

    layer: str
    bn: str


@dataclass(frozen=True, slots=True, eq=False)
class LayerRegularization:
    """What a batch norm makes of the layer before it, per output neuron or channel.

    Attributes:
        bn: path of the batch norm.
        rate: (out,) float64, alpha ("std"); ``rate.square()`` is "var".
        norms: of the equivalent weight, by power, "std" and "var": see :func:`orthofast.metrics.bn_equivalent_weight`.
        raw: norms of the layer's own weight.
        samples: values of a neuron the rate is of; None from running statistics.
        error: why there are no numbers, or an empty string.
    """

    bn: str
    rate: Tensor
    norms: dict[str, EffectiveNorms]
    raw: EffectiveNorms
    samples: int | None
    error: str = ""

    def means(self) -> dict[str, float]:
        """Means over neurons: what Annamalai et al. 2022, Tables I and II, print of a layer."""
        if self.error:
            return {}
        found = {"rate_std": self.rate, "rate_var": self.rate.square()}
        for power, norms in (*self.norms.items(), ("raw", self.raw)):
            found |= {f"l1_{power}": norms.l1, f"l2_{power}": norms.l2}
        return {name: value.mean().item() for name, value in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class RegularizationReport:
    """The layers of a model that batch norm follows; ``print`` it.

    Attributes:
        layers: by path, in the order they run.
        center: whether rates are of centred outputs.
        unpaired: layers that no batch norm follows, and batch norms that follow no layer, with the reason.
    """

    layers: dict[str, LayerRegularization]
    center: bool
    unpaired: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """Means over neurons, for JSON."""
        rows = {
            name: {"bn": layer.bn, "neurons": len(layer.rate), "samples": layer.samples, "error": layer.error}
            | layer.means()
            for name, layer in self.layers.items()
        }
        return {"center": self.center, "layers": rows, "unpaired": dict(self.unpaired)}

    def __str__(self) -> str:
        keys = ("rate_std", "rate_var", "l1_std", "l2_std", "l1_var", "l2_var")
        width = max([len("layer"), *map(len, self.layers)])
        lines = [f"{'layer':{width}}  neurons  " + "  ".join(f"{key:>10}" for key in keys)]
        for name, layer in self.layers.items():
            means = layer.means()
            numbers = layer.error or "  ".join(f"{means[key]:10.4g}" for key in keys)
            lines.append(f"{name:{width}}  {len(layer.rate):7}  {numbers}")
        lines.append(f"means over neurons; layers and batch norms without a partner: {len(self.unpaired)}")
        return "\n".join(lines)


def bn_regularization(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    center: bool = True,
    samples: int | None = None,
    training: bool | None = None,
    batches: int | None = None,
    inputs: Callable[[Any], Any] | None = None,
) -> RegularizationReport:
    """Regularisation rate and effective norms of every layer that a batch norm follows, in one call.

    Annamalai et al. 2022, Tables I and II and Fig. 2, for Linear, Conv1d to 3d and transposed convolutions.

    Args:
        model: any. Without a loader it must be one ``torch.fx`` can trace.
        loader: of inputs, of (inputs, targets), or of mappings, taken as keyword arguments; rates are then over all of
            its data, added up batch by batch. None: from running statistics alone, without data.
        center: rates of centred outputs, as batch norm divides by; False: root mean squares, as the paper's formula.
        samples: values of a neuron in a batch, for running statistics; see :func:`orthofast.metrics.bn_rate`.
        training: the mode to run in, see :func:`orthofast.training.representation_gaps`, like ``batches``, ``inputs``.
        batches: how many of the loader's; None for all.
        inputs: what the model takes of a batch.

    Returns:
        :class:`RegularizationReport`. A pair that cannot be measured is a row with its error: a batch norm without
        running statistics, or one that several layers share, whose statistics are of them all.

    Raises:
        InputError: if an argument cannot be used, the model has no layer with a batch norm behind it, or cannot be
            traced without data.

    >>> net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    >>> report = bn_regularization(net, [torch.randn(32, 6) for _ in range(4)])
    >>> list(report.layers), report.layers["0"].bn, report.layers["0"].samples, report.unpaired[0].name
    (['0'], '1', 128, '3')
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model needs a torch.nn.Module, got {type(model).__name__}")
    if samples is not None and (type(samples) is not int or samples < 2):
        raise InputError(f"samples needs an integer of at least 2, values of a neuron in a batch, got {samples!r}")
    model = unwrapped(model)
    if loader is None:
        moments: dict[Pair, OutputMoments] = {}
        pairs = bn_pairs(model)
    else:
        moments = _moments(model, loader, training, batches, inputs)
        pairs = list(moments)
    modules = modules_by_path(model)
    if not pairs:
        raise InputError("model has no Linear or convolution whose output a batch norm takes as it is")
    users: dict[str, int] = {}
    for pair in pairs:
        users[pair.bn] = users.get(pair.bn, 0) + 1
    layers: dict[str, LayerRegularization] = {}
    for pair in pairs:
        name = pair.layer if pair.layer not in layers else f"{pair.layer} -> {pair.bn}"
        layers[name] = _row(modules, pair, moments.get(pair), center, samples, users[pair.bn])
    return RegularizationReport(layers, center, tuple(_unpaired(modules, pairs)))


def bn_pairs(model: nn.Module) -> list[Pair]:
    """Layers and the batch norms that take their outputs, by tracing the model with ``torch.fx``, in running order.

    Raises:
        InputError: if the model cannot be traced, as where its control flow depends on data.
    """
    paths = {id(module): path for path, module in modules_by_path(model).items()}
    try:
        with torch.no_grad():
            graph = fx.symbolic_trace(model)
    except Exception as error:
        raise InputError(
            f"model cannot be traced without data ({type(error).__name__}: {str(error).splitlines()[0][:100]}); "
            "pass a loader, such as a list of one batch"
        ) from error
    named = dict(model.named_modules(remove_duplicate=False))

    def module_of(node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return named.get(str(node.target))
        return None

    found = []
    for node in graph.graph.nodes:
        bn = module_of(node)
        if not isinstance(bn, BATCH_NORMS):
            continue
        source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        layer = module_of(source)
        if isinstance(layer, LAYERS):
            found.append(Pair(paths[id(layer)], paths[id(bn)]))
    return list(dict.fromkeys(found))


def _moments(
    model: nn.Module,
    loader: Iterable[Any],
    training: bool | None,
    batches: int | None,
    inputs: Callable[[Any], Any] | None,
) -> dict[Pair, OutputMoments]:
    """Moments of every layer's outputs a batch norm was seen to take, over all data."""
    found: dict[Pair, OutputMoments] = {}
    made: dict[int, tuple[weakref.ref[Tensor], int, str, nn.Module]] = {}  # by id, of a layer's output

    def after(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = (weakref.ref(output), output._version, path, module)

        return hook

    def before(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x: Tensor = given[0] if given else next(iter(named.values()))
            source, version, layer, owner = made.get(id(x), (None, 0, "", module))
            if source is None or source() is not x or x._version != version:
                return  # made by another operation, or changed in place since
            pair = Pair(layer, path)
            part = moments_of_outputs(owner, x)
            found[pair] = merge_moments([found[pair], part]) if pair in found else part

        return hook

    with ExitStack() as hooks:
        for path, module in modules_by_path(model).items():
            if isinstance(module, LAYERS):
                hooks.callback(module.register_forward_hook(after(path)).remove)
            elif isinstance(module, BATCH_NORMS):
                hooks.callback(module.register_forward_pre_hook(before(path), with_kwargs=True).remove)
        passes = forward_passes(model, loader, training=training, batches=batches, inputs=inputs)
        with closing(passes):
            for _ in passes:
                made.clear()
    return found


def _row(
    modules: dict[str, nn.Module],
    pair: Pair,
    moments: OutputMoments | None,
    center: bool,
    samples: int | None,
    users: int,
) -> LayerRegularization:
    layer, bn = modules[pair.layer], modules[pair.bn]
    try:
        raw = effective_norms(layer, layer.weight)  # type: ignore[arg-type]
        if moments is not None:
            variance = variance_from(moments, center=center)
        elif users > 1:
            raise InputError(f"{pair.bn} follows {users} layers, and its running statistics mix them; pass a loader")
        else:
            variance = running_variance(layer, bn, center=center, samples=samples)
        norms = {power: effective_norms(layer, equivalent_from(layer, bn, variance, power)) for power in POWERS}
    except (InputError, RuntimeError) as error:
        none = torch.zeros(0, dtype=torch.float64)
        return LayerRegularization(pair.bn, none, {}, EffectiveNorms(none, none), None, str(error))
    return LayerRegularization(pair.bn, variance.sqrt(), norms, raw, None if moments is None else moments.count)


def _unpaired(modules: dict[str, nn.Module], pairs: list[Pair]) -> list[Skipped]:
    layers, norms = {pair.layer for pair in pairs}, {pair.bn for pair in pairs}
    found = []
    for path, module in modules.items():
        if isinstance(module, LAYERS) and path not in layers:
            found.append(Skipped(path, "gives its output to no batch norm"))
        elif isinstance(module, BATCH_NORMS) and path not in norms:
            found.append(Skipped(path, "takes the output of no Linear or convolution as it is"))
    return found
