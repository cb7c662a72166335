"""Where ``AtomicCheckpointIO`` used to lie; the config.yaml of earlier runs names it here."""

from transkd.training.checkpoint_io import AtomicCheckpointIO

__all__ = ["AtomicCheckpointIO"]
