"""Differentiable means over pairs: one torch operator, its shapes, its gradient, its vmap.

``orthofast::pair_mean`` sums a curve of the cosines of all pairs and, where a gradient will be asked for, makes it in
the same sweep: backward only scales it. Every device runs it through ``dispatch``; a backend that offers no
``abs_gradient`` of its own is served by ``gradients``. Opaque to ``torch.compile`` and CUDA graphs; computed in float32
under autocast; once differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from orthofast.errors import InputError
from orthofast.kernels import dispatch, doors, gradients
from orthofast.kernels.contract import Request, make_request
from orthofast.kernels.gradients import ABS, Curve, PairGradient, gradient_dtype
from orthofast.kernels.sampling import Sample, checked_sample, gather, sample_groups

SMOOTH = (None, "huber", "sqrt")
_LIBRARY = torch.library.Library("orthofast", "DEF")
_LIBRARY.define(
    "pair_mean(Tensor x, Tensor? y, str kind, float width, str precision, str backend, int pairs, int seed, "
    "bool gradient) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("pair_mean_backward(Tensor grad, Tensor gradient, Tensor x) -> Tensor")


def mean_abs_cosine(
    x: Tensor,
    y: Tensor | None = None,
    *,
    smooth: str | None = None,
    width: float = 0.01,
    sample: int | Sample | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Mean |cos| over all pairs of vectors, differentiable in x and y; the Gram matrix is never stored.

    With S = sum of sign(c_ij) over pairs, the gradient is (G_i - (G_i . u_i) u_i) / |w_i| for unit vectors u_i and
    G_i = 1 / pairs * sum over j of sign(c_ij) u_j. Its subgradient at c = 0 is 0. ``smooth`` rounds that kink off:

    * "huber": c^2 / (2 width) where |c| <= width, else |c| - width / 2;
    * "sqrt": sqrt(c^2 + width^2) - width.

    Both are 0 for orthogonal vectors, at most |c|, and below it by at most width / 2 and width.

    Args:
        x: (b, n, d) or (n, d): ``b`` independent sets of ``n`` vectors; any float dtype, any strides.
        y: (b, m, d) or (m, d): average the pairs between ``x`` and ``y`` instead of those within ``x``.
        smooth: None, "huber" or "sqrt".
        width: in units of a cosine; independent vectors have |cos| of about 0.8 / sqrt(d).
        sample: about this many random pairs instead of all; an int, or a ``Sample`` with a seed. The estimate and its
            gradient are unbiased.
        precision: "auto", "highest", "high" or "float64"; gradients are made in float32, or in float64 where the
            input or the precision says so.
        backend: obeyed or refused; None takes the fastest that can serve.

    Returns:
        (b,) float64; NaN where no pair exists (its gradient is 0) or a vector holds NaN or Inf (its gradient is NaN).
        The gradient has the dtype of its input and is the same for any number of threads. Vectors of length 0 are in
        no pair and get gradient 0. The gradient costs twice what the mean does and is made with it; under
        ``torch.no_grad()`` it is not.

    Raises:
        InputError: if an argument cannot be used; later, where a second derivative is asked for.
        BackendError: if the named backend cannot serve the call.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0]], requires_grad=True)  # their cosine is 0.6
    >>> mean_abs_cosine(x).sum().backward()
    >>> x.grad
    tensor([[ 0.0000,  0.8000],
            [ 0.1280, -0.0960]])
    """
    if smooth not in SMOOTH:
        raise InputError(f'smooth needs None, "huber" or "sqrt", got {smooth!r}')
    return pair_mean(x, y, Curve(smooth or "abs", width if smooth else 0.0), sample, precision, backend)


def mean_square_cosine(
    x: Tensor,
    y: Tensor | None = None,
    *,
    sample: int | Sample | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Mean cos^2 over all pairs of vectors, differentiable in x and y.

    ``2 / (n (n - 1)) * sum over i < j of cos(w_i, w_j)^2 = (|| X^T X ||_F^2 - n) / (n (n - 1))`` for rows of X of unit
    length: the frame potential but for a constant. Many short vectors (embeddings) are measured on the d x d side,
    at d / n of the cost. Arguments, result and errors as in :func:`mean_abs_cosine`.

    >>> import torch
    >>> mean_square_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([0.5000], dtype=torch.float64)
    """
    return pair_mean(x, y, Curve("square"), sample, precision, backend)


def needs_operator(x: Tensor) -> bool:
    """Whether a call on these vectors is recorded: by autograd, by a compiler, or by a transform of torch.func."""
    return (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling() or _is_transformed()


def _is_transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def pair_mean(
    x: Tensor,
    y: Tensor | None,
    curve: Curve,
    sample: int | Sample | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Mean of a curve of the cosines over all pairs of each item, (b,) float64; arguments as in the functions above."""
    handler = doors.handler_of(x, y)
    if handler is not None:
        return handler.pair_mean(x, y, curve, sample, precision, backend)
    for side in (x,) if y is None else (x, y):
        if not isinstance(side, Tensor):
            make_request(x, y)  # says what is wrong
    x = x.unsqueeze(0) if x.dim() == 2 else x
    y = y.unsqueeze(0) if y is not None and y.dim() == 2 else y
    plan = Sample(0) if sample is None else checked_sample(sample)
    options = (curve.kind, curve.width, precision, backend or "", plan.pairs, plan.seed)
    if not torch.compiler.is_compiling() and _is_transformed():
        mean, _, _ = _PairMean.apply(x, y, *options, True)  # type: ignore[no-untyped-call]
    else:
        gradient = torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad))
        mean, _, _ = torch.ops.orthofast.pair_mean(x, y, *options, gradient)
    return cast(Tensor, mean)


def _pair_mean(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    width: float,
    precision: str,
    backend: str,
    pairs: int,
    seed: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on a device: means (b,), and their gradients by x and y, empty where not asked for or without y."""
    request = make_request(x, y, precision=precision)
    chosen = dispatch.choose(request, backend or None)
    curve = Curve(kind, width)
    if pairs and pairs < _all_pairs(request):
        found = _sampled(request, Sample(pairs, seed), curve, gradient, chosen)
    else:
        found = _fold(chosen, request, curve, gradient)
    count = found.pairs
    mean = found.total / count
    if kind in ("abs", "square"):
        mean.clamp_(max=1)  # parallel vectors may round to 1 + 1e-16
    nothing = torch.empty(0, dtype=gradient_dtype(x.dtype, request.precision), device=x.device)
    made = []
    for sums in (found.dx, found.dy):
        if sums is not None:
            sums.div_(count.clamp(min=1).view(-1, 1, 1))
        made.append(nothing.clone() if sums is None else sums)
    return mean, made[0], made[1]


def _all_pairs(request: Request) -> int:
    n = request.x.shape[1]
    return n * (n - 1) // 2 if request.y is None else n * request.y.shape[1]


def _sampled(request: Request, plan: Sample, curve: Curve, gradient: bool, backend: dispatch.Backend) -> PairGradient:
    """Totals and gradients of random groups of vectors, as ``sampling`` draws them."""
    b, _, d = request.x.shape
    dtype = gradient_dtype(request.x.dtype, request.precision)
    pairs = torch.zeros(b, dtype=torch.int64, device=request.x.device)
    total = torch.zeros(b, dtype=torch.float64, device=request.x.device)
    sides = [request.x] if request.y is None else [request.x, request.y]
    sums = [torch.zeros(side.shape, dtype=dtype, device=side.device) for side in sides] if gradient else []
    for indices, indices_y in sample_groups(request, plan):
        part = replace(request, x=gather(request.x, indices))
        if request.y is not None and indices_y is not None:
            part.y = gather(request.y, indices_y)
        found = _fold(backend, part, curve, gradient)
        pairs += found.pairs.view(b, -1).sum(1)
        total += found.total.view(b, -1).sum(1)
        for whole, made, index in zip(sums, (found.dx, found.dy), (indices, indices_y), strict=False):
            assert made is not None
            assert index is not None
            flat = index.reshape(-1)
            # groups drawn together share no vector: reading and writing back cannot collide
            whole[:, flat] = whole[:, flat] + made.reshape(b, -1, d)
    bad = backend.gram_stats(replace(request, want=0, bins=0)).nonfinite > 0  # also those that were not drawn
    total.masked_fill_(bad, float("nan"))
    for whole in sums:
        whole.masked_fill_(bad.view(b, 1, 1), float("nan"))
    return PairGradient(pairs, total, *sums)


def _fold(backend: dispatch.Backend, request: Request, curve: Curve, gradient: bool) -> PairGradient:
    if not gradient and curve == ABS:
        stats = backend.gram_stats(request)
        assert stats.abs_sum is not None
        return PairGradient(stats.pairs, stats.abs_sum)
    made = getattr(backend, "abs_gradient", gradients.abs_gradient)(request, curve, gradient=gradient)
    return cast(PairGradient, made)


def _shapes(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    width: float,
    precision: str,
    backend: str,
    pairs: int,
    seed: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake tensors of the results."""
    dtype = gradient_dtype(x.dtype, precision)
    dx = x.new_empty(x.shape if gradient else (0,), dtype=dtype)
    dy = x.new_empty(y.shape if gradient and y is not None else (0,), dtype=dtype)
    return x.new_empty(x.shape[:1], dtype=torch.float64), dx, dy


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, *options, gradient = inputs
    _, dx, dy = output
    ctx.mark_non_differentiable(dx, dy)
    ctx.options = None if gradient else options
    ctx.save_for_backward(x, y, dx, dy)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, y, dx, dy = ctx.saved_tensors
    if ctx.options is not None:  # the call was not known to need a gradient: made now
        _, dx, dy = torch.ops.orthofast.pair_mean(x.detach(), None if y is None else y.detach(), *ctx.options, True)
    scaled: Callable[..., Tensor] = _Scaled.apply if _is_transformed() else torch.ops.orthofast.pair_mean_backward
    by_x = scaled(grad, dx, x) if ctx.needs_input_grad[0] else None
    by_y = scaled(grad, dy, y) if y is not None and ctx.needs_input_grad[1] else None
    return (by_x, by_y, *[None] * (len(ctx.needs_input_grad) - 2))


def _pair_mean_backward(grad: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """(b,) times (b, n, d), in the dtype of x; x itself is there so that a second derivative finds who refuses it."""
    return (gradient * grad.to(gradient.dtype).view(-1, 1, 1)).to(x.dtype)


def _refuse_second(ctx: Any, *_: Any) -> Any:
    raise InputError(
        "a mean over pairs of cosines has no second derivative here, its gradient keeps no graph; "
        "differentiate once, without create_graph, or write the mean in torch"
    )


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


class _PairMean(torch.autograd.Function):
    """The same for the transforms of torch.func and for forward mode, which do not see a registered gradient."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.orthofast.pair_mean(*args[:-1], True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember(ctx, (*inputs[:-1], True), output)
        ctx.save_for_forward(inputs[0], inputs[1], *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _, _, dx, dy = ctx.saved_tensors
        moved = [(made * by).sum((1, 2)) for made, by in ((dx, tangents[0]), (dy, tangents[1])) if by is not None]
        return sum(moved[1:], moved[0]).to(torch.float64), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _over_items(info, in_dims, *args, call=_PairMean.apply)


class _Scaled(torch.autograd.Function):
    """``pair_mean_backward`` for the same transforms."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.orthofast.pair_mean_backward(*args)

    setup_context = staticmethod(_nothing)
    backward = staticmethod(_refuse_second)
    jvp = staticmethod(_refuse_second)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _scaled_over_items(info, in_dims, *args, call=_Scaled.apply)


def _joined(side: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension, or as many copies, joined to the items."""
    side = side.unsqueeze(0).expand(size, *side.shape) if dim is None else side.movedim(dim, 0)
    return side.reshape(-1, *side.shape[2:])


def _over_items(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, y: Tensor | None, *options: Any, call: Any = None
) -> Any:
    """Rule of vmap: the mapped dimension joins the items."""
    size = info.batch_size
    others = None if y is None else _joined(y, in_dims[1], size)
    found = (call or torch.ops.orthofast.pair_mean)(_joined(x, in_dims[0], size), others, *options)
    # a result that was not asked for is empty, and stays so for every mapped index
    split = [made.reshape(size, -1, *made.shape[1:]) if made.numel() else made.new_empty(size, 0) for made in found]
    return tuple(split), (0, 0, 0)


def _scaled_over_items(info: Any, in_dims: tuple[Any, ...], *args: Tensor, call: Any = None) -> Any:
    size = info.batch_size
    joined = [_joined(arg, dim, size) for arg, dim in zip(args, in_dims, strict=True)]
    made = (call or torch.ops.orthofast.pair_mean_backward)(*joined)
    return made.reshape(size, -1, *made.shape[1:]), 0


_LIBRARY.impl("pair_mean", _pair_mean, "CompositeExplicitAutograd")
_LIBRARY.impl("pair_mean_backward", _pair_mean_backward, "CompositeExplicitAutograd")
torch.library.register_fake("orthofast::pair_mean", _shapes, lib=_LIBRARY)
torch.library.register_fake(
    "orthofast::pair_mean_backward", lambda _, gradient, x: gradient.new_empty(x.shape, dtype=x.dtype), lib=_LIBRARY
)
torch.library.register_autograd("orthofast::pair_mean", _backward, setup_context=_remember, lib=_LIBRARY)
torch.library.register_autograd("orthofast::pair_mean_backward", _refuse_second, setup_context=_nothing, lib=_LIBRARY)
torch.library.register_vmap("orthofast::pair_mean", _over_items, lib=_LIBRARY)
torch.library.register_vmap("orthofast::pair_mean_backward", _scaled_over_items, lib=_LIBRARY)
