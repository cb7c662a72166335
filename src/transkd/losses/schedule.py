"""Schedules of a term's weight: a factor that depends on the training step."""

import math
from typing import NamedTuple

from transkd.errors import UserError

__all__ = ["Progress", "Schedule"]

SHAPES = ("linear", "cosine")
UNITS = ("run", "epoch", "step")


class Progress(NamedTuple):
    """Progress of a run.

    Attributes:
        step: completed optimiser steps.
        steps: optimiser steps of the whole run.
        epochs: epochs of the whole run; not a whole number if it ends within one.
    """

    step: int
    steps: int
    epochs: float

    def measured_in(self, unit: str) -> float:
        """Progress as a fraction of the run, in epochs, or in steps."""
        return {"run": 1.0, "epoch": self.epochs, "step": float(self.steps)}[unit] * self.step / self.steps


class Schedule:
    """Trapezoidal factor of a weight: 0, a ramp up to 1, 1, a ramp down to 0.

        0 before ``start``; up to 1 within ``rise`` after it; 1; down to 0 within ``fall`` before ``end``; then 0

    With x in [0, 1] the progress within a ramp, a linear ramp is x or 1 − x, a cosine ramp ½(1 ∓ cos πx); a ramp of
    length 0 is a step. The factor depends only on the training step, so a resumed run continues correctly. Examples:
    the epoch warm-up of DKD (arXiv 2203.08679) and ReviewKD (arXiv 2104.09044) in their published code, ``min(epoch /
    20, 1)``, is ``Schedule(rise=20, unit="epoch")``; distillation in the first 80 % of a run, as in DearKD's first
    stage (arXiv 2204.12997), is ``Schedule(end=0.8)``. DearKD does not publish that length; 0.8 is our choice.

    Args:
        start: begin of the upward ramp.
        rise: length of the upward ramp.
        end: end of the downward ramp; None for no end.
        fall: length of the downward ramp.
        shape: shape of both ramps, "linear" or "cosine".
        unit: unit of the four values above: "run" (fraction of the run), "epoch" or "step".

    Raises:
        UserError: the shape or unit is unknown, a value is negative, or the factor is 0 at every step.

    Example:
        >>> schedule = Schedule(end=0.75, fall=0.5)
        >>> [schedule(Progress(step, steps=4, epochs=1)) for step in range(4)]
        [1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        start: float = 0.0,
        rise: float = 0.0,
        end: float | None = None,
        fall: float = 0.0,
        shape: str = "linear",
        unit: str = "run",
    ) -> None:
        for setting, value, known in (("shape", shape, SHAPES), ("unit", unit, UNITS)):
            if value not in known:
                raise UserError(f"Schedule: {setting} must be one of {', '.join(known)}; got {value!r}.")
        over = math.inf if end is None else end
        if not (min(start, rise, fall) >= 0 and max(start, rise, fall) < math.inf):
            raise UserError(
                f"Schedule: start, rise and fall must be 0 or more; got start={start}, rise={rise}, fall={fall}."
            )
        if not start < over or (unit == "run" and start >= 1):
            raise UserError(f"Schedule: it never turns on, with start={start}, end={end} in units of a {unit}.")
        self.start, self.rise, self.end, self.fall = float(start), float(rise), float(over), float(fall)
        self.shape, self.unit = shape, unit

    def __call__(self, progress: Progress) -> float:
        """Return the factor, from 0 to 1."""
        if self.start >= Progress(progress.steps, progress.steps, progress.epochs).measured_in(self.unit):
            raise UserError(
                f"Schedule: it never turns on: start={self.start:g} in units of a {self.unit}, but the run has "
                f"{progress.epochs:g} epochs and {progress.steps} steps."
            )
        now = progress.measured_in(self.unit)
        if not self.start <= now < self.end:
            return 0.0
        up = (now - self.start) / self.rise if self.rise else 1.0
        down = (self.end - now) / self.fall if self.fall else 1.0
        return self._ramp(min(up, 1.0)) * self._ramp(min(down, 1.0))

    def _ramp(self, x: float) -> float:
        return x if self.shape == "linear" else (1 - math.cos(math.pi * x)) / 2

    def __repr__(self) -> str:
        return f"Schedule(start={self.start:g}, rise={self.rise:g}, end={self.end:g}, fall={self.fall:g}, {self.unit})"
