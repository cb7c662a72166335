"""What concerns the processes of a command as a whole: their settings, their number, their end by a signal."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from transkd.command.folders import TORCHRUN, rank
from transkd.command.stopping import Stopped, again, received
from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.files import one_at_a_time
from transkd.training.cpu_choices import choose_layers
from transkd.training.memory import keep_freed_memory

__all__ = ["EndOnSignal", "check_processes", "prepare_data", "prepare_process"]

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
    if rank() > 0:
        logging.getLogger("transkd").setLevel(logging.WARNING)  # rank 0 says it
    for text in SILENCED:
        warnings.filterwarnings("ignore", text)
    torch.set_float32_matmul_precision("high")
    if keep_memory:
        keep_freed_memory()
    if kind.type == "cpu":
        choose_layers()


def prepare_data(data: SegmentationDataModule, run_dir: Path) -> None:
    """Write what is missing of the data, in one process after the other: those of torchrun all begin at once."""
    with one_at_a_time(run_dir / ".data.lock"):
        data.prepare_data()


def check_processes(trainer: L.Trainer, sync_batchnorm: bool = False) -> None:
    """Check that the Trainer has as many processes as torchrun started, on devices that can do what is asked.

    Raises:
        UserError: it has another number, so that each process would train a run of its own into the same folder; or
            BatchNorm is to be synchronised on CPUs.
    """
    if sync_batchnorm and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm=true: PyTorch's SyncBatchNorm needs GPUs; leave it out on a CPU")
    started = int(os.environ.get("WORLD_SIZE", "1")) if TORCHRUN in os.environ else trainer.world_size
    if trainer.world_size != started:
        raise UserError(
            f"torchrun started {started} processes, but trainer.devices and trainer.num_nodes make "
            f"{trainer.world_size}; set trainer.devices to the processes per machine and trainer.strategy=ddp"
        )


class EndOnSignal(L.Callback):
    """End at the first SIGINT or SIGTERM.

    Lightning's own handler of SIGTERM waits for the other processes inside the handler; the command's takes its place.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the command's handlers."""
        again()

    on_validation_start = on_train_start

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """End here where code that runs no exceptions, such as a destructor, swallowed the signal's."""
        _end_if_asked()

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """End here likewise."""
        _end_if_asked()


def _end_if_asked() -> None:
    signum = received()
    if signum is not None:
        raise Stopped(signum)
