"""Optimizer and schedule of a run."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from transkd.errors import UserError
from transkd.training.length import length_of

__all__ = ["Optimization", "follow_schedule", "groups_of"]

LENGTHS = ("total", "total_steps", "T_max", "total_iters")
"""Names that our schedule, OneCycleLR, CosineAnnealingLR and PolynomialLR have for the length of the run."""


@dataclass(frozen=True)
class Optimization:
    """Factories of optimizer and schedule.

    Attributes:
        optimizer: ``optimizer(params)``.
        scheduler: ``scheduler(optimizer, total=…)``, or one of PyTorch's; None keeps the rate constant.
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
        # Lightning refuses to clip gradients under autocast for a fused optimizer, in bf16 too
        clips = trainer.precision in ("16-mixed", "bf16-mixed") and trainer.gradient_clip_val
        total = self.horizon
        if self.scheduler is not None and total is None and (length := length_of(trainer)) is not None:
            total = math.ceil(length.epochs) if self.interval == "epoch" else length.steps
        optimizer, schedule = self.build_both(parameters, total, fused=not clips)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}

    def build_both(
        self, parameters: Iterable[nn.Parameter], total: int | None, fused: bool = True
    ) -> tuple[Optimizer, Any]:
        """Build optimizer and schedule for a run of ``total`` ticks; the schedule is None without a scheduler.

        Raises:
            UserError: PyTorch does not accept an argument, or a schedule needs ``total`` and it is None.
        """
        try:
            optimizer = self.build(parameters, fused)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"optim.optimizer: {error}") from error
        if self.scheduler is None:
            return optimizer, None
        try:
            return optimizer, self.scheduler(optimizer, **self._length(total))
        except (TypeError, ValueError, ArithmeticError, AssertionError) as error:
            hint = " (an argument is left out with ~optim.scheduler.NAME)" if "unexpected keyword" in str(error) else ""
            raise UserError(f"optim.scheduler: {error}{hint}") from error

    def _length(self, total: int | None) -> dict[str, int]:
        """The argument by which this scheduler takes its length, unless the configuration gives it."""
        assert self.scheduler is not None
        given = getattr(self.scheduler, "keywords", {})
        try:
            accepted = inspect.signature(self.scheduler).parameters
        except ValueError:  # wrong arguments, about which the call says more
            return {}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        names = [name for name in LENGTHS if name in accepted] or (["total"] if takes_any else [])
        missing = [name for name in names[:1] if name not in given]
        if missing and total is None:
            raise UserError(
                "the schedule of the learning rate needs the length of the run: set trainer.max_epochs, "
                "trainer.max_steps or optim.horizon, or leave the schedule out with optim.scheduler=null"
            )
        return {name: max(total or 0, 1) for name in missing}


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
