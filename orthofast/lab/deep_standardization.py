"""Beyond Daneshmand et al. 2021, Figure 5: orthogonal starts beside the normaliser-free layers of Brock et al. 2021.

Appendix H of the paper makes this comparison; it is not at hand, and the main text has no numbers of it. Here the same
perceptrons start from Xavier's weights, from iterative orthogonalisation, or have scaled weight standardisation in
place of batch norm, with and without the adaptive gradient clipping that Brock et al. train with. Their networks have
shortcuts too; those of the paper have none, and nor have these.

What must hold is derived before any run. Rows of standardised weights sum to 0, which takes the mean over features from
each sample, and behind a ReLU that mean is most of what samples have in common. With c the cosine of two samples before
a layer, the next one's is ``(E[f(u) f(v)] - E[f]^2) / Var f``: 0 stays 0 and is stable, with slope
``(pi / 2) / (pi - 1)`` = 0.73; 1 is unstable, with slope ``pi / (pi - 1)`` = 1.47. So hidden layers start with a lower
gap than Xavier's, whose cosines go to 1. The second slope is also the factor by which squared gradients grow from layer
to layer, backwards: as in deep networks with batch norm, and a reason why depth still hinders such networks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast import orthogonality_gap, orthogonalize_
from orthofast.lab.data import Images, load
from orthofast.lab.deep_training import DEPTHS, LAST, STARTS, logit_gap, perceptron
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import batches, fit, optimizer_for
from orthofast.lab.missing import over
from orthofast.lab.modern_nets import RELU_GAIN, StandardizedLinear, clip_gradients_
from orthofast.lab.verdict import Number, Verdict, above, judge, less, shown

# width, steps, batch, learning rate
SIZES = {"small": (100, 150, 100, 0.01), "paper": (800, 3000, 500, 0.01)}
ORTHOGONAL = "orthogonal, notebook"
STANDARDIZED, CLIPPED = "standardised", "standardised, clipped"
ARMS = ("Xavier", ORTHOGONAL, STANDARDIZED, CLIPPED)
RATE_256 = 0.1  # for batches of 256, with momentum 0.9: how Brock et al. train, clipped
GROWTH = math.pi / (math.pi - 1)  # of squared gradients a layer, in wide networks whose samples have cosine 0


def standardized_perceptron(data: Images, depth: int, width: int) -> nn.Sequential:
    """The perceptron of Figure 5 with standardised weights in all layers but the last, which starts as Xavier's."""
    layers: list[nn.Module] = []
    for number in range(depth - 1):
        inputs = width if number else data.train.shape[1]
        layers += [StandardizedLinear(inputs, width, scale=RELU_GAIN if number else 1.0), nn.ReLU()]
    last = nn.Linear(width, data.classes, bias=False)
    nn.init.xavier_uniform_(last.weight, gain=math.sqrt(2))
    return nn.Sequential(*layers, last).to(data.train.device)


def started(data: Images, depth: int, width: int, arm: str, seed: int) -> nn.Sequential:
    """A network of one arm before training."""
    torch.manual_seed(seed)
    if arm in (STANDARDIZED, CLIPPED):
        return standardized_perceptron(data, depth, width)
    model = perceptron(data, depth, width)
    chosen = STARTS[arm]
    if chosen is not None:
        power, rotation, normalize = chosen
        inputs = next(batches(data, min(3 * width, len(data.train)), 1, seed))[0]
        orthogonalize_(model, inputs, power=power, rotation=rotation, normalize=normalize)
    return model


def gradient_growth(model: nn.Sequential, inputs: Tensor, labels: Tensor) -> float:
    """Factor by which the squared gradient grows for each layer towards the input, over all hidden layers.

    Args:
        model: linear layers with activations between, the last one linear.
        inputs: (N, d).
        labels: (N,), for the cross-entropy.

    Returns:
        ``(|dL/dh_1|^2 / |dL/dh_k|^2)^(1 / (k - 1))``, h_1 to h_k the outputs of the activations; NaN if there are fewer
        than two or a gradient is 0.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> gradient_growth(net, torch.randn(3, 4), torch.tensor([0, 1, 0])) > 0
    True
    """
    hidden: list[Tensor] = []
    x = inputs
    for layer in model:
        x = layer(x)
        if not isinstance(layer, nn.Linear):
            hidden.append(x)
    if len(hidden) < 2:
        return math.nan
    first, last = torch.autograd.grad(functional.cross_entropy(x, labels), (hidden[0], hidden[-1]))
    squares = first.double().square().sum(), last.double().square().sum()
    if not all(float(square) > 0 for square in squares):
        return math.nan
    return math.exp(float((squares[0] / squares[1]).log()) / (len(hidden) - 1))


def compared(settings: Settings, depth: int, arm: str) -> dict[str, Any]:
    """One network: gaps of the logits and of the last hidden layer and growth of gradients at the start, final loss."""
    width, steps, batch, rate = SIZES[settings.scale]
    data = load(settings).standardized().flat()
    model = started(data, depth, width, arm, settings.seed)
    inputs, labels = next(batches(data, batch, 1, settings.seed))
    with torch.no_grad():
        hidden = float(orthogonality_gap(model[:-1](inputs)))
    growth = gradient_growth(model, inputs, labels)
    gap = logit_gap(model, data, batch, settings.seed)
    optimizer = optimizer_for(model, "sgd", rate)
    if arm == CLIPPED:
        optimizer = optimizer_for(model, "momentum", RATE_256 * batch / 256)
        # all but the last layer's, as its makers advise
        hidden_parameters = list(model[:-1].parameters())
        optimizer.register_step_pre_hook(lambda *_: clip_gradients_(hidden_parameters))
    losses = fit(model, data, optimizer, steps=steps, batch=batch, seed=settings.seed)
    return {"gap": gap, "hidden_gap": hidden, "growth": growth, "loss": statistics.fmean(losses[-LAST:])}


def comparison(settings: Settings) -> Raw:
    """All arms at all depths."""
    depths = DEPTHS[settings.scale]
    found = {arm: [compared(settings, depth, arm) for depth in depths] for arm in ARMS}
    return {"depth": list(depths), "guessing": math.log(load(settings).classes), **found}


def verdict(raws: Sequence[Raw]) -> Verdict:
    """Orthogonal starts train where Xavier's do not; standardised weights start with the smaller gap."""

    def deep(arm: str, key: str) -> list[Number]:
        return [raw[arm][-1][key] for raw in raws]

    half = [over(raw["guessing"], 2) for raw in raws]
    depth = raws[0]["depth"][-1]
    losses = {arm: deep(arm, "loss") for arm in ARMS}
    gaps = {arm: deep(arm, "hidden_gap") for arm in ARMS}
    said = "trains with depth (image of Figure 5)"
    checks = [
        less(f"depth {depth}: loss from orthogonal starts minus half of guessing's", losses[ORTHOGONAL], half, said),
        less(f"depth {depth}: half of guessing's loss minus Xavier's", half, losses["Xavier"], "slower (image)"),
        less(
            f"depth {depth}: gap of the last hidden layer at the start, standardised minus Xavier",
            gaps[STANDARDIZED],
            gaps["Xavier"],
            "appendix H, not at hand",
        ),
        above(f"depth {depth}, standardised: growth of squared gradients a layer", deep(STANDARDIZED, "growth"), 1.0),
        shown("the same of wide networks, pi / (pi - 1)", [GROWTH]),
    ]
    for arm in ARMS:
        for index, layers in enumerate(raws[0]["depth"]):
            checks.append(shown(f"{arm}, depth {layers}: final loss", [raw[arm][index]["loss"] for raw in raws]))
    for arm in ARMS:
        checks += [
            shown(f"{arm}, depth {depth}: gap of the last hidden layer at the start", gaps[arm]),
            shown(f"{arm}, depth {depth}: gap of the logits at the start", deep(arm, "gap")),
            shown(f"{arm}, depth {depth}: growth of squared gradients a layer", deep(arm, "growth")),
        ]
    return judge(
        checks,
        "Appendix H is not at hand and the main text has no numbers of this comparison, so losses with standardised "
        "weights decide nothing. All train by SGD at one rate, but for the clipped networks, which have the momentum "
        "and the rate of Brock et al., 0.1 for batches of 256; theirs also have shortcuts.",
    )


def drawn(raws: Sequence[Raw]) -> Figure:
    """Gap at the start and final loss over depth."""

    def panel(key: str, y: str, arms: Sequence[str], levels: Sequence[tuple[str, float]] = ()) -> Panel:
        series = [Series(arm, raws[0]["depth"], [[row[key] for row in raw[arm]] for raw in raws]) for arm in arms]
        return Panel("depth, linear layers", y, series, y_log=key == "loss", levels=levels)

    starts = [arm for arm in ARMS if arm != CLIPPED]  # which starts as the one before
    losses = [*starts[:-1], CLIPPED, STANDARDIZED]
    return Figure(
        [
            panel("hidden_gap", "gap V of the last hidden layer, start", starts),
            panel("gap", "gap of the logits, start", starts),
            panel("growth", "growth of squared gradients a layer", starts, [("theory", GROWTH)]),
            panel("loss", f"loss (nats), last {LAST} steps", losses, [("guessing", raws[0]["guessing"])]),
        ],
        "Perceptrons with ReLU and without batch norm, trained by SGD. Standardised: scaled weight standardisation; "
        "clipped: with adaptive gradient clipping and momentum. A line ends where a network diverged.",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-X1",
        "Appendix H: orthogonal starts beside the standardised weights of Brock et al. 2021",
        "Orthogonal starts train at depths where Xavier's do not; how standardised weights compare is shown.",
        comparison,
        verdict,
        drawn,
        needs=DATA,
        size="width 100, 150 steps of 100 images instead of width 800 and 30 epochs of CIFAR-10.",
    ),
)
