"""Experiments on Lu et al. 2024 from end to end, at a few steps: what they measure, what their figures need."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from orthofast.errors import CheckpointError, InputError
from orthofast.lab import (
    independence_ablation,
    independence_beyond,
    independence_convolutions,
    independence_lora,
    independence_optimizers,
    independence_pictures,
    independence_residual,
    independence_transformer,
    table5,
)
from orthofast.lab.data import Images
from orthofast.lab.drawing import pictures
from orthofast.lab.experiment import Experiment, Settings
from orthofast.lab.independence_parts import ResidualConvNet, TinyTransformer, digit_pairs, fit_text, markov_text


def images(channels: int = 1, count: int = 160) -> Images:
    """Two classes that differ in one half of the picture."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    shown = torch.rand(count, channels, 8, 8, generator=generator) * 0.2
    shown[labels == 1, :, :4] += 0.8
    return Images("halves", shown[20:], labels[20:], shown[:20], labels[:20], 2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the runs of the lab have it: networks this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of everything, small networks, no files."""
    for module in (
        independence_optimizers,
        independence_convolutions,
        independence_ablation,
        independence_residual,
        independence_pictures,
    ):
        monkeypatch.setattr(module, "load", lambda settings: images())
    monkeypatch.setattr(independence_beyond, "load", lambda settings: images())
    sizes = independence_ablation.Sizes(width=24, hidden=5, steps=2, batch=20, seed=0)
    for module in (independence_ablation, independence_pictures):
        monkeypatch.setattr(module, "perceptron_sizes", lambda settings: sizes)
    monkeypatch.setattr(
        independence_optimizers, "_perceptron_sizes", lambda settings: {"width": 16, "steps": 2, "batch": 20, "seed": 0}
    )
    for module in (independence_optimizers, independence_convolutions, independence_residual, independence_beyond):
        fit = module.fit
        monkeypatch.setattr(
            module, "fit", lambda *given, fit=fit, **named: fit(*given, **named | {"steps": 2, "batch": 20})
        )
    monkeypatch.setattr(independence_beyond, "WIDTHS", {"small": (8, 12)})
    monkeypatch.setattr(independence_beyond, "until_loss", short(independence_beyond.until_loss, width=12, most=3))
    monkeypatch.setattr(independence_beyond, "penalized", short(independence_beyond.penalized, width=12, steps=2))
    monkeypatch.setattr(
        independence_transformer,
        "train_arm",
        short(independence_transformer.train_arm, blocks=2, width=8, inner=16, heads=2, steps=2, batch=2),
    )
    monkeypatch.setattr(independence_lora, "random_updates", lambda n, rank, seed: {"base": 0.1, "merged": [0.1] * 5})
    monkeypatch.setattr(
        independence_lora, "fine_tuned", short(independence_lora.fine_tuned, width=8, inner=16, steps=2, tuning=2)
    )


def short(run: Callable[..., object], **sizes: int) -> Callable[..., object]:
    return lambda *given, **named: run(*given, **named | sizes)


MODULES = (
    independence_optimizers,
    independence_convolutions,
    independence_ablation,
    independence_residual,
    independence_pictures,
    independence_transformer,
    independence_lora,
    independence_beyond,
    table5,
)
EXPERIMENTS = [one for module in MODULES for one in module.EXPERIMENTS if one.id != "S0-T5"]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.id)
@pytest.mark.usefixtures("quick")
def test_an_experiment_runs_twice_alike_is_judged_and_drawn(experiment: Experiment) -> None:
    if experiment.id == "S0-M2":
        pytest.importorskip("peft")
    raw = experiment.run(Settings())
    kept = json.loads(json.dumps(raw))  # as it is read back from the folder of a run
    verdict = experiment.verdict([kept, kept])
    assert verdict.checks
    assert all(check.measured is None or math.isfinite(check.measured) for check in verdict.checks)
    drawn = experiment.figure([kept, kept])
    assert drawn.panels
    if experiment.id in ("S0-F1", "S0-T1", "S0-X2"):  # cells, bars, lines
        assert pictures(drawn, experiment.title, 2)["figure.svg"].count("<path") > 5
        assert json.loads(json.dumps(experiment.run(Settings()))) == kept


def test_a_layer_of_equal_weights_starts_at_one_and_the_others_at_the_baseline() -> None:
    found = independence_optimizers.train_perceptron(images().flat(), "sgd", 0.0, width=60, steps=1, batch=20, seed=1)
    assert found["initial"] == found["final"]
    one, *others = found["initial"]
    assert one == pytest.approx(1, abs=1e-6)
    assert others == pytest.approx([0.1033] * 2, abs=0.006)  # E |cos| of length 60


def test_colour_images_are_measured_at_the_central_tap_of_the_first_convolution() -> None:
    grey, colour = (
        independence_convolutions.train_convnet(
            images(channels), "adam", 1e-3, widths=(8, 8, 8), hidden=8, steps=1, batch=20, seed=0
        )
        for channels in (1, 3)
    )
    assert grey["initial"][0] == colour["initial"][0] == pytest.approx(1, abs=1e-6)
    assert colour["final"][0] > 0.999
    assert grey["final"][0] > 0.999
    assert colour["initial"][1] == pytest.approx(0.29, abs=0.1)  # E |cos| of length 8


def test_arms_start_alike_and_differ_by_what_they_are_named() -> None:
    net = ResidualConvNet(1, (4, 8), 2, 10, norm_res=True)
    plain = ResidualConvNet(1, (4, 8), 2, 10, norm_res=False)
    kinds = [[type(module) for module in one.modules()] for one in (net, plain)]
    assert kinds[0].count(nn.BatchNorm2d) == 1 + 2 * 4
    assert kinds[1].count(nn.BatchNorm2d) == 0
    assert [tuple(layer.weight.shape) for layer in net.watched()] == [(4, 4, 3, 3), (8, 4, 3, 3)]
    with torch.no_grad():
        for layer in (*net.stages.modules(), *plain.stages.modules()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.weight.zero_()
                layer.bias.zero_()
        net.eval()
        x = torch.rand(3, 1, 8, 8)
        assert net(x).std(0).min() > 0  # shortcuts alone carry the image
        assert plain(x).std(0).max() == 0
    with pytest.raises(InputError, match='activation needs "gelu" or "relu"'):
        ResidualConvNet(1, activation="tanh")


def test_the_transformer_is_causal_and_its_last_layer_can_be_bare() -> None:
    torch.manual_seed(0)
    model = TinyTransformer(11, 8, 16, 2, 2, 6, wrapped_last=False)
    assert [layer.norm2 is None for layer in model.layers] == [False, True]
    text = torch.randint(11, (1, 6))
    other = text.clone()
    other[0, 4] = (other[0, 4] + 1) % 11
    with torch.no_grad():
        before, after = model(text), model(other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    with pytest.raises(InputError, match="heads needs a divisor"):
        TinyTransformer(11, 9, 16, 2, 2, 6)


def test_text_of_a_chain_can_be_learned_and_another_chain_is_another_text() -> None:
    text = markov_text(6, 4000, seed=3)
    followers: dict[tuple[int, int], set[int]] = {}
    for first, second, third in zip(text.tolist(), text[1:].tolist(), text[2:].tolist(), strict=False):
        followers.setdefault((first, second), set()).add(third)
    assert max(map(len, followers.values())) <= 4
    near, far = (markov_text(6, 4000, seed=3, changed_frac=part) for part in (0.0, 1.0))
    assert torch.equal(text, near)
    assert not torch.equal(text, far)
    torch.manual_seed(0)
    model = nn.Embedding(6, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = fit_text(model, text, optimizer, steps=40, batch=8, length=10, seed=0)
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 0.1


def test_pairs_of_digits_have_a_hundred_classes() -> None:
    pairs = digit_pairs(replace_labels(images()), 50, 10)
    assert pairs.train.shape == (50, 2, 8, 8)
    assert pairs.test.shape == (10, 2, 8, 8)
    assert pairs.classes == 100
    first, second = pairs.train_labels // 10, pairs.train_labels % 10
    bright = pairs.train[:, :, :4].mean((2, 3)) > 0.5
    assert torch.equal(bright.long(), torch.stack([first, second], 1))


def replace_labels(data: Images) -> Images:
    return Images(data.name, data.train, data.train_labels, data.test, data.test_labels, 10)


def test_training_stops_at_the_loss_and_muon_moves_hidden_matrices() -> None:
    data = images()
    for name in ("muon", "slow adam"):
        found = independence_beyond.until_loss(
            data.flat(), name, {"muon": 0.02, "slow adam": 1e-3}[name], width=24, most=400, seed=0
        )
        assert found["steps"] < 400
        assert found["loss"] < independence_beyond.STOP
        assert min(found["drift"]) > 0
        assert found["accuracy"] == 1
    short_of_it = independence_beyond.until_loss(data.flat(), "sgd", 1e-6, width=8, most=12, seed=0)
    assert short_of_it["steps"] == 12
    assert short_of_it["loss"] > independence_beyond.STOP


def test_a_penalty_lowers_pii_of_columns() -> None:
    plain, pushed = (
        independence_beyond.penalized(images().flat(), weight, width=24, steps=60, seed=0) for weight in (0.0, 10.0)
    )
    assert pushed["cols"] < 0.5 * plain["cols"]


def test_a_small_random_update_keeps_pii_and_a_large_one_brings_its_own() -> None:
    found = independence_lora.random_updates(256, 4, 0)
    first, *_, last = found["merged"]
    assert first == pytest.approx(found["base"], rel=0.01)
    assert 3 * found["base"] < last < 4.5 * found["base"]  # 3.7; an update twice as large gives 6.1
    assert found["update"] == pytest.approx(0.4244, abs=0.03)


def test_table5_reads_models_that_are_named_and_tells_of_those_it_cannot(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyTransformer(11, 16, 32, 2, 2, 6)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.save(model.state_dict(), tmp_path / name / "model.pt")
    named = [str(tmp_path / name / "model.pt") for name in ("one", "two", "three")]
    settings = Settings(options=((table5.OPTION, "\n".join(named[:2])),))
    found = table5.run(settings)
    assert list(found) == ["one/model.pt", "two/model.pt"]
    assert found["one/model.pt"]["paper"] == found["two/model.pt"]["paper"]
    assert list(found["one/model.pt"]["paper"]) == list(table5.ROLES)
    weight = model.layers[0].mlp.down_proj.weight.detach()
    from_rows = found["one/model.pt"]["paper"]["Linear_2.weight"][0]
    unit = (weight / weight.norm(dim=1, keepdim=True)).double()
    cosines = (unit @ unit.T).abs()
    assert from_rows == pytest.approx(((cosines.sum() - 16) / (16 * 15)).item(), abs=1e-6)
    assert table5.EXPERIMENTS[0].figure([found]).panels
    partly = table5.run(replace(settings, options=((table5.OPTION, "\n".join(named)),)))
    verdict = table5.verdict([partly])
    assert "three/model.pt: " in verdict.note
    assert [check.holds for check in verdict.checks[:6]] == [True] * 4 + [False] * 2  # two a model
    assert table5.EXPERIMENTS[0].figure([partly]).panels
    with pytest.raises(CheckpointError, match="cannot be read"):
        table5.run(replace(settings, options=((table5.OPTION, named[2]),)))


def test_checkpoints_are_labelled_by_the_end_of_their_path_where_that_is_enough() -> None:
    assert table5.labels_of(["x/a/m", "y/a/m"]) == ["x/a/m", "y/a/m"]
    assert table5.labels_of(["x/a/m", "y/b/m"]) == ["a/m", "b/m"]


def recorded(calls: list[dict[str, object]], found: dict[str, object]) -> Callable[..., dict[str, object]]:
    def run(*given: object, **named: object) -> dict[str, object]:
        calls.append(named)
        return dict(found)

    return run


def test_the_papers_sizes_are_those_it_states(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = images(3, 660)  # 640 to train: five batches of 128, two of 256
    hundred = Images(colour.name, colour.train, colour.train_labels, colour.test, colour.test_labels, 100)
    paper = Settings(scale="paper", data="cifar100")
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(independence_residual, "load", lambda settings: hundred)
    monkeypatch.setattr(independence_residual, "train_residual", recorded(calls, {}))
    independence_residual.table4(paper)
    independence_residual.appendix3(paper)
    sizes = [(one["widths"], one["blocks"], one["batch"], one["steps"]) for one in calls]
    assert sizes == [((64, 128, 256, 512), 2, 128, 20 * 5)] * 4 + [((64, 128, 256, 512), 2, 256, 50 * 2)] * 4
    calls.clear()
    monkeypatch.setattr(independence_convolutions, "load", lambda settings: hundred)
    monkeypatch.setattr(independence_convolutions, "train_convnet", recorded(calls, {}))
    found = independence_convolutions.table2(paper)
    assert {one["normalize"] for one in calls} == {False, True}
    assert {(one["widths"], one["hidden"], one["batch"], one["steps"]) for one in calls} == {
        ((64, 128, 256), 512, 128, 100)
    }
    assert [one["rate"] for one in found["script"]["sgd"]] == list(independence_convolutions.CNN_RATES["sgd"])
    calls.clear()
    found = independence_convolutions.appendix2(Settings(data="cifar100"))  # small, whatever the data
    assert list(found) == ["text"]
    assert {(one["widths"], one["normalize"], one["steps"]) for one in calls} == {((16, 32, 64), False, 800)}
    calls.clear()
    monkeypatch.setattr(independence_optimizers, "load", lambda settings: hundred)
    monkeypatch.setattr(independence_optimizers, "train_perceptron", recorded(calls, {}))
    independence_optimizers.table1(paper)
    assert {(one["width"], one["batch"], one["steps"]) for one in calls} == {(500, 512, 2340)}


def test_the_script_of_table_2_has_batch_normalisation_and_the_text_has_none() -> None:
    plain, normalized = (
        independence_convolutions.train_convnet(
            images(3), "adam", 1e-3, widths=(8, 8, 8), hidden=8, steps=2, batch=20, seed=0, normalize=normalize
        )
        for normalize in (False, True)
    )
    assert plain["initial"] == normalized["initial"]
    assert plain["final"] != normalized["final"]
