"""Matrices for pictures: they are what the folded measures are means of, and large ones are refused."""

from __future__ import annotations

import pytest
import torch

from orthofast.errors import InputError
from orthofast.metrics import cosine_matrix, diagonal_dominance, gram_matrix, max_coherence, orthogonality_gap, pii


@pytest.mark.parametrize("vectors", ["rows", "cols"])
@pytest.mark.parametrize("shape", [(30, 12), (8, 5, 3, 3)], ids=str)
def test_measures_are_means_over_the_whole_matrices(shape: tuple[int, ...], vectors: str) -> None:
    weight = torch.randn(shape)
    cosines, gram = (matrix(weight, vectors=vectors) for matrix in (cosine_matrix, gram_matrix))
    n = len(cosines)
    off = ~torch.eye(n, dtype=torch.bool)
    assert cosines.dtype == torch.float64
    assert cosines[off].abs().mean().item() == pytest.approx(pii(weight, vectors=vectors).item(), abs=3e-7)
    assert cosines[off].abs().max().item() == pytest.approx(max_coherence(weight, vectors=vectors)[0].item(), abs=3e-7)
    ratios = (gram.abs().sum(1) - gram.diagonal()) / gram.diagonal()
    assert ratios.mean().item() == pytest.approx(diagonal_dominance(weight, vectors=vectors).mean.item(), rel=1e-12)
    gap = (gram / gram.trace() - torch.eye(n, dtype=torch.float64) / n).norm()
    assert gap.item() == pytest.approx(orthogonality_gap(weight, vectors=vectors).item(), rel=1e-12)


def test_no_row_of_the_published_initialisation_is_dominant() -> None:
    gram = gram_matrix(torch.nn.Linear(500, 500).weight)
    ratio = (gram.abs().sum(1) - gram.diagonal()) / gram.diagonal()
    assert ratio.mean().item() == pytest.approx(17.80, abs=0.15)
    assert ratio.min().item() > 1


def test_lengths_do_not_matter_and_zero_or_broken_vectors_have_no_angle() -> None:
    weight = torch.tensor([[1e-160, 0], [1e160, 1e160], [0, 0], [float("inf"), 1]], dtype=torch.float64)
    found = cosine_matrix(weight)
    assert found[0, 1].item() == pytest.approx(0.5**0.5, rel=1e-15)
    assert found.diagonal().isnan().tolist() == [False, False, True, True]
    assert found.isnan().sum().item() == 12
    assert cosine_matrix(torch.ones(3, 0)).isnan().all()


def test_heads_and_parallel_vectors() -> None:
    weight = torch.nn.Parameter(torch.full((6, 7), 0.1))
    found = cosine_matrix(weight, vectors="heads", heads=2)
    assert found.shape == (2, 3, 3)
    assert not found.requires_grad
    assert found.max().item() <= 1
    torch.testing.assert_close(found, torch.ones(2, 3, 3, dtype=torch.float64))


def test_large_matrices_are_refused_with_their_size() -> None:
    with pytest.raises(InputError, match="weight has 5000 vectors, whose matrix takes 200 MB, and limit is 4096"):
        gram_matrix(torch.ones(5000, 2))
    assert gram_matrix(torch.ones(5, 2), limit=5).shape == (5, 5)
    with pytest.raises(InputError, match="limit needs a positive integer, got 0"):
        cosine_matrix(torch.ones(3, 2), limit=0)
