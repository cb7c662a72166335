"""The history of a resumed run: best checkpoint, best score and metrics go on in the folder of the new one."""

import csv
import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from transkd.errors import UserError
from transkd.files import read_tensor_file, write_atomically

__all__ = ["History"]

log = logging.getLogger(__name__)


class History(L.Callback):
    """Carry the history of a checkpoint's run over, so that the files of the resumed one cover both.

    Args:
        checkpoint: the checkpoint that is resumed.
        steps: its optimizer steps; later rows of that run's ``metrics.csv`` are computed again, and left out.
    """

    def __init__(self, checkpoint: Path, steps: int) -> None:
        self.checkpoint = checkpoint.absolute()
        self.folder = self.checkpoint.parent
        # read now: in the same folder the logger deletes the file
        self.rows = _rows_before(self.folder.parent / "metrics.csv", steps)
        self.between_epochs = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy the best checkpoint and let its callback know its score, which Lightning drops in another folder."""
        self.between_epochs = _close_epoch(checkpoint["loops"]["fit_loop"]["epoch_progress"])
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and callback.dirpath is not None:
                self._carry(trainer, callback, state)

    def _carry(self, trainer: L.Trainer, callback: ModelCheckpoint, state: dict[str, Any]) -> None:
        folder = Path(str(callback.dirpath))
        state.update(self._newest(callback.state_key, state))
        names = {Path(path).name for path in state["best_k_models"]}
        absent = [name for name in names if not (self.folder / name).is_file()]
        if absent:
            log.warning("resuming: %s is not there, so the best score begins anew", self.folder / absent[0])
            return
        if trainer.is_global_zero and folder.absolute() != self.folder.absolute():
            for name in names:
                write_atomically(folder / name, (self.folder / name).read_bytes())
        state["dirpath"] = callback.dirpath
        state["best_k_models"] = {str(folder / Path(p).name): score for p, score in state["best_k_models"].items()}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if state[key]:
                state[key] = str(folder / Path(state[key]).name)

    def _newest(self, key: str, state: dict[str, Any]) -> dict[str, Any]:
        """State of a callback in the newest checkpoint that it wrote: last.ckpt is written before best.ckpt."""
        found = {(-1, False): state}
        for file in self.folder.glob("*.ckpt"):
            try:
                content, _ = read_tensor_file(file)
            except UserError as error:
                log.warning("resuming: %s", error)
                continue
            if isinstance(content, dict) and key in content.get("callbacks", {}):
                found[content["global_step"], file != self.checkpoint] = content["callbacks"][key]
        return found[max(found)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin ``metrics.csv`` with the rows of the earlier run, and the next epoch where one is complete."""
        if self.between_epochs:  # with trainer.max_steps Lightning would look for the rest of the complete epoch
            trainer.fit_loop.epoch_loop.restarting = False
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                logger.experiment.metrics[:0] = self.rows


def _close_epoch(progress: dict[str, Any]) -> bool:
    """Count an epoch as completed if the checkpoint was written at its end, and say whether it was.

    Lightning writes before it counts, and counts later only without ``trainer.max_steps``.
    """
    done: bool = progress["current"]["processed"] == progress["current"]["ready"]
    for counts in progress.values() if done else ():
        counts["completed"] = counts["processed"]
    return done


def _rows_before(file: Path, steps: int) -> list[dict[str, Any]]:
    """Rows of a ``metrics.csv`` before a step, as they are written."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [{name: value for name, value in row.items() if name and value} for row in csv.DictReader(lines)]
    return [row for row in rows if _step(row) < steps]


def _step(row: dict[str, Any]) -> float:
    try:
        return float(row["step"])
    except (KeyError, ValueError):  # the last row of a killed run may be cut off
        return float("inf")
