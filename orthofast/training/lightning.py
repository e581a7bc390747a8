"""Lightning: a callback that monitors a LightningModule and logs to the trainer's loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from orthofast.errors import MissingPackageError

try:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingPackageError(f"{__name__} needs the package lightning; pip install lightning") from error

from orthofast.training.layers import Select
from orthofast.training.measures import DEFAULT
from orthofast.training.monitor import Monitor
from orthofast.training.rows import Row
from orthofast.training.sinks import Log


class OrthogonalityMonitor(Callback):
    """Logs how orthogonal a model's weights are, as :class:`orthofast.training.Monitor` measures it.

    ``Trainer(callbacks=[OrthogonalityMonitor(every_n_train_steps=100)])``

    Steps are ``trainer.global_step``, so gradient accumulation is counted as Lightning counts it. Numbers go to all of
    the trainer's loggers under the step they were measured at, whatever ``log_every_n_steps`` says, and into
    ``trainer.callback_metrics``, where ModelCheckpoint and EarlyStopping find them. Gradients are measured before
    clipping. Checkpoints carry its state.

    Args:
        every_n_train_steps: optimizer steps between measurements.
        metrics: as in :class:`orthofast.training.Monitor`, like the other arguments.
        layers: which layers of the LightningModule.
        log: further sinks, beside the trainer's loggers.
        worst_k: how many of the worst layers of each metric get a key of their own; None for all.
        overhead: share of the training time that may go into measuring.

    Attributes:
        monitor: the monitor while fitting and after; None before.
    """

    def __init__(
        self,
        every_n_train_steps: int = 100,
        *,
        metrics: Sequence[str] = DEFAULT,
        layers: Select = None,
        log: Log = (),
        worst_k: int | None = 5,
        overhead: float | None = 0.01,
    ) -> None:
        super().__init__()
        self.monitor: Monitor | None = None
        self._given: dict[str, Any] = {
            "every_n_steps": every_n_train_steps,
            "metrics": metrics,
            "layers": layers,
            "worst_k": worst_k,
            "overhead": overhead,
        }
        self._log = log
        self._state: dict[str, Any] = {}
        self._step = 0

    @property
    def state_key(self) -> str:
        """Tells several of these in one trainer apart."""
        return self._generate_state_key(
            every_n_train_steps=self._given["every_n_steps"], metrics=list(self._given["metrics"])
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the module is on its device and restored by now.

        Raises:
            MisconfigurationException: if there is nowhere to log to.
            InputError: if an argument cannot be used.
        """
        extra = [] if self._log is None else self._log
        more = list(extra) if isinstance(extra, Sequence) else [extra]
        if not trainer.loggers and not more:
            raise MisconfigurationException(
                "OrthogonalityMonitor needs a logger of the Trainer, or log=; this Trainer has none"
            )
        self.monitor = Monitor(pl_module, log=[_Loggers(trainer), *more], **self._given)
        if self._state:
            self.monitor.load_state_dict(self._state)
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gradients, before clipping and after any loss scale is taken out."""
        if self.monitor is not None:
            self.monitor.observe_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if an optimizer step was made and is due."""
        step = trainer.global_step
        if self.monitor is not None and step != self._step:
            self._step = step
            self.monitor.step(step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over what is left, detach."""
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._state if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint; taken up when training starts."""
        self._state = state_dict


class _Loggers:
    """The trainer's loggers as a sink."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def write(self, row: Row) -> None:
        """As LearningRateMonitor does it: log_dict would drop steps that are not log_every_n_steps-th ones."""
        numbers = row.numbers
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, step=row.step)
        self.trainer.callback_metrics.update({key: torch.tensor(value) for key, value in numbers.items()})

    def close(self) -> None:
        """Loggers are closed by the trainer."""
