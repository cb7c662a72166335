"""Loading and saving of weights under one module name."""

from transkd.models.factory import load_segmenter
from transkd.models.storage.card import describe
from transkd.models.storage.loading import load_weights
from transkd.models.storage.saving import save_segmenter
from transkd.models.storage.sources import Weights, read_weights
from transkd.models.storage.transkd_checkpoint import split_transkd_checkpoint

__all__ = [
    "Weights",
    "describe",
    "load_segmenter",
    "load_weights",
    "read_weights",
    "save_segmenter",
    "split_transkd_checkpoint",
]
