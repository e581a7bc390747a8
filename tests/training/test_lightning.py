"""The Lightning callback in real runs: keys in the loggers' files, values as computed directly, state kept."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import orthofast
from orthofast.training import JsonLines
from orthofast.training.lightning import OrthogonalityMonitor

pytestmark = pytest.mark.filterwarnings("ignore")  # of the host; ours are asked for by name


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # matrices this small only wait for a second one; restored by the fixture of all tests


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Direct(Callback):
    """What a direct computation gives after every optimizer step."""

    def __init__(self) -> None:
        self.pii: dict[int, dict[str, float]] = {}
        self.domination: dict[int, dict[str, float]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.domination[trainer.global_step + 1] = {
            name: norm(layer.weight.grad) / norm(layer.weight) for name, layer in linears(pl_module)
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pii[trainer.global_step] = {
            name: orthofast.pii(layer.weight.detach()).item() for name, layer in linears(pl_module)
        }


def norm(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.detach().double(), 2).item()


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def fit(folder: Path, callbacks: list[Callback], steps: int, **given: Any) -> pl.Trainer:
    data = DataLoader(TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(0))), batch_size=8)
    path = given.pop("ckpt_path", None)
    trainer = pl.Trainer(**{
        "default_root_dir": folder, "logger": CSVLogger(folder, name="run"), "callbacks": callbacks,
        "max_steps": steps, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "accelerator": "cpu", **given,
    })  # fmt: skip
    trainer.fit(Net(), data, ckpt_path=path, weights_only=False if path else None)
    return trainer


def table(trainer: pl.Trainer) -> dict[int, dict[str, str]]:
    logger = trainer.loggers[0]
    logger.save()
    with (Path(str(logger.log_dir)) / "metrics.csv").open() as file:
        return {int(line["step"]): line for line in csv.DictReader(file)}


def test_the_loggers_get_what_a_direct_computation_gives(tmp_path: Path) -> None:
    direct = Direct()
    monitor = OrthogonalityMonitor(
        every_n_train_steps=3, metrics=("pii", "weight_domination", "dying_frac"), worst_k=None, overhead=None
    )
    trainer = fit(tmp_path, [monitor, direct], 10)  # two epochs; log_every_n_steps is 50
    rows = table(trainer)
    assert sorted(rows) == [3, 6, 9]
    for step, row in rows.items():
        for name, expected in direct.pii[step].items():
            assert float(row[f"orthofast/pii/{name}"]) == pytest.approx(expected, rel=1e-6)
        for name, expected in direct.domination[step].items():
            assert float(row[f"orthofast/weight_domination/{name}"]) == pytest.approx(expected, rel=1e-3)
        assert 0 <= float(row["orthofast/dying_frac/body.1"]) <= 1
    assert trainer.callback_metrics["orthofast/pii/mean"].item() == pytest.approx(
        sum(direct.pii[9].values()) / 2, rel=1e-6
    )


def test_gradient_accumulation_and_clipping_are_counted_as_lightning_does(tmp_path: Path) -> None:
    direct = Direct()
    monitor = OrthogonalityMonitor(
        every_n_train_steps=2, metrics=("pii", "weight_domination"), worst_k=None, overhead=None
    )
    trainer = fit(tmp_path, [monitor, direct], 4, accumulate_grad_batches=2, gradient_clip_val=1e-6)
    rows = table(trainer)
    assert sorted(rows) == [2, 4]
    for name, expected in direct.domination[4].items():  # before clipping to next to nothing
        assert float(rows[4][f"orthofast/weight_domination/{name}"]) == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_carries_the_monitor_on(tmp_path: Path) -> None:
    given: dict[str, Any] = {"every_n_train_steps": 5, "metrics": ("pii", "weight_domination"), "overhead": None}
    whole = table(fit(tmp_path / "whole", [OrthogonalityMonitor(**given)], 16))
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path / "first", [OrthogonalityMonitor(**given), keep], 8, enable_checkpointing=True)  # one epoch
    (saved,) = (tmp_path / "kept").glob("*.ckpt")
    again = OrthogonalityMonitor(**given)
    rows = table(fit(tmp_path / "second", [again], 16, ckpt_path=saved))
    assert sorted(rows) == [10, 15]
    assert sorted(whole) == [5, 10, 15]
    for step, row in rows.items():
        assert {k: v for k, v in row.items() if "overhead" not in k} == {
            k: v for k, v in whole[step].items() if "overhead" not in k
        }


def test_without_a_logger_it_refuses_or_takes_log(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="needs a logger of the Trainer, or log="):
        fit(tmp_path, [OrthogonalityMonitor()], 2, logger=False)
    own = OrthogonalityMonitor(every_n_train_steps=2, log=JsonLines(tmp_path / "rows.jsonl"))
    fit(tmp_path, [own], 4, logger=False)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_it_leaves_no_hook_and_the_same_weights(tmp_path: Path) -> None:
    plain = fit(tmp_path / "a", [], 5)
    monitor = OrthogonalityMonitor(every_n_train_steps=2, metrics=("pii", "dying_frac", "orthogonality_gap"))
    watched = fit(tmp_path / "b", [monitor], 5)
    for left, right in zip(plain.lightning_module.parameters(), watched.lightning_module.parameters(), strict=True):
        assert torch.equal(left, right)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.lightning_module.modules())
