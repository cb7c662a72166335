"""Evaluation of a network on the validation split."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import PurePath
from typing import Any

import lightning as L
import torch
from torch import Tensor

from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.layers.placement import restored
from transkd.metrics import Scores, SegmentationScore
from transkd.models import Network
from transkd.training.device import Device

__all__ = ["Scorer", "score"]


class Scorer(L.LightningModule):
    """LightningModule that evaluates a network under a protocol; ``Distiller`` adds training.

    Args:
        student: the network to evaluate.
        protocol: how predictions are made and compared with labels (``transkd.metrics.PROTOCOLS``).
        device: memory format of images, and whether the network is compiled; validation runs it eagerly anyway.
        conditions: folders in the images' paths by which scores are given too.

    Attributes:
        scores: scores of the last validation; None before the first.
    """

    def __init__(
        self,
        student: Network,
        protocol: str = "full-res",
        device: Device | None = None,
        conditions: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.memory_format = torch.preserve_format if device is None else device.memory_format
        self.compiled = device is not None and device.compile_mode is not None
        self.score = SegmentationScore(student.num_classes, protocol, conditions)
        self.scores: Scores | None = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the confusion matrix."""
        image, target, *names = batch
        # eager: validation images differ in size from training crops, and each size would be compiled
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            scores = self.score.rule.infer(self._logits, image)
        if (place := getattr(batch, "place", None)) is not None:
            scores = restored(scores, place, target.shape[-2:])
        self.score.update(scores, target, self._conditions(names[0]) if self.score.conditions else ())

    def _logits(self, image: Tensor) -> Tensor:
        logits: Tensor = self.student(image.to(memory_format=self.memory_format)).logits
        return logits

    def _conditions(self, names: Sequence[str]) -> list[str | None]:
        """The condition of each image: the innermost folder of its path that is one."""
        known = self.score.conditions
        return [next((part for part in reversed(PurePath(name).parts) if part in known), None) for name in names]

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the split with the protocol in their name."""
        self.scores = self.score.compute()
        self.score.reset()
        stamp = f"val/{self.score.protocol}"
        self.log(f"{stamp}/mIoU", self.scores.miou.float(), prog_bar=True)
        self.log(f"{stamp}/pixel_accuracy", self.scores.pixel_accuracy.float())


def score(
    network: Network, data: SegmentationDataModule, protocol: str, trainer: L.Trainer, device: Device | None = None
) -> Scores:
    """Evaluate a network on the validation split; restores its training mode and its dtype.

    Raises:
        UserError: no image was scored, or none of their pixels has a class.
    """
    scorer = Scorer(network, protocol, device, getattr(data, "conditions", ()))
    was_training, dtype = network.training, network.mean.dtype
    trainer.validate(scorer, datamodule=data, verbose=False)
    network.train(was_training)
    if network.mean.dtype != dtype:  # Lightning converts it for precisions such as 64-true
        network.to(dtype)
    if scorer.scores is None:
        raise UserError(
            "no validation image was scored, so there is no mIoU: expected trainer.limit_val_batches of at least one "
            "batch, or null for all of them"
        )
    if scorer.scores.miou.isnan():
        raise UserError(
            "none of the scored validation pixels has a class (every label is 255 or in data.void), so there is no "
            "mIoU: check the labels, data.void and trainer.limit_val_batches"
        )
    return scorer.scores
