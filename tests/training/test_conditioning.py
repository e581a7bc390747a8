"""conditioning: factors against sums written out row by row, for every layer, label mode, loss and option."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.errors import InputError
from orthofast.training.analysis import conditioning
from orthofast.training.factors import Factors
from orthofast.training.report import Report


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def classes(*sizes: int, width: int = 6, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, width, generator=made, dtype=torch.float64), torch.randint(count, (n,), generator=made))
        for n in sizes
    ]


def rows_of(model: nn.Module, name: str, x: Tensor, direction: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Input and output gradient of a layer for one entry, the scalar ``direction(outputs)`` sent backwards."""
    kept: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, given, out: kept.extend((given[0], out)))
    scalar = direction(model(x))
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(scalar, kept[1])[0]


def truth(
    model: nn.Module, name: str, data: list[tuple[Tensor, Tensor]], weights: Callable[[Tensor, Tensor], list[Any]]
) -> tuple[Tensor, Tensor]:
    """Sigma_x and Sigma_g entry by entry: ``weights(outputs, target)`` lists (weight, scalar) of one entry."""
    x_sum, g_sum, entries, rows = 0.0, 0.0, 0, 0
    for inputs, targets in data:
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            entries += 1
            for place in range(len(weights(model(x), y))):
                a, g = rows_of(model, name, x, lambda out, y=y, place=place: weights(out, y)[place][1])  # type: ignore[misc]
                weight = float(weights(model(x), y)[place][0])
                if module_is_convolution(model, name):
                    g = g.flatten(2).movedim(1, 2)
                g = g.reshape(-1, g.shape[-1])
                g_sum = g_sum + weight * (g.T @ g)
            a = a if a.dim() < 4 else a.flatten(2).movedim(1, 2)
            a = a.reshape(-1, a.shape[-1])
            rows += len(a)
            x_sum = x_sum + a.T @ a
    return cast(Tensor, x_sum) / rows, cast(Tensor, g_sum) / entries


def module_is_convolution(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Conv1d | nn.Conv2d | nn.Conv3d)


def expected_labels(out: Tensor, y: Tensor) -> list[Any]:
    p = out.detach().softmax(-1)[0]
    return [(p[c], functional.cross_entropy(out, torch.tensor([c]))) for c in range(len(p))]


def targets_only(out: Tensor, y: Tensor) -> list[Any]:
    return [(1.0, functional.cross_entropy(out, y))]


def spectra(report: Report, name: str) -> tuple[Tensor, Tensor]:
    row = report.layers[name]
    assert not row.error
    return cast(Tensor, row.spectrum_x), cast(Tensor, row.spectrum_g)


def assert_spectra(report: Report, name: str, x: Tensor, g: Tensor, tol: float = 1e-12) -> None:
    for got, matrix in zip(spectra(report, name), (x, g), strict=True):
        true = torch.linalg.eigvalsh(matrix.detach()).flip(0)
        torch.testing.assert_close(got, true, rtol=0, atol=tol * float(true[0]))


@pytest.mark.parametrize("labels", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_of_a_perceptron_are_those_of_single_entries(labels: str, reduction: str) -> None:
    model, data = mlp(), classes(7, 5)
    report = conditioning(model, data, loss=nn.CrossEntropyLoss(reduction=reduction), labels=labels)
    for name in ("0", "2", "4"):
        x, g = truth(model, name, data, expected_labels if labels == "exact" else targets_only)
        assert_spectra(report, name, x, g)
    row = report.layers["2"]
    assert (report.labels, report.n, report.last) == (labels, 12, "4")
    assert (row.n, row.terms, row.n_over_d, row.calls) == (12, 12, 12 / 9, 1)
    assert row.lambda_max_F == row.lambda_max_x * row.lambda_max_g
    assert row.weight_norm == pytest.approx(model[2].weight.detach().norm().item())


def test_any_loss_of_ones_own_is_understood_from_its_values() -> None:
    model, data = mlp(), classes(7, 5)
    known = conditioning(model, data, loss=functional.cross_entropy, labels="empirical")
    for mine in (
        lambda out, y: functional.cross_entropy(out, y, reduction="mean"),
        lambda out, y: functional.cross_entropy(out, y, reduction="sum"),
    ):
        found = conditioning(model, data, loss=mine, labels="empirical")
        torch.testing.assert_close(spectra(found, "2")[1], spectra(known, "2")[1], rtol=1e-12, atol=1e-15)
        pairs = [(x[:2], y[:2]) for x, y in data]
        pairwise = [conditioning(model, pairs, loss=a, labels="empirical") for a in (mine, "cross_entropy")]
        torch.testing.assert_close(spectra(pairwise[0], "2")[1], spectra(pairwise[1], "2")[1], rtol=1e-12, atol=1e-15)
        assert not any("could not be tried" in note for note in pairwise[0].notes)
    single = [(x[:1], y[:1]) for x, y in data]
    untold = conditioning(model, single, loss=lambda out, y: 1.0 * functional.cross_entropy(out, y), labels="empirical")
    assert any("could not be tried" in note for note in untold.notes)
    with pytest.raises(InputError, match="neither the mean nor the sum"):
        conditioning(model, data, loss=lambda out, y: functional.cross_entropy(out, y).sqrt(), labels="empirical")


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
def test_exact_labels_of_other_losses_are_their_expected_curvature(loss: str) -> None:
    model, data = mlp(), [(x, torch.rand(len(x), 4).double()) for x, _ in classes(6)]

    def directions(out: Tensor, y: Tensor) -> list[Any]:
        s = out.detach().sigmoid()[0]
        curvature = torch.full((4,), 2 / 4).double() if loss == "mse" else s * (1 - s) / 4
        return [(curvature[j], out[0, j]) for j in range(4)]

    kind = nn.MSELoss() if loss == "mse" else nn.BCEWithLogitsLoss()
    for given in (loss, kind):
        report = conditioning(model, data, loss=given)
        x, g = truth(model, "2", data, directions)
        assert_spectra(report, "2", x, g)


def test_labels_drawn_from_the_model_converge_to_the_expectation() -> None:
    model, data = mlp(), classes(40)
    for loss in ("cross_entropy", "mse", "binary_cross_entropy"):
        data = [(x, y if loss == "cross_entropy" else torch.rand(len(x), 4).double()) for x, y in classes(40)]
        exact = conditioning(model, data, loss=loss)
        drawn = [
            conditioning(model, data, loss=loss, labels="mc", factors=Factors(mc_samples=500, seed=seed))
            for seed in (3, 3, 4)
        ]
        same, again, other = (found.layers["2"].lambda_max_g for found in drawn)
        assert same == again != other
        assert same == pytest.approx(exact.layers["2"].lambda_max_g, rel=0.05)


class Shared(nn.Module):
    """A layer called twice, an embedding, sequences, an in-place activation, a frozen start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Embedding(11, 5, padding_idx=0)
        self.twice = nn.Linear(5, 5)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.act(self.twice(self.act(self.twice(self.embed(tokens)))))))


def tokens() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(5)
    return torch.randint(11, (6, 4), generator=made), torch.randint(3, (6, 4), generator=made)


@pytest.mark.parametrize("frozen", [False, True])
def test_sequences_shared_layers_and_embeddings(frozen: bool) -> None:
    """Every position is a term and a row; both calls of a layer add their rows; padding is no row."""
    model = Shared().double()
    model.embed.requires_grad_(not frozen)
    inputs, targets = tokens()
    report = conditioning(model, [(inputs, targets)], loss="cross_entropy", labels="empirical")

    outs: list[Tensor] = []
    ins: list[Tensor] = []

    def hook(module: nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
        ins.append(given[0])
        outs.append(out.clone())
        return outs[-1].clone()

    model.embed.requires_grad_(True)
    handles = [m.register_forward_hook(hook) for m in (model.embed, model.twice, model.head)]
    loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, outs)
    for handle in handles:
        handle.remove()
    terms = targets.numel()
    g = torch.cat([gradients[1], gradients[2]]).flatten(0, 1)
    x = torch.cat([ins[1], ins[2]]).flatten(0, 1)
    assert_spectra(report, "twice", x.T @ x / len(x), g.T @ g / terms)
    assert (report.layers["twice"].calls, report.layers["twice"].n, report.layers["twice"].positions) == (2, 48, 4)
    kept = inputs.flatten() != 0
    e = gradients[0].flatten(0, 1)[kept]
    counts = torch.bincount(inputs.flatten()[kept], minlength=11).double()
    assert_spectra(report, "embed", torch.diag(counts / kept.sum()), e.T @ e / terms)
    torch.testing.assert_close(
        spectra(report, "embed")[0], (counts / kept.sum()).sort(descending=True).values, rtol=0, atol=0
    )


def test_reduced_sequences_masks_and_ignored_targets() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 7, 5).double()
    y = torch.randint(3, (4, 7))
    mask = torch.rand(4, 7) < 0.6
    y[~mask] = -100
    hidden = model[0](x)
    out = model[2](model[1](hidden))
    loss = functional.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum")
    (g,) = torch.autograd.grad(loss, hidden)
    terms = int(mask.sum())

    expand = conditioning(
        model, [(x, y)], loss="cross_entropy", labels="empirical", factors=Factors(mask=lambda batch: batch[1] >= 0)
    )
    assert_spectra(expand, "0", x[mask].T @ x[mask] / terms, g[mask].T @ g[mask] / terms)
    assert (expand.layers["0"].n, expand.layers["0"].terms) == (terms, terms)

    reduce = conditioning(model, [(x, y)], loss="cross_entropy", labels="empirical", factors=Factors(sharing="reduce"))
    a, b = x.mean(1), g.sum(1)
    assert_spectra(reduce, "0", a.T @ a / 4, b.T @ b / terms)

    exact = conditioning(model, [(x, y)], loss="cross_entropy")
    p = out.detach().softmax(-1)[mask]
    total = sum(
        (p[:, c, None, None] * torch.einsum("ni,nj->nij", d, d)).sum(0)
        for c in range(3)
        for d in [p - functional.one_hot(torch.full((terms,), c), 3)]
    )
    torch.testing.assert_close(
        spectra(exact, "2")[1], torch.linalg.eigvalsh(cast(Tensor, total) / terms).flip(0), rtol=1e-10, atol=1e-15
    )


def test_rows_can_be_drawn_without_bias() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(30, 5).double(), torch.randint(3, (30,))) for _ in range(300)]
    whole = conditioning(model, data, loss="cross_entropy")
    some = conditioning(model, data, loss="cross_entropy", factors=Factors(rows_per_batch=10))
    assert some.layers["0"].n == 3000
    torch.testing.assert_close(spectra(some, "0")[0], spectra(whole, "0")[0], rtol=0.1, atol=0)
    torch.testing.assert_close(spectra(some, "0")[1], spectra(whole, "0")[1], rtol=0.2, atol=1e-4)


def test_centred_and_qr_covariances() -> None:
    model, data = mlp(), classes(9, 8)
    inputs = torch.cat([x for x, _ in data])
    centred = conditioning(model, data, loss="cross_entropy", factors=Factors(centered=True))
    torch.testing.assert_close(
        spectra(centred, "0")[0],
        torch.linalg.eigvalsh(torch.cov(inputs.T, correction=0)).flip(0),
        rtol=1e-12,
        atol=1e-14,
    )
    by_qr = conditioning(model, data, loss="cross_entropy", factors=Factors(method="qr"))
    assert_spectra(by_qr, "2", *truth(model, "2", data, expected_labels))


def test_dead_and_full_neurons_are_zeros_of_both_covariances() -> None:
    """Three dead units are three missing ranks of the next inputs and of their own gradients."""
    model, data = mlp(), classes(40)
    with torch.no_grad():
        model[0].bias[:3] = -100.0
        model[0].bias[5] = 100.0
    report = conditioning(model, data, loss="cross_entropy")
    assert (report.layers["0"].dead, report.layers["0"].full) == (3, 1)
    assert report.layers["0"].resolved_rank_g <= 9 - 3
    assert report.layers["2"].resolved_rank_x == 9 - 3
    assert report.layers["2"].dead is None
    assert "kappa_x[1.0]" in report.layers["2"].lower_bounds


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4)).double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    report = conditioning(model, classes(20), loss="cross_entropy")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(cast(Tensor, model[0].weight.grad), torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert any("batch norm" in note for note in report.notes)
    assert not any("batch norm" in note for note in conditioning(model.eval(), classes(20), loss="cross_entropy").notes)


def test_weight_domination_is_of_the_mean_loss_of_the_first_batch() -> None:
    model, data = mlp(), classes(9, 8)
    for reduction in ("mean", "sum"):
        report = conditioning(model, data, loss=nn.CrossEntropyLoss(reduction=reduction))
        loss = functional.cross_entropy(model(data[0][0]), data[0][1])
        (gradient,) = torch.autograd.grad(loss, model[2].weight)
        ratio = float(torch.linalg.matrix_norm(gradient, 2) / torch.linalg.matrix_norm(model[2].weight.detach(), 2))
        assert report.layers["2"].weight_domination == pytest.approx(ratio, rel=1e-6)


class Tied(nn.Module):
    """An embedding whose weight is the head's too; and a weight used behind its module's back."""

    def __init__(self, hidden_use: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.hidden_use = hidden_use

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return cast(Tensor, functional.linear(x, self.head.weight) if self.hidden_use else self.head(x))


def test_the_self_check_adds_up_tied_layers_and_finds_hidden_uses() -> None:
    inputs = torch.randint(7, (10,))
    fine = conditioning(Tied(False), [(inputs, inputs)], loss="cross_entropy")
    assert not fine.layers["embed"].error
    assert not fine.layers["head"].error
    found = conditioning(Tied(True), [(inputs, inputs)], loss="cross_entropy")
    assert "G^T X differs from the weight's gradient" in found.layers["embed"].error
    assert math.isnan(found.layers["embed"].lambda_max_x)
    assert "embed: G^T X" in str(found)


def test_what_is_not_measured_is_listed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(3, 3, 2)
            self.idle = nn.Linear(3, 3)
            self.used = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.used(self.up(x)).mean(1))

    report = conditioning(Odd(), [torch.randn(5, 3, 3)], loss="mse", labels="mc")
    assert list(report.layers) == ["used"]
    assert [name for name, _ in report.skipped] == ["up.weight", "idle"]
    assert "never called" in str(report)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"labels": "all"}, "labels needs one of"),
        ({"loss": "hinge"}, "loss needs a callable"),
        ({"loss": lambda out, y: out.mean()}, "needs the distribution of labels"),
        ({"loss": nn.CrossEntropyLoss(weight=torch.ones(4))}, "loss has weight"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "reduction='mean' or 'sum'"),
        ({"p": (0.5, 1.5)}, "p needs a share"),
        ({"p": 0.5}, "p needs shares of the eigenvalues in a list"),
        ({"p": ()}, "p needs shares of the eigenvalues in a list"),
        ({"factors": 3}, "factors needs orthofast.training.Factors, got int"),
        ({"factors": Factors(mask=lambda batch: None)}, "mask needs to give a boolean tensor"),
        ({"factors": Factors(mask=lambda batch: torch.ones(2, 3))}, "mask gives"),
        ({"batches": 0}, "batches needs a positive integer"),
        ({"layers": "nowhere.*"}, "no layer to measure"),
        ({"labels": "empirical", "loader": [torch.randn(3, 6).double()]}, "gives no targets"),
        ({"loader": []}, "loader gives no batch"),
        ({"loader": torch.ones(5, 6).double()}, "loader needs an iterable of batches, got Tensor"),
        ({"loader": None}, "loader needs an iterable of batches, got NoneType"),
        ({"loader": [(1, 2, 3)]}, "got 3 entries"),
    ],
)
def test_what_cannot_be_used_is_said(given: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {"loader": classes(5), "loss": "cross_entropy", **given}
    with pytest.raises(InputError, match=said):
        conditioning(mlp(), options.pop("loader"), **options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"conv": "all"}, "conv needs one of"),
        ({"mc_samples": 0}, "mc_samples needs"),
        ({"method": "qr", "centered": True}, "qr"),
    ],
)
def test_factors_refuse_what_is_unknown(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Factors(**given)


def test_many_outputs_need_drawn_labels() -> None:
    with pytest.raises(InputError, match="labels='mc'"):
        conditioning(nn.Linear(3, 1100), [torch.randn(4, 3)], loss="cross_entropy")
    report = conditioning(nn.Linear(3, 1100), [torch.randn(4, 3)], loss="cross_entropy", labels="mc", p=(0.5,))
    assert list(report.layers) == [""]
