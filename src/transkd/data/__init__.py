"""Data sets, the data module and the drawn road scenes."""

import os

# Albumentations would otherwise look for a newer version of itself on the network at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from transkd.data.acdc import find_acdc
from transkd.data.camvid import find_camvid
from transkd.data.classes import CAMVID, CITYSCAPES, CLASS_SETS, ClassSet
from transkd.data.datamodule import SegmentationDataModule
from transkd.data.dataset import Batch, Pair, SegmentationDataset, pair_by_name

__all__ = [
    "CAMVID",
    "CITYSCAPES",
    "CLASS_SETS",
    "Batch",
    "ClassSet",
    "Pair",
    "SegmentationDataModule",
    "SegmentationDataset",
    "find_acdc",
    "find_camvid",
    "pair_by_name",
]
