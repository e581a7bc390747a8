"""Kronecker factors in the scale of other libraries: each splits the same product ``A (x) G`` differently.

Ours, of N loss terms with T rows each (T = 1 for vectors; positions of a sequence or an image that one loss covers):

    A = 1 / (N T) sum x x^T        G = 1 / N sum g g^T        g the derivative of a loss term by a row's output

as Huang et al. 2020, Eq. 4, for T = 1. The products agree between libraries but for a mean against a sum over N and T;
lambda_max of one factor alone does not, nor do sums of squares of gradients of a mean loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from orthofast.errors import InputError


@dataclass(frozen=True, slots=True)
class Convention:
    """A library's factors as multiples of ours.

    Attributes:
        inputs: factor of A from (n, positions, outputs).
        gradients: factor of G from the same.
        meaning: what the library stores.
    """

    inputs: Callable[[int, int, int], float]
    gradients: Callable[[int, int, int], float]
    meaning: str


CONVENTIONS: dict[str, Convention] = {
    "orthofast": Convention(
        lambda n, positions, outputs: 1.0,
        lambda n, positions, outputs: 1.0,
        "A a mean over all rows, G over loss terms",
    ),
    "curvlinops": Convention(
        lambda n, positions, outputs: 1.0,
        lambda n, positions, outputs: 1.0,
        "3.0, loss with reduction='mean', kfac_approx='expand': the same",
    ),
    "curvlinops_sum": Convention(
        lambda n, positions, outputs: 1.0,
        lambda n, positions, outputs: float(n),
        "3.0, loss with reduction='sum': G a sum",
    ),
    "nngeometry": Convention(
        lambda n, positions, outputs: positions * outputs**0.5,
        lambda n, positions, outputs: 1 / (positions * outputs**0.5),
        "0.4, PMatKFAC: T moved from G to A, and the square root of the outputs differentiated, which are C - 1 for "
        "FIM(variant='classif_logits'), `trials` for FIM_MonteCarlo, C for 'regression'",
    ),
    "kronfluence": Convention(
        lambda n, positions, outputs: float(n * positions),
        lambda n, positions, outputs: float(n),
        "1.0, of a summed loss: both sums over all rows, counts stored beside them",
    ),
}


def rescale_factors(
    a: Tensor,
    g: Tensor,
    *,
    source: str = "orthofast",
    target: str = "orthofast",
    n: int = 1,
    positions: int = 1,
    outputs: int = 1,
) -> tuple[Tensor, Tensor]:
    """Kronecker factors (or their eigenvalues) of one library as another would give them.

    Huang et al. 2020, Section 3, plots the largest eigenvalue of each factor: a scale moved from one to the other
    leaves the product alone and changes both plots.

    Args:
        a: the factor of a layer's inputs. Libraries that join the bias to the weight (nngeometry, kronfluence) append
            its row and column at the end: pass ``a[:-1, :-1]``.
        g: the factor of its output gradients.
        source: whose scale they have: "orthofast", "curvlinops" (loss averaged), "curvlinops_sum" (loss summed),
            "nngeometry" or "kronfluence".
        target: whose scale to give them.
        n: number of loss terms.
        positions: rows per loss term: 1 for vectors, H W of its output for a convolution in an image classifier.
        outputs: "nngeometry" only: C - 1 with ``FIM`` of C classes, the number of trials with ``FIM_MonteCarlo``.

    Returns:
        New tensors, the factors in the scale of ``target``.

    Raises:
        InputError: if a library is not known or a number is not positive.

    >>> import torch
    >>> a, g = rescale_factors(torch.eye(2), torch.eye(3), target="nngeometry", outputs=9)
    >>> a[0, 0].item(), round(g[0, 0].item(), 4)
    (3.0, 0.3333)
    """
    for name, library in (("source", source), ("target", target)):
        if library not in CONVENTIONS:
            raise InputError(f"{name} needs one of {', '.join(CONVENTIONS)}, got {library!r}")
    for name, number in (("n", n), ("positions", positions), ("outputs", outputs)):
        if type(number) is not int or number < 1:
            raise InputError(f"{name} needs a positive integer, got {number!r}")
    of, to = CONVENTIONS[source], CONVENTIONS[target]
    sizes = (n, positions, outputs)
    return a * (to.inputs(*sizes) / of.inputs(*sizes)), g * (to.gradients(*sizes) / of.gradients(*sizes))
