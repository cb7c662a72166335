"""Random state that depends only on seed, epoch and rank."""

import lightning as L
import torch

__all__ = ["EpochSeed"]


class EpochSeed(L.Callback):
    """Seed dropout and stochastic depth at each epoch by seed, epoch and rank; a resumed run reproduces them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed PyTorch's generators."""
        torch.manual_seed(self.seed + 100_003 * (trainer.current_epoch + 1) + 1_000_000_007 * trainer.global_rank)
