"""Initialisers that make what flows through a network orthogonal: from data, layer by layer, and delta kernels.

Weights are written in place under ``torch.no_grad``, computed in float64 and stored in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.errors import InputError
from orthofast.training.layers import Select, find_layers

ROTATIONS = ("paper", "none", "haar")
NORMALISATIONS = ("sigma", "output", "none")
Arguments: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"  # positional and keyword
RESOLVED = 1e-6  # a singular value below this share of the largest is rounding and carries no signal
CHUNK_ELEMENTS = 1 << 22  # of float64 samples copied at a time


def orthogonalize_(
    model: nn.Module,
    batch: Any,
    *,
    power: float = 0.5,
    rotation: str = "paper",
    normalize: str = "sigma",
    select: Select = None,
    generator: torch.Generator | None = None,
) -> tuple[str, ...]:
    """Initialise the hidden layers of a model from data, so that each layer's outputs are nearly orthogonal.

    Iterative orthogonalisation (Daneshmand et al. 2021, Section 5, Eq. 6, and for convolutions Appendix I): layer after
    layer, with ``H = U S V^T`` the inputs it sees (features x samples), its weight becomes

    ``W = V' S^-power U^T / |S^(1 - power)|_F``

    One pass forward does it: a layer is written just before it runs, so the next one sees what the new weights make.
    The orthogonality gap of its outputs before the activation, ``V(W H)``, falls below ``V(H)`` for an orthogonal V',
    so that deep networks train without slowing down, as with batch normalisation. S and U come from an
    eigen-decomposition of the Gram matrix in float64, which costs much less than a decomposition of H.

    Args:
        model: with Linear or Conv2d layers. It runs once forward in eval mode (twice without ``select``), without
            gradients; modes, hooks, buffers and random state are left as they were.
        batch: what the model takes: a tensor, a tuple of positional or a mapping of keyword arguments. At least as many
            samples as each layer has inputs; the paper's code takes three times as many. (Samples of a Linear are all
            leading dimensions, of a Conv2d all places the kernel visits.)
        power: 0.5 as in Eq. 6; 1, as in the public code, makes all singular values of ``W H`` equal.
        rotation: V'. "paper": the first rows of V, which are not quite orthogonal and train most stably; "none": the
            identity; "haar": a random orthogonal matrix. "none" and "haar" give the same gap.
        normalize: "sigma": the denominator above, which gives ``W H`` a Frobenius norm of 1 for an orthogonal V';
            "output": divide by the Frobenius norm of ``W H`` itself, as the public code does; "none": by 1.
        select: which layers, as in :func:`orthofast.training.find_layers`. None: all Linear and Conv2d of one group but
            the first and the last that run, as in the paper. Biases of the layers written become 0.
        generator: for "haar".

    Returns:
        Names of the layers written, in the order they run.

    Raises:
        InputError: if an argument cannot be used, a layer is of another type, is not reached by the batch or sees too
            few samples. The weights are then what they were.

    >>> import torch
    >>> mlp = torch.nn.Sequential(*(m for _ in range(4) for m in (torch.nn.Linear(8, 8), torch.nn.ReLU())))
    >>> orthogonalize_(mlp, torch.randn(24, 8))
    ('2.weight', '4.weight')
    """
    _checked(power, rotation, normalize)
    arguments = _arguments(batch)
    write = partial(orthogonal_for_, power=power, rotation=rotation, normalize=normalize, generator=generator)
    chosen = _between(model, arguments) if select is None else _selected(model, select)
    done = _run(model, arguments, chosen, write)
    return tuple(chosen[module] for module in done)


@torch.no_grad()
def orthogonal_for_(
    weight: Tensor,
    samples: Tensor,
    *,
    power: float = 0.5,
    rotation: str = "paper",
    normalize: str = "sigma",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Write one weight from the inputs it sees: :func:`orthogonalize_` for a single matrix.

    With k = min(out, in), the k leading directions are kept: ``W = V'[:, :k] S_k^-power U_k^T``. Directions the samples
    do not resolve (singular values below 1e-6 of the largest) get weight 0.

    Args:
        weight: (out, in) or (out, in, *kernel), written in place.
        samples: (n, in * kernel), one sample a row, n >= in * kernel.
        power: as in :func:`orthogonalize_`, like the arguments not named here.
        rotation: "paper" needs n >= out, "none" out <= in.
        normalize: as in :func:`orthogonalize_`.
        generator: for "haar".

    Returns:
        ``weight``.

    Raises:
        InputError: if an argument cannot be used.
    """
    _checked(power, rotation, normalize)
    out, d = weight.shape[0], weight.shape[1:].numel()
    if samples.dim() != 2 or samples.shape[1] != d:
        raise InputError(f"samples needs shape (n, {d}) for a weight {tuple(weight.shape)}, got {tuple(samples.shape)}")
    needed = max(d, out) if rotation == "paper" else d
    if len(samples) < needed:
        raise InputError(f"samples needs at least {needed} rows for a weight {tuple(weight.shape)}, got {len(samples)}")
    if rotation == "none" and out > d:
        raise InputError(f"rotation='none' needs out <= in, got {out} and {d}: its rows would be 0; use 'haar'")
    k = min(out, d)
    energies, directions = torch.linalg.eigh(_gram(samples))
    energies, directions = energies.flip(0)[:k], directions.flip(1)[:, :k]  # largest first; (k,), (d, k)
    sigma = energies.clamp(min=0).sqrt()
    if not bool(sigma[0] > 0) or not bool(sigma.isfinite().all()):
        raise InputError("samples are all zero, or hold NaN or Inf: there is nothing to make orthogonal")
    resolved = sigma > RESOLVED * sigma[0]
    sigma = torch.where(resolved, sigma, 1.0)

    def powers(exponent: float) -> Tensor:
        return torch.where(resolved, sigma**exponent, 0.0)

    if rotation == "paper":
        turn = samples[:out].to(torch.float64) @ directions * powers(-1)  # the first rows of V
    elif rotation == "haar":
        turn = haar(out, k, generator=generator, device=sigma.device)
    else:
        turn = torch.eye(out, k, dtype=torch.float64, device=sigma.device)
    made = (turn * powers(-power)) @ directions.T  # (out, d)
    if normalize == "sigma":
        made /= powers(1 - power).norm()
    elif normalize == "output":
        made /= (turn * powers(1 - power)).norm()  # W H = V' S^(1 - power) V^T, and V has orthonormal columns
    return weight.copy_(made.view(weight.shape))


@torch.no_grad()
def delta_orthogonal_(
    weight: Tensor, *, gain: float = 1.0, groups: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a convolution kernel with an orthogonal matrix at its centre and zeros around it.

    Xiao et al. 2018, Dynamical isometry and a mean field theory of CNNs, Algorithm 1. Under circular padding with
    stride 1 all singular values of the convolution are ``gain``: it keeps lengths where out >= in, and has orthonormal
    rows where out < in. (The orthogonal initialiser of torch flattens the kernel, and is no isometry.)

    Args:
        weight: (out, in / groups, *kernel) with 1 to 3 kernel dimensions, written in place; even sizes take the tap
            right of the middle.
        gain: factor of the matrix.
        groups: of channels; each group gets a matrix of its own.
        generator: of the random matrix, on its own device.

    Returns:
        ``weight``.

    Raises:
        InputError: if the shape is none of a kernel's, or ``groups`` does not divide it.

    >>> import torch
    >>> kernel = delta_orthogonal_(torch.empty(4, 3, 5))
    >>> centre = kernel[:, :, 2]
    >>> torch.allclose(centre.T @ centre, torch.eye(3), atol=1e-6), kernel.norm(dim=1).count_nonzero().item()
    (True, 4)
    """
    if not 3 <= weight.dim() <= 5 or 0 in weight.shape:
        raise InputError(
            f"weight needs shape (out, in / groups, *kernel) with 1 to 3 kernel dimensions, got {tuple(weight.shape)}"
        )
    out, channels = weight.shape[:2]
    if type(groups) is not int or groups < 1 or out % groups:
        raise InputError(f"groups needs a divisor of the {out} filters, got {groups!r}")
    weight.zero_()
    centre = weight
    for size in weight.shape[2:]:
        centre = centre.select(2, size // 2)
    for block in centre.split(out // groups):
        block.copy_(haar(len(block), channels, generator=generator, device=weight.device) * gain)
    return weight


def haar(
    rows: int, columns: int, *, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """A random matrix with orthonormal columns, or rows where those are fewer, uniform over all of them; float64.

    The QR factor of a Gaussian matrix, its signs fixed by the diagonal of R (Mezzadri 2007).
    """
    source = device if generator is None else generator.device
    tall = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator, device=source)
    q, r = torch.linalg.qr(tall)
    q = q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    found: Tensor = q if rows >= columns else q.T
    return found.to(device or source)


def _gram(samples: Tensor) -> Tensor:
    """``H H^T`` of samples (n, d) in float64, a part of them at a time, (d, d)."""
    n, d = samples.shape
    total = torch.zeros(d, d, dtype=torch.float64, device=samples.device)
    step = max(1, CHUNK_ELEMENTS // max(1, d))
    with torch.autocast(samples.device.type, enabled=False):
        for start in range(0, n, step):
            part = samples[start : start + step].to(torch.float64)
            total.addmm_(part.T, part)
    return total


def _samples(module: nn.Module, x: Tensor) -> Tensor:
    """What each output of the module is a linear function of, one sample a row: (n, in * kernel)."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(module, nn.Conv2d)
    x = x if x.dim() == 4 else x.unsqueeze(0)
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0, 0)
    patches = functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # (images, d, places)
    return patches.transpose(1, 2).flatten(0, 1)


def _checked(power: float, rotation: str, normalize: str) -> None:
    if isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power <= 1:
        raise InputError(f"power needs a number from 0 to 1, 0.5 as in Eq. 6, got {power!r}")
    if rotation not in ROTATIONS:
        raise InputError(f"rotation needs one of {', '.join(ROTATIONS)}, got {rotation!r}")
    if normalize not in NORMALISATIONS:
        raise InputError(f"normalize needs one of {', '.join(NORMALISATIONS)}, got {normalize!r}")


def _arguments(batch: Any) -> Arguments:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _fits(module: nn.Module | None) -> bool:
    """Whether the module is one whose weight can be written."""
    return (
        isinstance(module, nn.Linear | nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and module._parameters.get("weight") is not None
    )


def _between(model: nn.Module, arguments: Arguments) -> dict[nn.Module, str]:
    """Modules to write, with the names of their weights: all but the first and the last that run."""
    names: dict[nn.Module, str] = {
        m: f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    order = _run(model, arguments, names, None)
    chosen = {module: names[module] for module in order[1:-1] if _fits(module)}
    if not chosen:
        raise InputError(
            f"model needs a Linear or Conv2d between the first and the last that run, got {len(order)} in all; "
            "name layers with select="
        )
    return chosen


def _selected(model: nn.Module, select: Select) -> dict[nn.Module, str]:
    """The same by the caller's choice."""
    found, skipped = find_layers(model, select)
    for layer in found:
        if not _fits(layer.module):
            raise InputError(
                f"select chooses {layer.name} of a {type(layer.module).__name__}, but only a Linear or a Conv2d "
                "of one group whose weight is a parameter of its own can be orthogonalised"
            )
    if not found:
        raise InputError(f"select chooses nothing to orthogonalise; {skipped[0].name} {skipped[0].reason}")
    return {layer.module: layer.name for layer in found if layer.module is not None}


def _run(
    model: nn.Module,
    arguments: Arguments,
    chosen: Mapping[nn.Module, str],
    write: Callable[[Tensor, Tensor], Tensor] | None,
) -> list[nn.Module]:
    """One pass forward; each chosen module, before it first runs, is noted and its weight written. In running order."""
    order: list[nn.Module] = []
    kept: list[tuple[Tensor, Tensor]] = []

    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module in order:
            return
        order.append(module)
        if write is None:
            return
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        kept.append((weight, weight.clone()))
        try:
            write(weight, _samples(module, inputs[0] if inputs else next(iter(named.values()))))
        except InputError as error:
            raise InputError(f"{chosen[module]}: {error}") from None
        if isinstance(bias, Tensor):
            kept.append((bias, bias.clone()))
            bias.zero_()

    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in chosen]
    positional, named = arguments
    try:
        with torch.no_grad():
            model.eval()
            model(*positional, **named)
            missed = [name for module, name in chosen.items() if module not in order]
            if write is not None and missed:
                raise InputError(
                    f"{missed[0]} did not run on this batch as a module of its own; leave it out of select="
                )
    except BaseException:
        with torch.no_grad():
            for tensor, old in kept:
                tensor.copy_(old)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return order
