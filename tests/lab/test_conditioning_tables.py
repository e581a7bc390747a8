"""Tables 1 and 2 of Huang et al. 2020: recipe, sizes of networks, verdicts that hold and fail, missing numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from orthofast.lab import conditioning_tables as tables
from orthofast.lab.conditioning_residual import augmented
from orthofast.lab.conditioning_tables import EXPERIMENTS, LAST_BN, NETS, TABLE1, TABLE1B, TABLE2
from orthofast.lab.data import Images
from orthofast.lab.drawing import pictures
from orthofast.lab.experiment import Settings
from orthofast.lab.runs import plain, run_all
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED

FOUND = {one.id: one for one in EXPERIMENTS}
PRINTED = {"S2-T1": TABLE1, "S2-T1b": TABLE1B, "S2-T2": TABLE2}
PAPER = Settings(scale="paper", data="cifar10")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the lab runs its experiments."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_images(count: int, channels: int = 1, size: int = 8, tested: int = 20) -> Images:
    generator = torch.Generator().manual_seed(5)
    train, test = (torch.rand(rows, channels, size, size, generator=generator) for rows in (count, tested))
    return Images("noise", train, torch.arange(count) % 10, test, torch.arange(tested) % 10, 10)


# the recipe


def test_the_rate_falls_at_epochs_80_and_120_of_160_and_twice_as_late_in_twice_as_many() -> None:
    a_epoch = 50_000 // 128
    for epochs in (TABLE1.epochs["paper"], TABLE1B.epochs["paper"]):
        rates = [tables.rate_at(epoch * a_epoch, epochs * a_epoch) for epoch in range(epochs)]
        half = epochs // 2
        assert rates == pytest.approx([0.1] * half + [0.01] * (half // 2) + [0.001] * (half // 2))
        assert tables.rate_at(half * a_epoch - 1, epochs * a_epoch) == 0.1
    assert (TABLE1.epochs["paper"], TABLE1B.epochs["paper"], TABLE2.epochs["paper"]) == (160, 320, 160)


@pytest.mark.parametrize(("table", "decay"), [(TABLE1, 1e-4), (TABLE1B, 2e-4), (TABLE2, 1e-4)])
def test_training_follows_the_recipe(table: tables.Table, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sizes, batches = [], [], tables.batches

    def recorded(*args: object) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for inputs, labels in batches(*args):
            sizes.append(len(inputs))
            yield inputs, labels

    monkeypatch.setattr(tables, "batches", recorded)
    # 300 images are two batches of 128; 44 are left out
    data, short = random_images(300), replace(table, epochs={"small": 4})
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(copy.copy(optimizer.param_groups)))
    lengths = []
    rates = register_optimizer_step_pre_hook(lambda optimizer, *_: lengths.append(optimizer.param_groups[0]["lr"]))
    try:
        tables.trained(Settings(), data, short, LAST_BN, 1)
    finally:
        hook.remove()
        rates.remove()
    assert sizes == [128] * 8
    assert lengths == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    expected = tables.network(data, 1, LAST_BN, 0, "small")
    for (group,) in seen:
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.9, 0, True)
        assert group["weight_decay"] == decay
        assert [one.shape for one in group["params"]] == [one.shape for one in expected.parameters()]


@pytest.mark.parametrize(("scale", "steps"), [("small", 12 * 11), ("paper", 160 * 23)])
def test_small_epochs_have_the_size_of_digits_and_the_papers_all_images(
    scale: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def first(data: Images, size: int, count: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        asked.append((size, count))
        yield data.train[:size], data.train_labels[:size]

    monkeypatch.setattr(tables, "batches", first)
    tables.trained(Settings(scale=scale), random_images(3000), TABLE1, "ResNet", 1)
    assert asked == [(128, steps)]


def test_colours_are_normalised_by_the_papers_constants_and_grey_images_by_their_own(monkeypatch) -> None:
    level = torch.tensor([125.3, 123.0 + 62.1, 113.9 - 2 * 66.7])[:, None, None] / 255
    grey = random_images(30)
    data = Images("cifar10", level.expand(4, 3, 32, 32), None, level.expand(2, 3, 32, 32), None, 10)
    monkeypatch.setattr(tables, "load", lambda settings: data)
    found = tables.images(PAPER, hundred=False)
    for part in (found.train, found.test):
        assert torch.allclose(part.mean((0, 2, 3)), torch.tensor([0.0, 1.0, -2.0]), atol=1e-5)
    monkeypatch.setattr(tables, "load", lambda settings: grey)
    assert tables.images(Settings(), hundred=False).train.mean().item() == pytest.approx(0, abs=1e-5)


def test_a_hundred_classes_are_pairs_of_digits_or_cifars_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "load", lambda settings: random_images(30))
    monkeypatch.setattr(tables, "PAIRS", (50, 20))
    found = tables.images(Settings(), hundred=True)
    assert (found.classes, found.train.shape, found.test.shape) == (100, (50, 2, 8, 8), (20, 2, 8, 8))
    own = replace(random_images(30, 3, 32), classes=100)
    monkeypatch.setattr(tables, "load", lambda settings: own)
    assert torch.equal(tables.images(PAPER, hundred=True).train_labels, own.train_labels)


def test_half_of_a_batch_is_flipped_each_image_cropped_by_itself() -> None:
    ramp = torch.arange(32.0).expand(9, 3, 32, 32) + 100 * torch.arange(32.0)[:, None]
    found = augmented(ramp, torch.Generator().manual_seed(1))
    # away from the reflected edges a row rises, or falls if it is flipped
    steps = found[:, 0, 16].diff(dim=1)[:, 8:24].mean(1)
    assert (steps < 0).sum() == 4
    assert (steps.abs() == 1).all()
    assert len(found[:, 0, 16, 16].div(100, rounding_mode="floor").unique()) > 1
    again = augmented(ramp, torch.Generator().manual_seed(1))
    assert torch.equal(found, again)


@pytest.mark.parametrize(("channels", "calls"), [(3, 1), (1, 0)])
def test_only_colours_are_cropped_and_flipped(channels: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(tables, "augmented", lambda inputs, noise: made.append(1) or inputs)
    tables.trained(Settings(), random_images(130, channels), replace(TABLE1, epochs={"small": 1}), "ResNet", 1)
    assert len(made) == calls


# networks


@pytest.mark.parametrize(
    ("net", "parameters"),
    [
        # convolutions 432 + 41472 + 161280 + 645120, linear layer 650, BN 2 (16 + 18 (16 + 32 + 64))
        ("ResNet", 848_304 + 650 + 4064),
        # BN of blocks 2 (9 (16 + 16) + 16 + 32 + 8 (32 + 32) + 32 + 64 + 8 (64 + 64)), and 2 x 64 before pooling
        ("PreResNet", 848_304 + 650 + 3936 + 128),
        ("PreResNet_v1", 848_304 + 650 + 3936),
        (LAST_BN, 848_304 + 650 + 4064 + 128),
    ],
)
def test_networks_of_depth_56_have_as_many_parameters_as_counted_by_hand(net: str, parameters: int) -> None:
    empty = torch.empty(1, 3, 32, 32, device="meta")
    model = tables.network(Images("cifar10", empty, empty, empty, empty, 10), 9, net, 0, "paper")
    assert sum(one.numel() for one in model.parameters()) == parameters


@pytest.mark.parametrize(("net", "norms"), [("ResNet", 7), ("PreResNet", 7), ("PreResNet_v1", 6), (LAST_BN, 8)])
def test_perceptrons_differ_as_the_papers_networks_do(net: str, norms: int) -> None:
    data, width = random_images(4), 64
    model = tables.network(data, 3, net, 0, "small")
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 2 + 2 * 3
    assert sum(isinstance(part, nn.BatchNorm1d) for part in model.modules()) == norms
    expected = 64 * width + 6 * width**2 + (width + 1) * 10 + norms * 2 * width
    assert sum(one.numel() for one in model.parameters()) == expected
    shared = [part.shared for part in model.modules() if isinstance(part, tables.PreActivationBlock)]
    assert shared == ([True, False, False] if net.startswith("Pre") else [])
    entering = []
    linear[-1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(data.train)
    assert bool((entering[0] >= 0).all()) == (net != LAST_BN)


def test_a_pre_activation_block_is_the_one_written_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    for shared in (True, False):
        block = tables.PreActivationBlock(6, shared)
        one, _, two = (part for part in block.branch if not isinstance(part, nn.BatchNorm1d))
        (between,) = (part for part in block.branch if isinstance(part, nn.BatchNorm1d))
        active = torch.relu(block.activation[0](x))
        expected = torch.relu(between(active @ one.weight.T)) @ two.weight.T + (active if shared else x)
        assert torch.allclose(block(x), expected, atol=1e-6)


def test_a_seed_says_everything() -> None:
    data, table = random_images(130), replace(TABLE1, epochs={"small": 3})
    for net in ("ResNet", "PreResNet"):
        first, again, other = (tables.trained(Settings(seed=seed), data, table, net, 2) for seed in (3, 3, 4))
        assert first == again
        assert first["loss"] != other["loss"]


def test_a_network_that_diverges_finds_nothing() -> None:
    data = random_images(4)
    images = replace(data, test=torch.eye(8)[None, None].repeat(20, 1, 1, 1) * torch.arange(20)[:, None, None, None])

    class Counted(nn.Module):
        """Right for all, but of the last five one output is not finite."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            number = inputs[:, 0, 0, 0].long()
            outputs = nn.functional.one_hot(number % 10, 10).float()
            outputs[number >= 15, 0] = torch.nan
            return outputs

    assert tables.error_of(Counted(), images) == pytest.approx(25.0)


def test_training_ends_at_a_loss_that_is_not_finite() -> None:
    data = replace(random_images(130), train=torch.full((130, 1, 8, 8), torch.inf))
    found = tables.trained(Settings(), data, replace(TABLE1, epochs={"small": 3}), "ResNet", 1)
    assert plain(found) == {"error": 100.0, "loss": None}


# verdicts


def as_printed(key: str) -> dict:
    """What would be measured at the paper's scale if its means came out."""
    table = PRINTED[key]
    raw: dict = {"blocks": list(table.blocks["paper"]), "convolutional": True, "guessing": 99 if table.hundred else 90}
    for net in table.nets:
        means = table.printed.get(net, {})
        raw[net] = [{"error": means.get(blocks, (90.0, 0))[0], "loss": 0.1} for blocks in raw["blocks"]]
    return plain(raw)


@pytest.mark.parametrize("key", PRINTED)
def test_the_printed_means_reproduce_and_are_drawn(key: str) -> None:
    raw = as_printed(key)
    verdict = FOUND[key].verdict([raw, raw])
    assert verdict.status == REPRODUCED, [check.what for check in verdict.checks if check.holds is False]
    assert "Missing" not in verdict.note
    figure = FOUND[key].figure([raw, raw])
    (panel,) = figure.panels
    hollow = {one.name: one for one in panel.series if one.published}
    for net, cells in PRINTED[key].printed.items():
        assert list(hollow[net].x) == list(cells)
        assert [list(run) for run in hollow[net].runs] == [[mean for mean, _ in cells.values()]]
    assert {one.name for one in panel.series if not one.published} == set(PRINTED[key].nets)
    small = raw | {"convolutional": False}
    parted = FOUND[key].figure([small])
    assert [all(one.published for one in panel.series) for panel in parted.panels] == [False, True]
    for drawn in (figure, parted):
        files = pictures(drawn, FOUND[key].title, 2)
        assert files["figure.png"].startswith(b"\x89PNG")
        assert all(net in str(files["figure.svg"]) for net in PRINTED[key].nets)


def test_published_numbers_stand_beside_ours() -> None:
    said = {check.what: check.published for check in FOUND["S2-T1"].verdict([as_printed("S2-T1")]).checks}
    assert said["depth 1202, ResNet: test error in %"] == "9.42 ± 3.10 at depth 1202"
    gains = [said[f"depth {depth}: test error in %, ResNet minus LastBN"] for depth in (56, 110, 230, 1202)]
    # the reductions that the paper's text names
    assert [one.split()[0] for one in gains] == ["1.02", "0.79", "1.41", "3.74"]
    assert said["depth 230: test error in %, LastBN minus the best other network"] == "-0.18 at depth 230"
    said = {check.what: check.published for check in FOUND["S2-T2"].verdict([as_printed("S2-T2")]).checks}
    gains = [said[f"depth {depth}: test error in %, ResNet minus LastBN"] for depth in (56, 110, 230, 1202)]
    assert [one.split()[0] for one in gains] == ["0.78", "1.25", "3.45", "4.98"]


def against() -> Iterator[tuple[str, str, int, float | None]]:
    for key in ("S2-T1", "S2-T2"):
        best = PRINTED[key].printed[LAST_BN]
        for place, blocks in enumerate(best):
            # another network as good, or without a number
            for net in set(NETS) - {LAST_BN}:
                yield key, net, place, best[blocks][0]
            yield key, "PreResNet_v1", place, None
            yield key, LAST_BN, place, None
    yield "S2-T1", LAST_BN, 2, 6.11  # still the best, above 6.10 at depth 110
    yield "S2-T2", LAST_BN, 3, 25.80
    yield "S2-T1b", LAST_BN, 1, 46.0
    yield "S2-T1b", LAST_BN, 1, None
    yield "S2-T1b", "ResNet", 1, 44.0
    yield "S2-T1b", "ResNet", 1, None


@pytest.mark.parametrize(("key", "net", "place", "error"), sorted(against(), key=str))
def test_each_condition_can_fail(key: str, net: str, place: int, error: float | None) -> None:
    raw = as_printed(key)
    changed = copy.deepcopy(raw)
    changed[net][place]["error"] = error
    verdict = FOUND[key].verdict([changed])
    assert verdict.status == NOT_REPRODUCED
    # one condition, or those of a number that is missing
    failing = [check.what for check in verdict.checks if check.holds is False]
    assert len(failing) == (2 if error is None and net == LAST_BN and key != "S2-T1b" else 1), failing
    assert FOUND[key].verdict([raw, changed]).status == NOT_REPRODUCED, "one seed against it is enough"


# what does not fit into memory


def test_a_depth_that_runs_out_of_memory_is_a_missing_number(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(TABLE1, blocks={"small": (1, 2, 3)}, epochs={"small": 1})
    monkeypatch.setattr(tables, "TABLE1", small)
    monkeypatch.setattr(tables, "load", lambda settings: random_images(130))
    made = tables.network

    def large(data: Images, blocks: int, net: str, seed: int, scale: str) -> nn.Module:
        if blocks == 3 and net == "ResNet":
            torch.empty(2**60)
        if blocks == 3 and net == "PreResNet":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26.00 GiB.")
        return made(data, blocks, net, seed, scale)

    monkeypatch.setattr(tables, "network", large)
    raw = plain(tables.table1(Settings()))
    missing = {"error": None, "loss": None, "missing": "out of memory on cpu"}
    assert [raw[net][2] for net in ("ResNet", "PreResNet")] == [missing] * 2
    others = [cell for net in small.nets for cell in raw[net] if "missing" not in cell]
    assert len(others) == 10
    assert all(0 <= cell["error"] <= 100 for cell in others)
    verdict = FOUND["S2-T1"].verdict([raw])
    assert verdict.status == NOT_REPRODUCED
    assert "PreResNet at 3 blocks: out of memory on cpu; ResNet at 3 blocks: out of memory on cpu." in verdict.note
    drawn = pictures(FOUND["S2-T1"].figure([raw]), "Table 1", 1)
    assert all(drawn.values())


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> nn.Module:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(tables, "network", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        tables.trained_or_missing(Settings(), random_images(130), TABLE1, "ResNet", 1)


# end to end


def test_the_papers_networks_run_from_end_to_end(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH", 12)
    own = {"cifar10": random_images(30, 3, 32, 6), "cifar100": replace(random_images(30, 3, 32, 6), classes=100)}
    monkeypatch.setattr(tables, "load", lambda settings: own[settings.data])
    for name, table in (("TABLE1", TABLE1), ("TABLE1B", TABLE1B), ("TABLE2", TABLE2)):
        monkeypatch.setattr(tables, name, replace(table, blocks=table.blocks | {"paper": (1,)}, epochs={"paper": 1}))
    for key, data in (("S2-T1", "cifar10"), ("S2-T1b", "cifar10"), ("S2-T2", "cifar100")):
        raw = plain(FOUND[key].run(Settings(scale="paper", data=data)))
        assert raw["convolutional"], key
        assert raw["guessing"] == pytest.approx(99 if data == "cifar100" else 90)
        assert all(cell["error"] is not None for net in PRINTED[key].nets for cell in raw[net])
    (outcome,) = run_all([FOUND["S2-T1b"]], Settings(scale="paper", data="cifar10"), tmp_path, seeds=1)
    assert outcome.verdict.status in (REPRODUCED, NOT_REPRODUCED)
    assert any(check.what.startswith("depth 8, ") for check in outcome.verdict.checks)
    assert (tmp_path / "S2-T1b" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_each_table_asks_for_data_of_its_classes(tmp_path) -> None:
    (outcome,) = run_all([FOUND["S2-T2"]], Settings(data="cifar10"), tmp_path, seeds=1)
    assert outcome.verdict.note == "runs on digits, mnist, cifar100, not on cifar10"
