"""Optimizer and schedule of a run."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Optimization", "follow_schedule", "groups_of"]


@dataclass(frozen=True)
class Optimization:
    """Factories of optimizer and schedule.

    Attributes:
        optimizer: ``optimizer(params)``.
        scheduler: ``scheduler(optimizer, total=…)``; None keeps the rate constant.
        interval: tick of the scheduler, "step" or "epoch".
        horizon: ticks until the rate reaches 0; None means the length of the run.
    """

    optimizer: Callable[..., Optimizer]
    scheduler: Callable[..., Any] | None = None
    interval: str = "step"
    horizon: int | None = None

    def build(self, parameters: Iterable[nn.Parameter], fused: bool = True) -> Optimizer:
        """Build the optimizer.

        Args:
            parameters: of student and terms.
            fused: whether PyTorch's fused kernel may be used, if there is one and no other is configured.
        """
        parameters = list(parameters)
        constructor = getattr(self.optimizer, "func", self.optimizer)
        given = getattr(self.optimizer, "keywords", {}).keys()
        if not constructor.__module__.startswith("torch.optim") or given & {"fused", "foreach", "capturable"}:
            return self.optimizer(parameters)
        fused &= "fused" in inspect.signature(constructor).parameters
        fused &= all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return self.optimizer(parameters, **({"fused": True} if fused else {}))

    def configure(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> Any:
        """Build the value that ``LightningModule.configure_optimizers`` returns."""
        clips_scaled = trainer.precision == "16-mixed" and trainer.gradient_clip_val  # Lightning refuses it fused
        optimizer = self.build(parameters, fused=not clips_scaled)
        if self.scheduler is None:
            return optimizer
        run = trainer.max_epochs if self.interval == "epoch" else trainer.estimated_stepping_batches
        schedule = self.scheduler(optimizer, total=int(self.horizon or run or 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


def groups_of(made: Any) -> list[dict[str, Any]]:
    """Settings of each parameter group of what `Optimization.configure` returns."""
    optimizer: Optimizer = made["optimizer"] if isinstance(made, dict) else made
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def follow_schedule(optimizer: Optimizer, schedule: Any, configured: list[dict[str, Any]]) -> None:
    """Set what a checkpoint has overwritten back to the configuration, at the schedule's tick in the checkpoint.

    Without it the first step of a longer run has the last rate of the shorter one, which is 0. Only for no schedule and
    for schedules that are functions of the tick, such as `warmup_poly`; others store their own rates.
    """
    if schedule is not None and not isinstance(schedule, LambdaLR):
        return
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
    if schedule is not None:
        schedule.base_lrs = [settings["initial_lr"] for settings in configured]
        for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(schedule.last_epoch)
