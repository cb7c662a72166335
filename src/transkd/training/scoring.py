"""Evaluation of a network on the validation split."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch

from transkd.data import SegmentationDataModule
from transkd.metrics import Scores, SegmentationScore
from transkd.models import Network
from transkd.training.device import Device

__all__ = ["Scorer", "score"]


class Scorer(L.LightningModule):
    """LightningModule that evaluates a network under a protocol; ``Distiller`` adds training.

    Args:
        student: the network to evaluate.
        protocol: resolution at which predictions are compared with labels (``transkd.metrics.PROTOCOLS``).
        device: memory format of images, and whether the network is compiled; validation runs it eagerly anyway.

    Attributes:
        scores: scores of the last validation; None before the first.
    """

    def __init__(self, student: Network, protocol: str = "full-res", device: Device | None = None) -> None:
        super().__init__()
        self.student = student
        self.memory_format = torch.preserve_format if device is None else device.memory_format
        self.compiled = device is not None and device.compile_mode is not None
        self.score = SegmentationScore(student.num_classes, protocol)
        self.scores: Scores | None = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the confusion matrix."""
        image, target, *_ = batch
        # eager: validation images differ in size from training crops, and each size would be compiled
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            logits = self.student(image.to(memory_format=self.memory_format)).logits
        self.score.update(logits, target)

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
    """Evaluate a network on the validation split; restores its training mode."""
    scorer = Scorer(network, protocol, device)
    was_training = network.training
    trainer.validate(scorer, datamodule=data, verbose=False)
    network.train(was_training)
    assert scorer.scores is not None
    return scorer.scores
