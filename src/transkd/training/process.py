"""Process-wide settings of a command."""

import logging
import warnings

import torch

from transkd.training.cpu_choices import choose_layers
from transkd.training.memory import keep_freed_memory

__all__ = ["prepare_process"]

# Lightning's warnings that do not apply here
SILENCED = (
    ".*treespec, LeafSpec.*",
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*logs directory .* exists and is not empty.*",  # the run's folder holds config.yaml before metrics.csv
    ".*in eval mode at the start of training.*",  # the teacher stays in eval
)


def prepare_process(keep_memory: bool, kind: torch.device) -> None:
    """Silence Lightning's start-up messages, allow TensorFloat-32, keep freed memory, and choose layers for a CPU.

    Args:
        keep_memory: see ``keep_freed_memory``.
        kind: device that the networks run on; on a CPU see ``choose_layers``.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in SILENCED:
        warnings.filterwarnings("ignore", text)
    torch.set_float32_matmul_precision("high")
    if keep_memory:
        keep_freed_memory()
    if kind.type == "cpu":
        choose_layers()
