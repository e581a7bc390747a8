"""Transformers: a callback that monitors the model of a Trainer and logs through it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from orthofast.errors import InputError, MissingPackageError

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise MissingPackageError(f"{__name__} needs transformers and accelerate; pip install them") from error

from orthofast.training.layers import Select
from orthofast.training.measures import DEFAULT
from orthofast.training.monitor import Monitor
from orthofast.training.rows import PREFIX, Row
from orthofast.training.sinks import Log, report

STATE_FILE = "orthofast.pt"


class OrthogonalityCallback(TrainerCallback):
    """Logs how orthogonal a model's weights are, as :class:`orthofast.training.Monitor` measures it.

    ``trainer.add_callback(OrthogonalityCallback(trainer, every_n_steps=100))``

    It holds the trainer because only ``trainer.log`` reaches both ``trainer.state.log_history`` and every integration
    (TensorBoard, Weights & Biases, ...). Steps are ``state.global_step``. Gradients are measured after clipping, just
    before the optimizer's step. A checkpoint folder gets a file ``orthofast.pt``, which a resumed run takes up.

    Args:
        trainer: that this callback is added to.
        every_n_steps: as in :class:`orthofast.training.Monitor`, like the other arguments.
        metrics: names of metrics.
        layers: which layers.
        log: further sinks, beside the trainer's log.
        worst_k: how many of the worst layers of each metric get a key of their own; None for all.
        overhead: share of the training time that may go into measuring.

    Attributes:
        monitor: the monitor while training and after; None before.

    Raises:
        InputError: if the trainer is none.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every_n_steps: int = 100,
        metrics: Sequence[str] = DEFAULT,
        layers: Select = None,
        log: Log = (),
        worst_k: int | None = 5,
        overhead: float | None = 0.01,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise InputError(
                f"trainer needs a transformers.Trainer, got {type(trainer).__name__}; make the trainer first and use "
                "trainer.add_callback(OrthogonalityCallback(trainer))"
            )
        self.monitor: Monitor | None = None
        self._trainer = trainer
        self._log = log
        self._given: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "metrics": metrics,
            "layers": layers,
            "worst_k": worst_k,
            "overhead": overhead,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Attach; of a resumed run, go on where the checkpoint was taken."""
        extra = [] if self._log is None else self._log
        more = list(extra) if isinstance(extra, Sequence) else [extra]
        self.monitor = Monitor(given["model"], log=[_TrainerLog(self._trainer), *more], **self._given)
        saved = _state_file(args, state)
        if state.global_step and saved.is_file():
            try:
                self.monitor.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
            except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
                report(f"the monitor starts anew, as {saved.name} of the checkpoint cannot be read: {error}")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Gradients: the trainer clears them before ``on_step_end``."""
        if self.monitor is not None:
            self.monitor.observe_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure if due."""
        if self.monitor is not None:
            self.monitor.step(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Leave the state in the checkpoint's folder."""
        saved = _state_file(args, state)
        if self.monitor is not None and state.is_world_process_zero and saved.parent.is_dir():
            torch.save(self.monitor.state_dict(), saved)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Hand over what is left, detach."""
        if self.monitor is not None:
            self.monitor.close()


class _TrainerLog:
    """``trainer.log`` as a sink."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def write(self, row: Row) -> None:
        """The trainer adds its own step, which may be one later than the row's where a device works asynchronously."""
        self.trainer.log({**row.numbers, f"{PREFIX}/step": row.step})

    def close(self) -> None:
        """Nothing to close."""


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STATE_FILE
