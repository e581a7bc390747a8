"""The transformers callback in real runs of a tiny GPT-2: log_history as computed directly, resume, integrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import orthofast
from orthofast.errors import InputError
from orthofast.training.layers import find_layers
from orthofast.training.transformers import STATE_FILE, OrthogonalityCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # of the host; ours are asked for by name


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # matrices this small only wait for a second one; restored by the fixture of all tests


def tiny() -> GPT2LMHeadModel:
    torch.manual_seed(4)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(40, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Direct(TrainerCallback):
    """PII of every layer after every step, computed directly; and what integrations are told."""

    def __init__(self) -> None:
        self.pii: dict[int, dict[str, float]] = {}
        self.gradients: dict[int, float] = {}
        self.told: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        weight = given["model"].transformer.h[0].mlp.c_fc.weight
        self.gradients[state.global_step + 1] = (
            torch.linalg.matrix_norm(weight.grad.double(), 2) / torch.linalg.matrix_norm(weight.detach().double(), 2)
        ).item()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.pii[state.global_step] = {
            layer.name.removesuffix(".weight"): orthofast.pii(layer.vectors().detach()[0]).item()
            for layer in find_layers(given["model"]).found
        }

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.told.append(dict(given["logs"]))


def trainer_of(folder: Path, **given: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, seed=0, **{"save_strategy": "no", **given},
    )  # fmt: skip
    return Trainer(model=tiny(), args=arguments, train_dataset=Tokens())


def logged(trainer: Trainer) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in trainer.state.log_history if "orthofast/pii/mean" in row}


def test_log_history_holds_what_a_direct_computation_gives(tmp_path: Path) -> None:
    trainer, direct = trainer_of(tmp_path, max_steps=6), Direct()
    trainer.add_callback(direct)
    trainer.add_callback(
        OrthogonalityCallback(
            trainer, every_n_steps=2, metrics=("pii", "weight_domination"), worst_k=None, overhead=None
        )
    )
    trainer.train()
    rows = logged(trainer)
    assert sorted(rows) == [2, 4, 6]
    for step, row in rows.items():
        assert row["orthofast/step"] == step
        assert len(direct.pii[step]) == 10  # two embeddings, four matrices a block; the head is tied
        for name, expected in direct.pii[step].items():
            assert row[f"orthofast/pii/{name}"] == pytest.approx(expected, rel=2e-6)
        gradient = row["orthofast/weight_domination/transformer.h.0.mlp.c_fc"]
        assert gradient == pytest.approx(direct.gradients[step], rel=1e-3)
    told = [row for row in direct.told if "orthofast/pii/mean" in row]
    assert [row["orthofast/pii/mean"] for row in told] == [row["orthofast/pii/mean"] for row in rows.values()]


def test_steps_are_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=4, gradient_accumulation_steps=2)
    trainer.add_callback(OrthogonalityCallback(trainer, every_n_steps=2, metrics=("pii", "orthogonality_gap")))
    trainer.train()
    rows = logged(trainer)
    assert sorted(rows) == [2, 4]
    assert all(0 < row["orthofast/orthogonality_gap/mean"] < 1 for row in rows.values())


def test_a_resumed_run_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    def run(folder: Path, resume: bool = False, **given: Any) -> dict[int, dict[str, float]]:
        trainer = trainer_of(folder, max_steps=8, save_strategy="steps", save_steps=4, **given)
        trainer.add_callback(
            OrthogonalityCallback(trainer, every_n_steps=3, metrics=("pii", "weight_domination"), overhead=None)
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
        return logged(trainer)

    whole = run(tmp_path)
    assert (tmp_path / "checkpoint-4" / STATE_FILE).is_file()
    again = run(tmp_path, resume=True)
    assert sorted(whole) == [3, 6]
    assert again[6].keys() == whole[6].keys()
    for key, value in whole[6].items():
        if "overhead" not in key:
            assert again[6][key] == pytest.approx(value, rel=1e-9), key


def test_the_same_weights_as_without(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, max_steps=5)
    plain.train()
    watched = trainer_of(tmp_path, max_steps=5)
    watched.add_callback(OrthogonalityCallback(watched, every_n_steps=2, metrics=("pii", "orthogonality_gap")))
    watched.train()
    for left, right in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_it_asks_for_the_trainer() -> None:
    with pytest.raises(
        InputError, match=r"trainer needs a transformers\.Trainer, got GPT2LMHeadModel; make the trainer"
    ):
        OrthogonalityCallback(tiny())
