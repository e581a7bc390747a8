"""What is sent backwards through a model: gradients of its loss, or directions whose outer products are its Fisher.

For a loss with terms l_m(f_m, y_m), f_m in R^C, the Fisher of one term in its outputs is  E_y[grad l grad l^T] = L L^T.
Sending the columns of L backwards gives the expectation over labels exactly:

    cross-entropy         L L^T = diag(p) - p p^T            C - 1 columns, a Cholesky factor in closed form
    mean squared error    L L^T = 2 / C I                    C columns
    binary cross-entropy  L L^T = diag(s (1 - s)) / C        C columns, s the sigmoid

(the first by Tanabe and Sagae 1992). The last two are those of the mean over C outputs, the expected Hessian of the
term; of a sum, without the 1 / C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.errors import InputError

Loss: TypeAlias = "str | nn.Module | Callable[[Any, Any], Tensor]"
MODES = ("exact", "mc", "empirical")
WIDEST = 1024  # outputs for which "exact" sends one column each
KNOWN: dict[Any, str] = {
    "cross_entropy": "cross_entropy",
    "mse": "mse",
    "binary_cross_entropy": "binary_cross_entropy",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse",
    nn.BCEWithLogitsLoss: "binary_cross_entropy",
    functional.cross_entropy: "cross_entropy",
    functional.mse_loss: "mse",
    functional.binary_cross_entropy_with_logits: "binary_cross_entropy",
}
IGNORED = -100  # torch's default


class Labels:
    """Turns outputs and targets into what is sent backwards.

    Args:
        loss: a callable ``loss(outputs, targets)`` that returns the mean or the sum of its terms; or "cross_entropy"
            (classes along the last dimension, one term per position), "mse" or "binary_cross_entropy".
        mode: "exact", "mc" or "empirical".
        samples: label draws per term with "mc".
        generator: of these draws, on the host.

    Attributes:
        kind: name of the loss if it is one of the known, else empty.
        reduction: "mean" or "sum"; of an unknown callable None until a batch was looked at.
        guessed: whether that could not be told, and "mean" was taken.

    Raises:
        InputError: if the mode needs a known loss, or the loss does not add up terms.
    """

    def __init__(self, loss: Loss, mode: str, samples: int, generator: torch.Generator) -> None:
        if mode not in MODES:
            raise InputError(f"labels needs one of {', '.join(MODES)}, got {mode!r}")
        if not callable(loss) and loss not in KNOWN:
            raise InputError(f"loss needs a callable or one of cross_entropy, mse, binary_cross_entropy, got {loss!r}")
        self.loss, self.mode, self.samples, self.generator = loss, mode, samples, generator
        self.kind = KNOWN.get(type(loss) if isinstance(loss, nn.Module) else loss, "")
        self.last_dim = isinstance(loss, str)
        self.reduction: str | None = "mean" if self.kind else None
        self.ignored, self.guessed = IGNORED, False
        if isinstance(loss, nn.Module) and self.kind:
            self.reduction = str(loss.reduction)
            self.ignored = int(getattr(loss, "ignore_index", IGNORED))
            weighted = [name for name in ("weight", "pos_weight") if getattr(loss, name, None) is not None]
            if weighted:
                raise InputError(f"loss has {weighted[0]}, so that its terms count unequally; pass it without")
            if self.reduction not in ("mean", "sum"):
                raise InputError(f"loss needs reduction='mean' or 'sum', got {self.reduction!r}")
        if mode != "empirical" and not self.kind:
            raise InputError(
                f"labels={mode!r} needs the distribution of labels, which loss={_named(loss)} does not tell; pass "
                "torch's cross_entropy, mse_loss or binary_cross_entropy_with_logits, or labels='empirical'"
            )

    def value(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of a batch."""
        if targets is None:
            raise InputError("loader gives no targets, which the loss needs; yield (inputs, targets)")
        if not isinstance(self.loss, str):
            value: Tensor = self.loss(tensor_of(outputs) if self.kind else outputs, targets)
        elif self.kind == "cross_entropy":
            logits = tensor_of(outputs)
            value = functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        elif self.kind == "mse":
            value = functional.mse_loss(tensor_of(outputs), targets)
        else:
            value = functional.binary_cross_entropy_with_logits(tensor_of(outputs), targets)
        if not isinstance(value, Tensor) or value.dim():
            raise InputError("loss needs to return one number, a 0-d tensor: the mean or the sum of its terms")
        return value

    def terms(self, outputs: Any, targets: Any, batch: int) -> int:
        """M: how many terms of the loss this batch has."""
        if self.kind == "cross_entropy":
            counted = self._counted(tensor_of(outputs), targets)
            return counted.numel() if counted.dtype != torch.bool else int(counted.sum())
        if self.kind:
            return len(tensor_of(outputs))
        if self.reduction is None:
            self.reduction = self._look(outputs, targets)
        return batch

    def scale(self, terms: int) -> float:
        """What turns a gradient of :meth:`value` into that of the terms' sum."""
        return float(terms) if self.reduction == "mean" else 1.0

    def directions(self, outputs: Any, targets: Any) -> Iterator[tuple[Tensor, float]]:
        """What to send backwards from the outputs, of their shape, and the weight of its squares.

        Weights and directions are those of the terms' sum: they need no :meth:`scale`.
        """
        out = tensor_of(outputs)
        with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
            wide = out.detach().to(torch.promote_types(out.dtype, torch.float32))
            made = self._of_classes(wide, targets) if self.kind == "cross_entropy" else self._of_outputs(wide)
        for direction, weight in made:
            yield direction.to(out.dtype), weight

    def passes(self, outputs: Any) -> int:
        """How many directions there are."""
        out = tensor_of(outputs)
        if self.mode == "mc":
            return self.samples
        width = out.shape[-1 if self.last_dim else 1] if self.kind == "cross_entropy" else out[0].numel()
        if width > WIDEST:
            raise InputError(
                f"labels='exact' sends one direction per output backwards, and there are {width} outputs; "
                "pass labels='mc', which draws labels"
            )
        return width - 1 if self.kind == "cross_entropy" else width

    def _counted(self, out: Tensor, targets: Any) -> Tensor:
        """Which terms count, bool in the terms' shape; all if there are no targets (then not bool)."""
        axis = -1 if self.last_dim or out.dim() < 2 else 1
        shape = out.select(axis, 0)
        if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == shape.shape:
            return targets != self.ignored
        return shape

    def _of_classes(self, out: Tensor, targets: Any) -> Iterator[tuple[Tensor, float]]:
        axis = -1 if self.last_dim else 1
        p = out.movedim(axis, -1).softmax(-1)
        counted = self._counted(out, targets)
        if counted.dtype == torch.bool:
            kept = counted[..., None].to(p.dtype)
        else:
            kept = torch.ones((), dtype=p.dtype, device=p.device)
        if self.mode == "mc":
            for _ in range(self.samples):
                draw = torch.rand((*p.shape[:-1], 1), generator=self.generator, dtype=p.dtype).to(p.device)
                drawn = (p.cumsum(-1) < draw * p.sum(-1, keepdim=True)).sum(-1).clamp(max=p.shape[-1] - 1)
                direction = (p - functional.one_hot(drawn, p.shape[-1])) * kept
                yield direction.movedim(-1, axis), 1 / self.samples
            return
        # tails[j] = p_j + ... + p_C: sums of positive numbers, nothing cancels
        tails = p.flip(-1).cumsum(-1).flip(-1)
        for j in range(p.shape[-1] - 1):
            tail, rest = tails[..., j], tails[..., j + 1]
            usable = (rest > 0) & (tail > 0)
            direction = torch.zeros_like(p)
            head = torch.where(usable, p[..., j] / torch.where(usable, tail, 1), 0)
            direction[..., j] = (head * rest).sqrt()
            direction[..., j + 1 :] = -p[..., j + 1 :] * (head / torch.where(usable, rest, 1)).sqrt()[..., None]
            yield (direction * kept).movedim(-1, axis), 1.0

    def _of_outputs(self, out: Tensor) -> Iterator[tuple[Tensor, float]]:
        flat = out.flatten(1) if out.dim() > 1 else out[:, None]
        width = flat.shape[1]
        curvature = torch.full_like(flat, 2.0) if self.kind == "mse" else flat.sigmoid() * (1 - flat.sigmoid())
        root = (curvature / (width if self.reduction == "mean" else 1)).sqrt()
        if self.mode == "mc":
            for _ in range(self.samples):
                if self.kind == "mse":
                    noise = torch.randn(flat.shape, generator=self.generator, dtype=flat.dtype).to(flat.device)
                    direction = root * noise
                else:
                    draw = torch.rand(flat.shape, generator=self.generator, dtype=flat.dtype).to(flat.device)
                    share = 1.0 if self.reduction == "sum" else width**-0.5
                    direction = (flat.sigmoid() - (draw < flat.sigmoid()).to(flat.dtype)) * share
                yield direction.reshape(out.shape), 1 / self.samples
            return
        for j in range(width):
            direction = torch.zeros_like(flat)
            direction[:, j] = root[:, j]
            yield direction.reshape(out.shape), 1.0

    @torch.no_grad()
    def _look(self, outputs: Any, targets: Any) -> str:
        """Whether an unknown loss is a mean or a sum over the batch, from its values on two unequal parts of it."""
        out = outputs if isinstance(outputs, Tensor) else None
        if out is None or not isinstance(targets, Tensor) or len(out) != len(targets) or len(out) < 2:
            self.guessed = True
            return "mean"
        n, m = len(out), max(1, len(out) // 3)
        try:
            whole = float(self.value(out, targets))
            parts = [float(self.value(out[:m], targets[:m])), float(self.value(out[m:], targets[m:]))]
        except Exception:  # noqa: BLE001 - it may know this batch's size only
            self.guessed = True
            return "mean"
        size = max(abs(whole), *map(abs, parts), 1e-30)
        near = 1e-3 if out.dtype.itemsize < 4 else 1e-4
        if abs(n * whole - m * parts[0] - (n - m) * parts[1]) <= near * n * size:
            return "mean"
        if abs(whole - sum(parts)) <= near * size:
            return "sum"
        raise InputError(
            f"loss={_named(self.loss)} is neither the mean nor the sum over the entries of a batch, so gradients of "
            "single entries cannot be told; class weights and ignored entries do that: pass loss='cross_entropy'"
        )


def tensor_of(outputs: Any) -> Tensor:
    """The model's output tensor: itself, or the field ``logits``."""
    out = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(out, Tensor):
        raise InputError(
            f"the model returns {type(outputs).__name__}, of which labels need a tensor or a field logits; "
            "pass labels='empirical' and a loss that reads it"
        )
    return out


def _named(loss: Loss) -> str:
    return str(getattr(loss, "__name__", loss if isinstance(loss, str) else type(loss).__name__))
