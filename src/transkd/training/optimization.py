"""Optimizer and schedule of a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

__all__ = ["Optimization"]


@dataclass(frozen=True)
class Optimization:
    """Factories of optimizer and schedule.

    Attributes:
        optimizer: ``optimizer(params)``.
        scheduler: ``scheduler(optimizer, total=…)``; None keeps the rate constant.
        interval: tick of the scheduler, "step" or "epoch".
        horizon: ticks until the rate reaches 0; None means the length of the run.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    scheduler: Callable[..., Any] | None = None
    interval: str = "step"
    horizon: int | None = None

    def configure(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> Any:
        """Build the value that ``LightningModule.configure_optimizers`` returns."""
        optimizer = self.optimizer(parameters)
        if self.scheduler is None:
            return optimizer
        run = trainer.max_epochs if self.interval == "epoch" else trainer.estimated_stepping_batches
        schedule = self.scheduler(optimizer, total=int(self.horizon or run or 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}
