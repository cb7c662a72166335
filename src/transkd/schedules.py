"""Where ``warmup_poly`` used to lie; the config.yaml of earlier runs names it here."""

from transkd.training.learning_rate import warmup_poly

__all__ = ["warmup_poly"]
