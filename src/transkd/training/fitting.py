"""Train to the end, from the start or from a checkpoint."""

import logging
from pathlib import Path

import lightning as L

from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.models import merge_lora, save_segmenter
from transkd.training.distiller import Distiller
from transkd.training.resuming import Checkpoint

__all__ = ["fit"]

log = logging.getLogger(__name__)


def fit(
    trainer: L.Trainer,
    distiller: Distiller,
    data: SegmentationDataModule,
    checkpoint: Checkpoint | None = None,
    deployed: Path | None = None,
) -> None:
    """Train to the end.

    Args:
        trainer: Lightning's Trainer.
        distiller: what is trained.
        data: the data.
        checkpoint: where to go on.
        deployed: file for the student if an epoch is trained but its validation fails.

    Raises:
        UserError: there are more processes than images, no step was taken, or the checkpoint is of another run.
    """
    _check_shares(trainer, data)
    path = None if checkpoint is None else checkpoint.path
    try:
        trainer.fit(distiller, datamodule=data, ckpt_path=path)
    except Exception as error:
        saved = _rescue(trainer, distiller, deployed)
        if isinstance(error, UserError) and saved:
            raise UserError(f"{error}. {saved}") from error
        if path is None or "loading state_dict" not in str(error):
            raise
        details = " ".join(str(error).split())[:300]
        raise UserError(
            f"ckpt_path={path} is of a run with another student, other terms or another student.lora; resume with "
            f"that run's settings, {path.absolute().parents[1] / 'config.yaml'} ({details} …)"
        ) from error
    if trainer.global_step == 0 and trainer.max_epochs != 0:
        raise UserError(
            "no step was taken, so there is nothing to save: expected at least one training batch in an epoch; check "
            "trainer.limit_train_batches, trainer.max_steps, trainer.max_time and data.batch_size"
        )


def _check_shares(trainer: L.Trainer, data: SegmentationDataModule) -> None:
    """Check that each process has an image of each split."""
    for split in ("train", "val"):
        count = len(data.dataset(split))
        if count < trainer.world_size:
            raise UserError(
                f"the split {split} has {count} images for {trainer.world_size} processes, each of which needs one; "
                "lower trainer.devices or trainer.num_nodes"
            )


def _rescue(trainer: L.Trainer, distiller: Distiller, deployed: Path | None) -> str:
    """Save the student of an epoch that is trained when its validation fails; say where, or nothing if not."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    if deployed is None or not done or done < trainer.num_training_batches or not trainer.is_global_zero:
        return ""
    if not all(parameter.isfinite().all() for parameter in distiller.student.parameters()):
        return ""
    merge_lora(distiller.student)
    unfinished = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
    try:
        save_segmenter(distiller.student, deployed, **distiller.notes, unfinished=unfinished)
    except UserError:  # a full disk may be why the validation failed
        return ""
    said = f"The student after step {trainer.global_step}, not scored, is {deployed}"
    log.error(said)
    return said
