"""conditioning: how well each layer's problem is conditioned, from one pass over data.

Huang et al. 2020 read a layer's curvature off two covariances, ``F_k = Sigma_x (x) Sigma_g`` (Eq. 4, Proposition 1):
of its inputs, and of the gradients of its outputs. This file runs the model over the data; ``taps`` add up what passes
through the layers, ``labels`` say what is sent backwards, ``report`` holds what the covariances' spectra say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from orthofast.errors import InputError
from orthofast.metrics.domination import weight_domination
from orthofast.metrics.spectra import rank_of
from orthofast.training.capture import FIRING, firing_modules
from orthofast.training.covariance import merge_over_ranks
from orthofast.training.factors import Factors, LayerFactors, kind_of
from orthofast.training.labels import Labels, Loss
from orthofast.training.layers import WRAPPERS, Select, Skipped, selector
from orthofast.training.measures import still
from orthofast.training.passes import batches_of, called, device_of, moved, undisturbed, unwrapped
from orthofast.training.report import LayerConditioning, Report, of_layer
from orthofast.training.taps import Taps, probed_rows, weight_probe

P = (0.5, 0.8, 0.9, 1.0)
NORMS = (nn.modules.batchnorm._BatchNorm,)
AGREE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of G^T X with a weight's gradient; coarser dtypes 0.1


def conditioning(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss,
    labels: str = "exact",
    p: Sequence[float] = P,
    layers: Select = None,
    batches: int | None = None,
    factors: Factors | None = None,
) -> Report:
    """Conditioning of every layer of a model on data: largest eigenvalues, kappa_p, dying neurons, weight domination.

    The covariances of each layer's inputs and output gradients are added up batch by batch; no gradient of a weight is
    computed but on the first batch, where ``G^T X`` is held against it. The model runs as it is, eagerly, in the mode
    it is in; its buffers, gradients, hooks and random numbers are as before afterwards.

    Args:
        model: any; DDP and FSDP2 models are measured over all their processes, which must all make this call.
        loader: of (inputs, targets); of dictionaries, which the model takes as keywords and a loss of your own as
            targets, a known one only their "labels"; or of inputs alone. Batches are moved to the model's device.
        loss: ``loss(outputs, targets)``, the mean or sum of its terms: torch's ``nn.CrossEntropyLoss()``,
            ``nn.MSELoss()``, ``nn.BCEWithLogitsLoss()``, their functions, or a function of your own; or
            "cross_entropy" (classes along the last dimension), "mse", "binary_cross_entropy".
        labels: whose gradients Sigma_g is made of. "exact": the expectation over the model's own labels, the Fisher
            (for C classes C - 1 backward passes); "mc": labels drawn from the model; "empirical": the targets, which
            is no Fisher once the model fits them. The last two need no known loss, and targets, respectively.
        p: shares of eigenvalues, see :func:`orthofast.metrics.spectra.condition_number`.
        layers: which, as in :func:`orthofast.training.find_layers`; None for all.
        batches: how many of the loader's; None for all.
        factors: how rows are made and added up, see :class:`orthofast.training.factors.Factors`.

    Returns:
        :class:`orthofast.training.report.Report`; ``print`` it.

    Raises:
        InputError: if an argument cannot be used, or the model computes in a way whose rows cannot be had.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> data = [(torch.randn(64, 4), torch.randint(3, (64,))) for _ in range(2)]
    >>> report = conditioning(model, data, loss=nn.CrossEntropyLoss())
    >>> (report.labels, report.n, report.layers["2"].n_over_d, report.layers["2"].resolved_rank_g)
    ('exact', 128, 16.0, 2)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(p, str) or not isinstance(p, Iterable) or not (shares := tuple(p)):
        raise InputError(f"p needs shares of the eigenvalues in a list, such as [0.5, 1.0], got {p!r}")
    for share in shares:
        rank_of(share, 1)
    if factors is not None and not isinstance(factors, Factors):
        raise InputError(f"factors needs orthofast.training.Factors, got {type(factors).__name__}")
    how = factors or Factors()
    run, modules, skipped = _run(model, loader, loss, labels, layers, batches, how)
    taps, split = run.taps, is_split(model)
    if split or how.group is not None:
        run.merge(how.group)
    rows = {path: run.row(layer, shares) for path, layer in taps.layers.items()}
    never = [Skipped(path, "was never called as a module") for path in modules if path not in rows]
    notes = (*run.notes, *_notes(run.model, taps, split))
    return Report(rows, labels, run.n, shares, (*skipped, *never), notes, run.last)


def collect(
    model: nn.Module, loader: Iterable[Any], *, loss: Loss, labels: str = "exact", factors: Factors | None = None
) -> dict[str, LayerFactors]:
    """The factors alone, by path, as :func:`conditioning` adds them up, of this process; no spectra.

    >>> import torch
    >>> found = collect(torch.nn.Linear(2, 2), [torch.eye(2)], loss="mse")
    >>> found[""].x.compute()
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    run, _, _ = _run(model, loader, loss, labels, None, None, factors or Factors())
    return run.taps.layers


def _run(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    labels: str,
    layers: Select,
    batches: int | None,
    how: Factors,
) -> tuple[_Pass, dict[str, nn.Module], tuple[Skipped, ...]]:
    """All batches through the tapped model."""
    model = unwrapped(model)
    modules, skipped = measured_modules(model, layers)
    asked = Labels(loss, labels, how.mc_samples, torch.Generator("cpu").manual_seed(how.seed))
    taken = batches_of(loader, batches)
    with undisturbed(model, seed=how.seed), Taps(modules, firing_modules(model).values(), how) as taps:
        run = _Pass(model, taps, asked, how)
        with torch.enable_grad():
            for batch in taken:
                run.batch(batch)
    if asked.guessed:
        run.notes.append(
            "the loss could not be tried on parts of a batch: it is taken for the mean over the batch's entries; where "
            "it is a sum or a mean over positions, lambda_max_g and lambda_max_F are off by a factor"
        )
    if not run.n:
        raise InputError("loader gives no batch; pass one that can be iterated now")
    return run, modules, skipped


class _Pass:
    """Runs batches through a tapped model, forwards and as often backwards as the labels ask for."""

    def __init__(self, model: nn.Module, taps: Taps, labels: Labels, how: Factors) -> None:
        self.model, self.taps, self.labels, self.how = model, taps, labels, how
        self.device = device_of(model)
        self.n = 0
        self.last: str | None = None
        self.notes: list[str] = []
        self.errors: dict[str, str] = {}
        self.gradients: dict[str, Tensor] = {}  # of weights, by the mean loss of the first batch
        self.calls: dict[str, int] = {}
        self._first = True

    def batch(self, batch: Any) -> None:
        taps, labels, first = self.taps, self.labels, self._first
        inputs, targets = _split_batch(moved(batch, self.device))
        if labels.kind and isinstance(targets, Mapping):
            targets = targets.get("labels")
        mask = self._mask(batch)
        taps.begin(mask, keep_inputs=first)
        outputs = called(self.model, inputs)
        if not taps.calls:
            raise InputError("model called none of the layers; it holds no Linear, convolution or embedding it uses")
        if mask is not None and not any(call.layer.masked for call in taps.calls):
            raise InputError(
                f"mask gives {tuple(mask.shape)}, and no layer's inputs begin with these dimensions; give (samples, "
                "positions), or leave mask out"
            )
        entries = _entries(inputs)
        edges = [call.edge for call in taps.calls]
        terms = labels.terms(outputs, targets, entries)
        scale = labels.scale(terms)
        empirical = labels.mode == "empirical"
        if empirical or (first and targets is not None):
            value = labels.value(outputs, targets)
            gradients = self._checked(value, edges, scale / max(1, terms), not empirical) if first else None
            gradients = gradients or torch.autograd.grad(value, edges, allow_unused=True)
            if empirical:
                taps.add_gradients(gradients, scale**2)
        if not empirical:
            self._expected(outputs, targets, edges)
        for layer in taps.layers.values():
            layer.add_terms(terms)
        if first:
            self.last = taps.calls[-1].layer.name
            for call in taps.calls:
                self.calls[call.layer.name] = self.calls.get(call.layer.name, 0) + 1
        self.n += entries
        self._first = False
        taps.begin()

    def _mask(self, batch: Any) -> Tensor | None:
        if self.how.mask is None:
            return None
        mask = self.how.mask(batch)
        if not isinstance(mask, Tensor):
            raise InputError(f"mask needs to give a boolean tensor (samples, positions), got {type(mask).__name__}")
        return mask.to(self.device, torch.bool)

    def _expected(self, outputs: Any, targets: Any, edges: list[GradientEdge]) -> None:
        from_here, total = _output(outputs), self.labels.passes(outputs)
        for place, (direction, weight) in enumerate(self.labels.directions(outputs, targets)):
            last = place == total - 1
            gradients = torch.autograd.grad(from_here, edges, direction, retain_graph=not last, allow_unused=True)
            self.taps.add_gradients(gradients, weight)

    def _checked(self, value: Tensor, edges: list[Any], mean: float, retain: bool) -> tuple[Tensor | None, ...] | None:
        """Output gradients of the first batch, with the weights' own: G^T X must be the same along a direction."""
        weights: dict[int, Tensor] = {}
        for call in self.taps.calls:
            weight = call.layer.module._parameters.get("weight")
            if weight is not None and weight.requires_grad and not hasattr(weight, "full_tensor"):
                weights[id(weight)] = weight
        found = torch.autograd.grad(value, [*edges, *weights.values()], retain_graph=retain, allow_unused=True)
        gradients, of_weights = found[: len(edges)], dict(zip(weights, found[len(edges) :], strict=True))
        for key, gradient in of_weights.items():
            users = [
                (call, g)
                for call, g in zip(self.taps.calls, gradients, strict=True)
                if id(call.layer.module._parameters.get("weight")) == key and g is not None
            ]
            if gradient is None or not users:
                continue
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                self._compare(users, gradient)
                layer = users[0][0].layer
                self.gradients[layer.name] = gradient * mean
        if len(weights) < len({id(call.layer.module) for call in self.taps.calls}):
            self.notes.append(
                "layers whose weight is frozen, computed or split over processes were not held against the weight's "
                "gradient, and have no weight_domination"
            )
        return gradients

    def _compare(self, users: list[tuple[Any, Tensor]], gradient: Tensor) -> None:
        layer: LayerFactors = users[0][0].layer
        u, v = weight_probe(gradient)
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        truth = u.to(wide.dtype) @ wide.flatten(1) @ v.to(wide.dtype).flatten()
        ours = sum(probed_rows(call.layer, call.x, g, u, v) for call, g in users)
        coarse = min(users[0][1].dtype.itemsize, gradient.dtype.itemsize) < 4  # as under autocast
        size, off = float(wide.norm()), float((ours - truth).abs())  # u^T W v is about as large as W
        if off > (0.1 if coarse else AGREE[wide.dtype]) * size:
            self.errors[layer.name] = (
                f"G^T X differs from the weight's gradient by {off / size:.0%}: the weight is used elsewhere too, or "
                "the module does not compute what its type says"
            )

    def merge(self, group: Any) -> None:
        """Add up over processes."""
        moments = [moment for layer in self.taps.layers.values() for moment in (layer.x, layer.g)]
        merge_over_ranks(moments, group)
        numbers: list[Tensor] = [torch.tensor([self.n], dtype=torch.float64, device=self.device)]
        found = list(self.taps.neurons.values())
        for neurons in found:
            numbers += [neurons.fired, torch.tensor([neurons.examples], dtype=torch.float64, device=self.device)]
        whole = torch.cat(numbers)
        torch.distributed.all_reduce(whole, group=group)
        parts = list(whole.split([len(part) for part in numbers]))
        self.n = int(parts[0])
        for neurons, fired, seen in zip(found, parts[1::2], parts[2::2], strict=True):
            neurons.fired, neurons.examples = fired, int(seen)
        for gradient in self.gradients.values():
            torch.distributed.all_reduce(gradient, group=group)
            gradient.div_(torch.distributed.get_world_size(group))

    def row(self, layer: LayerFactors, p: Sequence[float]) -> LayerConditioning:
        """What was found of one layer."""
        if layer.name in self.errors:
            row = LayerConditioning(layer.kind, layer.d_in, layer.d_out, error=self.errors[layer.name])
        else:
            row = of_layer(layer, p)
        row.calls = self.calls.get(layer.name, 0)
        gradient = self.gradients.get(layer.name)
        if gradient is not None:
            with still(layer.module):
                row.weight_domination = float(weight_domination(layer.module.weight, gradient))  # type: ignore[arg-type]
        neurons = self.taps.neurons.get(layer.name)
        if (
            neurons is not None and row.error == "" and not math.isnan(row.lambda_max_g)
        ):  # NaN outputs give NaN gradients
            row.dead = int((neurons.fired == 0).sum())
            row.full = int((neurons.fired == neurons.examples).sum())
        return row


def measured_modules(model: nn.Module, select: Select = None) -> tuple[dict[str, nn.Module], tuple[Skipped, ...]]:
    """The layers that have factors, by path, and the matrices that are not measured, with reasons.

    Raises:
        InputError: if there is no layer left.
    """
    chosen = selector(select)
    found: dict[str, nn.Module] = {}
    skipped = []
    for full, module in model.named_modules():
        path = ".".join(word for word in full.split(".") if word not in WRAPPERS)
        own = [name for name, value in module.named_parameters(recurse=False) if value.dim() >= 2]
        if "parametrizations" in full.split(".") or not (own or kind_of(module)) or not chosen(path, module):
            continue
        if kind_of(module):
            found[path] = module
        else:
            reason = f"belongs to a {type(module).__name__}, whose inputs and output gradients are not followed"
            skipped += [Skipped(".".join(filter(None, (path, name))), reason) for name in own]
    if not found:
        raise InputError(
            "model has no layer to measure among those chosen; Linear, Conv1d to 3d, Embedding and transformers' "
            "Conv1D are understood"
        )
    return found, tuple(skipped)


def _notes(model: nn.Module, taps: Taps, split: bool) -> Iterator[str]:
    coupled = [path for path, module in model.named_modules() if isinstance(module, NORMS) and module.training]
    if coupled:
        yield (
            f"{len(coupled)} batch norm layers in training mode, {coupled[0]} first, make every entry's loss depend on "
            "the whole batch: rows of Sigma_g are gradients of the batch's loss, not of an entry's; model.eval() "
            "avoids it"
        )
    if not any(isinstance(module, FIRING) for module in model.modules()):
        yield "the model has no ReLU module: dead and full count the layers' own outputs above 0"
    grouped = [path for path, layer in taps.layers.items() if layer.groups > 1]
    if grouped:
        yield f"of grouped convolutions, {grouped[0]} first, covariances are averaged over groups"
    if taps.how.mask is not None:
        whole = [path for path, layer in taps.layers.items() if not layer.masked]
        if whole:
            yield f"mask does not fit the inputs of {len(whole)} layers, {whole[0]} first: all their rows count"
    if split:
        yield "rows of all processes are added up"


def is_split(model: nn.Module) -> bool:
    """Whether processes hold the model together, each with data of its own."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return True
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs, and targets or None."""
    if isinstance(batch, Mapping):
        return batch, batch
    if isinstance(batch, list | tuple):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise InputError(f"loader needs to give (inputs, targets), got {len(batch)} entries; put inputs in a tuple")
    return batch, None


def _entries(inputs: Any) -> int:
    """First dimension of the first tensor: how many entries a batch has."""
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, list | tuple) else [inputs]
    )
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise InputError("loader's inputs hold no tensor with a batch dimension")


def _output(outputs: Any) -> Tensor:
    out: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return out
