"""Data sets, the data module and the synthetic road scenes."""

import os

# Disable the version check that Albumentations makes over the network at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from transkd.data.acdc import find_acdc
from transkd.data.camvid import find_camvid
from transkd.data.cityscapes import find_cityscapes
from transkd.data.classes import CAMVID, CITYSCAPES, CLASS_SETS, NYUV2, NYUV2_39, VOC, ClassSet
from transkd.data.datamodule import SegmentationDataModule
from transkd.data.dataset import Batch, Pair, PlacedBatch, SegmentationDataset, pair_by_name
from transkd.data.nyuv2 import find_nyuv2, prepare_nyuv2
from transkd.data.voc import find_voc

__all__ = [
    "CAMVID",
    "CITYSCAPES",
    "CLASS_SETS",
    "NYUV2",
    "NYUV2_39",
    "VOC",
    "Batch",
    "ClassSet",
    "Pair",
    "PlacedBatch",
    "SegmentationDataModule",
    "SegmentationDataset",
    "find_acdc",
    "find_camvid",
    "find_cityscapes",
    "find_nyuv2",
    "find_voc",
    "pair_by_name",
    "prepare_nyuv2",
]
