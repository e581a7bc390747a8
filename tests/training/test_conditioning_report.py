"""What a report says of a model, and what the paper says such numbers must be."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import orthofast
from orthofast.errors import InputError
from orthofast.metrics.spectra import condition_number, marchenko_pastur_condition
from orthofast.training import Factors, Report
from orthofast.training.analysis import collect


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def report(**given: Any) -> Report:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias[0] = -50.0
    data = [(torch.randn(40, 6), torch.randint(3, (40,))) for _ in range(2)]
    return orthofast.conditioning(model, data, **{"loss": "cross_entropy", **given})


def test_a_report_is_a_dictionary_a_frame_and_a_table() -> None:
    found = report(p=(0.5, 1.0))
    plain = json.loads(json.dumps(found.to_dict()))
    row = plain["layers"]["2"]
    assert (plain["labels"], plain["n"], plain["p"], plain["last"]) == ("exact", 80, [0.5, 1.0], "4")
    assert row["kappa_x_50"] == found.layers["2"].kappa_x[0.5]
    assert row["resolved_rank"] == found.layers["2"].resolved_rank_x * found.layers["2"].resolved_rank_g
    assert "kappa_x[1.0]" in row["lower_bounds"]  # a dead neuron before it
    frame = pytest.importorskip("pandas") and found.to_pandas()
    assert list(frame.index) == ["0", "2", "4"]
    assert frame.loc["2", "lambda_max_F"] == found.layers["2"].lambda_max_F
    lines = str(found).splitlines()
    assert lines[0] == "conditioning: labels=exact, N=80"
    assert ["8 x 8" in line for line in lines].index(True) == 3
    assert ">=" in lines[3]
    assert "50%" in lines[1]
    assert found.layers["0"].dead == 1


def test_kappas_are_held_against_what_noise_shows() -> None:
    found = report(p=(0.5,)).layers["2"]
    assert found.kappa_null == {0.5: marchenko_pastur_condition(80, 8, 0.5)}
    assert found.n_over_d == 10


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_charts_are_saved(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("vl_convert")
    path = tmp_path / f"chart.{suffix}"
    chart = report().plot(path)
    assert path.stat().st_size > 1000
    if suffix == "svg":
        text = path.read_text()
        assert "output gradients" in text
        assert "p = 80 %" in text
    drawn = json.dumps(chart.to_dict())
    assert '"lower bound": true' in drawn or suffix != "html"
    if suffix == "html":
        assert "https://cdn" not in path.read_text()[:3000]


def test_charts_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    with pytest.raises(InputError, match=r"path needs to end in"):
        report().plot(tmp_path / "chart.gif")
    with pytest.raises(InputError, match=r"p needs one of 0.5, 0.8, 0.9, 1.0"):
        report().plot(p=0.7)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("pandas", "altair"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pandas is needed"):
        report().to_pandas()
    with pytest.raises(InputError, match=r'altair is needed .* pip install "orthofast\[report\]"'):
        report().plot()


# what the papers say of covariances


def second_moments(init: str) -> list[float]:
    """Mean squared input of each layer of a deep ReLU network, over noise of variance 1."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layer = nn.Linear(256, 256, bias=False)
        if init == "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.uniform_(layer.weight, -(256**-0.5), 256**-0.5)
        layers += [layer, nn.ReLU()]
    found = collect(
        nn.Sequential(*layers), [torch.randn(512, 256)], loss="mse", labels="mc", factors=Factors(mc_samples=1)
    )
    return [float(layer.x.compute().trace()) / 256 for layer in found.values()]


@pytest.mark.parametrize(("init", "factor"), [("uniform", 1 / 6), ("he", 1.0)])
def test_layers_shrink_their_inputs_by_a_sixth_or_not_at_all(init: str, factor: float) -> None:
    """Uniform within 1/sqrt(d) has variance 1/(3 d), ReLU halves; He's 2/d makes up for it."""
    moments = second_moments(init)
    for before, after in itertools.pairwise(moments[1:]):
        assert after / before == pytest.approx(factor, rel=0.12)


def test_the_gradient_covariance_is_n_times_the_product_of_gradients_of_the_mean() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 4).double(), torch.randn(30, 5).double(), torch.randint(4, (30,))
    out = model(x)
    (g,) = torch.autograd.grad(functional.cross_entropy(out, y), out)
    found = collect(model, [(x, y)], loss=nn.CrossEntropyLoss(), labels="empirical")
    torch.testing.assert_close(found[""].g.compute(), 30 * g.T @ g, rtol=1e-12, atol=1e-15)


def test_the_largest_eigenvalue_of_features_above_zero_is_their_mean_and_batch_norm_takes_it_away() -> None:
    torch.manual_seed(0)
    turn = torch.randn(64, 64).double()
    features = torch.relu(torch.randn(4000, 64).double() @ turn / 2)

    class Head(nn.Module):
        def __init__(self, norm: bool) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(64, affine=False) if norm else nn.Identity()
            self.head = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.head(self.norm(x)))

    plain, normed = (
        collect(Head(norm).double(), [features], loss="mse", labels="mc")["head"].x.compute() for norm in (False, True)
    )
    mean_square = float(features.mean(0).square().sum())
    largest = float(torch.linalg.eigvalsh(plain)[-1])
    assert mean_square < largest < 1.1 * mean_square
    assert float(normed.trace()) == pytest.approx(64, rel=1e-3)
    assert float(torch.linalg.eigvalsh(normed)[-1]) < largest / 20


class Stack(nn.Module):
    """Residual blocks with batch norm in their branches and ReLU behind the sum, as the paper's networks."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, width, bias=False),
                nn.BatchNorm1d(width),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = torch.relu(x + branch(x))
        return cast(Tensor, self.head(x))


def test_inputs_of_the_last_layer_of_a_residual_stack_grow_with_its_depth() -> None:
    """Each unit walks at random and is reflected at 0: lambda_max is about (2 / pi) width blocks."""
    torch.manual_seed(0)
    per_block = []
    for blocks in (9, 38):
        found = collect(Stack(blocks, 64), [torch.randn(400, 64)], loss="mse", labels="mc")
        per_block.append(float(found["head"].x.spectrum()[0]) / (blocks * 64 * 2 / math.pi))
    assert 0.55 < per_block[0] < per_block[1] < 1.05


def test_small_samples_look_ill_conditioned_as_random_matrices_do() -> None:
    """White noise, whose kappa is 1: what is measured is the sampling."""
    torch.manual_seed(0)
    for ratio in (2, 4, 16):
        x = torch.randn(128 * ratio, 128).double()
        moment = collect(nn.Linear(128, 2).double(), [x], loss="mse", labels="mc")[""].x
        measured = float(condition_number(moment.spectrum(), 1.0).value)
        assert measured == pytest.approx(marchenko_pastur_condition(128 * ratio, 128), rel=0.2)


def test_empirical_labels_collapse_where_the_model_fits_and_exact_ones_less_so() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ratios = []
    for steps in (0, 150):
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        largest = [
            orthofast.conditioning(model, [(x, y)], loss="cross_entropy", labels=labels).layers["0"].lambda_max_g
            for labels in ("empirical", "exact")
        ]
        ratios.append(largest[0] / largest[1])
    assert 0.2 < ratios[0] < 5
    assert ratios[1] < 0.05
    assert not math.isnan(ratios[1])
