"""Taps: hooks on layers that add up inputs as a batch passes and remember where to ask for output gradients.

Gradients are asked for the layers' outputs only, so that no gradient of a weight is computed. The place of an output in
the graph is noted before anything later overwrites it in place, so that gradients are those of the layer's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from orthofast.errors import InputError
from orthofast.training.capture import CONVOLUTIONS, recomputing
from orthofast.training.factors import Factors, LayerFactors

PROBES = 0x5EED  # seed of the vectors of the self-check


@dataclass(slots=True, eq=False)
class Call:
    """One call of a layer in the batch at hand."""

    layer: LayerFactors
    edge: GradientEdge
    keep: Tensor | None
    drawn: Tensor | None
    x: Tensor | None  # only where asked for


@dataclass(slots=True, eq=False)
class Neurons:
    """How the outputs that follow a layer fire, over all batches.

    Attributes:
        fired: (n,) float64, examples with an output above 0.
        examples: how many there were.
    """

    fired: Tensor
    examples: int

    @classmethod
    def of(cls, x: Tensor, axis: int) -> Neurons:
        """Count one call's outputs; neurons lie along ``axis``."""
        rest = [place for place in range(x.dim()) if place != axis % x.dim()]
        above = torch.gt(x, 0, out=torch.empty_like(x, dtype=torch.float32))  # adds up faster than booleans
        fired = above.sum(rest).to(torch.float64)
        return cls(fired, x.numel() // max(1, len(fired)))

    def add(self, other: Neurons) -> None:
        """Count more examples."""
        self.fired += other.fired
        self.examples += other.examples


class Taps:
    """Hooks on the layers of a model, while a ``with`` block lasts.

    Args:
        modules: layers by path.
        firing: modules by path whose outputs are 0 exactly where a neuron does not fire; if there are none, the layers'
            own outputs are counted.
        how: see :class:`orthofast.training.factors.Factors`.

    Attributes:
        layers: what was added up, by path, in the order of the first calls.
        neurons: counts by the path of the layer before.
        calls: of the batch at hand, in order; emptied by :meth:`begin`.
        order: path and module of every call of the first batch.
    """

    def __init__(self, modules: Mapping[str, nn.Module], firing: Iterable[nn.Module], how: Factors) -> None:
        self.how = how
        self.layers: dict[str, LayerFactors] = {}
        self.neurons: dict[str, Neurons] = {}
        self.calls: list[Call] = []
        self.calls_per_batch: dict[str, int] = {}
        self._modules = dict(modules)
        self._firing = list(firing)
        self._mask: Tensor | None = None
        self._keep_inputs = False
        self._last: tuple[str, int] | None = None  # layer called last, and its width
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook_of(path), with_kwargs=True))
        for module in self._firing:
            self._handles.append(module.register_forward_hook(self._count))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.calls = []

    def begin(self, mask: Tensor | None = None, keep_inputs: bool = False) -> None:
        """A batch is about to pass."""
        self.calls, self._last = [], None
        self._mask, self._keep_inputs = mask, keep_inputs

    def add_gradients(self, gradients: Iterable[Tensor | None], scale: float) -> None:
        """Add gradients of all calls, in their order; the squares are multiplied by ``scale``."""
        for call, gradient in zip(self.calls, gradients, strict=True):
            if gradient is not None:
                call.layer.add_gradient(gradient.detach(), scale=scale, keep=call.keep, drawn=call.drawn)

    def _hook_of(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            return None if recomputing() else self._see(path, module, given, named, output)

        return hook

    def _see(self, path: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        x: Any = given[0] if given else next(iter(named.values()), None)
        refuse(path, x, output)
        if not torch.is_grad_enabled():
            raise InputError(
                f"{path} runs without gradients, as under torch.no_grad or reentrant checkpointing; "
                "use checkpoint(..., use_reentrant=False)"
            )
        replaced = None
        if not output.requires_grad:  # nothing before it does: the graph starts here
            replaced = output = output.detach().requires_grad_().clone()
        elif output._is_view():  # writing over a view in place would put another node in this one's place
            replaced = output = torch.ops.aten._unsafe_view(output, output.shape)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            layer = self.layers.get(path)
            if layer is None:
                layer = self.layers[path] = LayerFactors(path, module, self.how, x.device)
            keep = layer.keep(x, self._mask)
            drawn = layer.add_inputs(x.detach(), keep)
            self._last = (path, layer.d_out * layer.groups)
            if not self._firing:
                self._count(module, (), output)
        inputs = x.detach() if self._keep_inputs else None
        self.calls.append(Call(layer, get_gradient_edge(output), keep, drawn, inputs))
        return replaced

    def _count(self, module: nn.Module, given: Any, output: Any) -> None:
        if recomputing() or self._last is None or not isinstance(output, Tensor) or output.dim() < 2:
            return
        path, width = self._last
        wide = isinstance(self._modules[path], CONVOLUTIONS) or output.dim() > 3
        axis = 1 if wide and output.shape[1] == width else -1
        if output.shape[axis] == width and output.is_floating_point():
            found = Neurons.of(output.detach(), axis)
            if path in self.neurons:
                self.neurons[path].add(found)
            else:
                self.neurons[path] = found


def refuse(path: str, x: Any, output: Any) -> None:
    """Say what cannot be measured.

    Raises:
        InputError: for calls that are no function from a tensor to a tensor, and for tensor parallelism.
    """
    if not isinstance(x, Tensor) or not isinstance(output, Tensor):
        raise InputError(f"{path} was not called as a function from a tensor to a tensor; leave it out with layers=")
    if hasattr(x, "full_tensor") or hasattr(output, "full_tensor"):
        raise InputError(
            f"{path} computes with a DTensor, as under tensor parallelism, where no process sees whole rows; "
            "measure a model that is not split that way (FSDP2 and DDP are understood)"
        )


def weight_probe(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed vectors u, one entry a row of the weight, and v, of a row's shape: ``u^T W v`` is one number of it."""
    generator = torch.Generator("cpu").manual_seed(PROBES)
    u, v = torch.randn(len(weight), generator=generator), torch.randn(weight.shape[1:], generator=generator)
    return u.to(weight.device), v.to(weight.device)


def probed_rows(layer: LayerFactors, x: Tensor, gradient: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """() ``u^T G^T X v``: what a call adds to the weight's gradient, probed; u and v swapped where it is (in, out)."""
    module: Any = layer.module
    wide = torch.promote_types(x.dtype if x.is_floating_point() else gradient.dtype, torch.float32)
    g, u, v = gradient.to(wide), u.to(wide), v.to(wide)
    if layer.kind == "conv":
        return (_convolved(module, x.to(wide), v) * torch.einsum("bc...,c->bc...", _batched(module, g), u)).sum()
    of_inputs, of_outputs = (v, u) if isinstance(module, nn.Linear) else (u, v)
    if layer.kind == "embedding":
        y = of_inputs[x] * (x != module.padding_idx if module.padding_idx is not None else 1)
    else:
        y = x.to(wide) @ of_inputs
    return (y * (g @ of_outputs)).sum()


def _convolved(module: Any, x: Tensor, v: Tensor) -> Tensor:
    """(images, out_channels, *positions): every filter replaced by v."""
    x = _batched(module, x)
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(module.kernel_size) - 1]
    filters = v.expand(module.groups, *v.shape)
    if module.padding_mode == "zeros":
        y = conv(x, filters, None, module.stride, module.padding, module.dilation, module.groups)
    else:
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        y = conv(x, filters, None, module.stride, 0, module.dilation, module.groups)
    return y.repeat_interleave(module.out_channels // module.groups, 1)


def _batched(module: Any, x: Tensor) -> Tensor:
    return x if x.dim() == len(module.kernel_size) + 2 else x[None]
