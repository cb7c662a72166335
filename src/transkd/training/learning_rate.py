"""Learning-rate schedules that torch does not have in one class."""

import logging

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from transkd.errors import UserError

__all__ = ["warmup_poly"]

log = logging.getLogger(__name__)


def warmup_poly(optimizer: Optimizer, total: int, warmup: int = 0, power: float = 1.0) -> LambdaLR:
    """Linear warm-up, then polynomial decay to 0, the usual schedule in segmentation.

    Factor on the base rate at tick t: (t + 1) / (warmup + 1) for t < warmup, then
    (1 − (t − warmup) / (total − warmup))^power, and 0 from ``total`` on. With warmup 0 and power 1 it is the linear
    decay of the TransKD recipe.

    Args:
        optimizer: its learning rates are scheduled.
        total: tick (optimizer step or epoch) at which the rate reaches 0.
        warmup: ticks of warm-up.
        power: 1 is linear.

    Raises:
        UserError: warmup or power is negative.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = warmup_poly(optimizer, total=4, warmup=0)
        >>> [schedule.lr_lambdas[0](tick) for tick in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if warmup < 0 or not 0 <= power < float("inf"):
        raise UserError(f"warmup_poly: warmup={warmup}, power={power}: expected numbers of at least 0")
    if warmup >= total:
        log.warning(
            "optim.scheduler.warmup=%d is at least the length of the whole schedule, %d (steps or epochs, as "
            "optim.interval says): the learning rate never decays",
            warmup,
            total,
        )

    def factor(tick: int) -> float:
        if tick < warmup:
            return (tick + 1) / (warmup + 1)
        return float(max(0.0, 1 - (tick - warmup) / max(1, total - warmup)) ** power)

    return LambdaLR(optimizer, factor)
