"""Optimizer and schedule of a run."""

import inspect
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
        parameters = list(parameters)
        optimizer = self.optimizer(parameters, **self._kernel(parameters, trainer))
        if self.scheduler is None:
            return optimizer
        run = trainer.max_epochs if self.interval == "epoch" else trainer.estimated_stepping_batches
        schedule = self.scheduler(optimizer, total=int(self.horizon or run or 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}

    def _kernel(self, parameters: list[nn.Parameter], trainer: Trainer) -> dict[str, bool]:
        """``fused=True`` for an optimizer of PyTorch that has a fused kernel and whose kernel is not configured."""
        constructor = getattr(self.optimizer, "func", self.optimizer)
        given = getattr(self.optimizer, "keywords", {}).keys()
        if not constructor.__module__.startswith("torch.optim") or given & {"fused", "foreach", "capturable"}:
            return {}
        scaled = trainer.precision == "16-mixed" and trainer.gradient_clip_val  # Lightning allows it unfused only
        usable = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        has_kernel = "fused" in inspect.signature(constructor).parameters
        return {"fused": True} if has_kernel and usable and not scaled else {}
