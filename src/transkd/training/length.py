"""Length of a run as Lightning plans it."""

import math
from typing import NamedTuple

import lightning as L

__all__ = ["Length", "length_of"]


class Length(NamedTuple):
    """Length of a run.

    Attributes:
        steps: optimizer steps.
        epochs: epochs; not a whole number if ``max_steps`` ends the run within one.
    """

    steps: int
    epochs: float


def length_of(trainer: L.Trainer) -> Length | None:
    """Length of the run by ``max_epochs`` and ``max_steps``, whichever ends it first; None if neither does.

    Args:
        trainer: attached to a module, as in ``configure_optimizers`` and later.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        return None
    trainer.fit_loop.setup_data()  # no-op if done; without max_epochs the number of batches is not known yet
    batches = trainer.num_training_batches
    if not math.isfinite(batches):  # a stream of a user's own data module
        return Length(int(steps), float(max(trainer.max_epochs or 1, 1)))
    return Length(int(steps), steps / max(1, math.ceil(batches / trainer.accumulate_grad_batches)))
