"""Exponential moving average of the student's weights."""

from typing import Any, cast

import lightning as L
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transkd.errors import UserError

__all__ = ["StudentAverage"]

CURRENT, COUNT = "current_student", "student_average_count"


class StudentAverage(L.Callback):
    """Validate, save and deploy an exponential moving average of the student instead of its last weights.

    ``average ← d·average + (1 − d)·weights`` after each optimizer step, with ``d = min(decay, (1 + n) / (10 + n))`` at
    step n, so that early weights are forgotten quickly (the rule of TensorFlow's ExponentialMovingAverage). Buffers,
    such as BatchNorm's statistics, are averaged as well. The teacher and the terms' own parameters are not, unlike with
    Lightning's ``EMAWeightAveraging``. A checkpoint stores the average as the student, and in addition the current
    weights, which training resumes from.

    Args:
        decay: d in [0, 1); 0.99 averages over about 100 steps.

    Raises:
        UserError: the decay is out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"student.ema={decay}: expected a number from 0 to below 1")
        self.decay = decay
        self.average: AveragedModel | None = None
        self._count, self._step = 0, 0
        self._current: dict[str, torch.Tensor] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Initialise the average with the student's weights, or with the average of the checkpoint."""
        if self.average is None:
            self.average = AveragedModel(_student(pl_module), use_buffers=True)
            self.average.n_averaged.fill_(1)  # 0 would make the first update a copy
            if self._current is not None:  # resumed: until now the student holds the average
                _student(pl_module).load_state_dict(self._current)
                self._current = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from the step at which the run begins, which is not 0 if it is resumed."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after each optimizer step; with gradient accumulation not every batch has one."""
        if self.average is None or trainer.global_step == self._step:
            return
        self._step, self._count = trainer.global_step, self._count + 1
        decay = min(self.decay, (1 + self._count) / (10 + self._count))
        self.average.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.average.update_parameters(_student(pl_module))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap in the average for validation."""
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap the current weights back in."""
        self._swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the average into the student."""
        if self.average is not None:
            _student(pl_module).load_state_dict(self.average.module.state_dict())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as the student, and the current weights under a key of their own."""
        if self.average is None:
            return
        prefix, weights = "student.", checkpoint["state_dict"]
        checkpoint[CURRENT] = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        checkpoint[COUNT] = self._count
        for name, tensor in self.average.module.state_dict().items():
            weights[prefix + name] = tensor

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the checkpoint's current weights; ``on_fit_start`` loads them after the average was copied."""
        self._current = checkpoint.get(CURRENT)
        self._count = checkpoint.get(COUNT, 0)

    def _swap(self, pl_module: L.LightningModule) -> None:
        if self.average is None:
            return
        pairs = zip(self.average.module.state_dict().values(), _student(pl_module).state_dict().values(), strict=True)
        for average, current in pairs:
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)


def _student(pl_module: L.LightningModule) -> nn.Module:
    return cast(nn.Module, pl_module.student)
