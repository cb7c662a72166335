"""Train to the end, from the start or from a checkpoint."""

import logging
from pathlib import Path

import lightning as L

from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.models.storage.sources import read_weights
from transkd.training.distiller import Distiller

__all__ = ["find_checkpoint", "fit"]

log = logging.getLogger(__name__)


def find_checkpoint(ckpt_path: str | None, experiment: str) -> str | None:
    """Find the checkpoint to resume from; ``last`` is the newest one of this experiment.

    Raises:
        UserError: there is none, or the file is not a checkpoint of a run.
    """
    if ckpt_path is None:
        return None
    path = Path(ckpt_path)
    if ckpt_path == "last":
        folder = Path("outputs") / experiment
        found = sorted(folder.glob("**/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"ckpt_path=last: no checkpoints/last.ckpt in any run under {folder.absolute()}")
        path = found[-1]
    if not read_weights(path).card.get("transkd_version"):  # raises for a missing or damaged file
        raise UserError(
            f"ckpt_path={path} is no checkpoint of a run; to start from its weights use student.weights={path}"
        )
    log.info("resuming from %s", path)
    return str(path)


def fit(trainer: L.Trainer, distiller: Distiller, data: SegmentationDataModule, ckpt_path: str | None = None) -> None:
    """Train to the end.

    Raises:
        UserError: training was interrupted (says how to resume), or the checkpoint is of a run with other settings.
    """
    try:
        trainer.fit(distiller, datamodule=data, ckpt_path=ckpt_path)
    except RuntimeError as error:
        if ckpt_path is None or "loading state_dict" not in str(error):
            raise
        details = " ".join(str(error).split())[:300]
        raise UserError(
            f"ckpt_path={ckpt_path} is of a run with another student, other terms or another student.lora; resume with "
            f"that run's settings, {Path(ckpt_path).parents[1] / 'config.yaml'} ({details} …)"
        ) from error
    if trainer.interrupted:
        raise UserError(f"interrupted at epoch {trainer.current_epoch}; resume with ckpt_path=last")
