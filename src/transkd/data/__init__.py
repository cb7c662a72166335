"""Data sets, the data module and the synthetic road scenes."""

import os

# Disable the version check that Albumentations makes over the network at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from transkd.data.acdc import find_acdc
from transkd.data.ade20k import find_ade20k
from transkd.data.bdd100k import find_bdd100k
from transkd.data.camvid import find_camvid
from transkd.data.cityscapes import find_cityscapes
from transkd.data.classes import ADE20K, CAMVID, CITYSCAPES, CLASS_SETS, NYUV2, NYUV2_39, VOC, ClassSet
from transkd.data.coco import find_coco
from transkd.data.datamodule import SegmentationDataModule
from transkd.data.dataset import Batch, PlacedBatch, SegmentationDataset
from transkd.data.folder import find_folder
from transkd.data.labels import LabelFormat
from transkd.data.listing import Pair, pair_by_name
from transkd.data.mapillary import find_mapillary, mapillary_classes, mapillary_label
from transkd.data.nyuv2 import find_nyuv2, prepare_nyuv2
from transkd.data.own_classes import own_classes
from transkd.data.voc import find_voc
from transkd.data.yolo import find_yolo

__all__ = [
    "ADE20K",
    "CAMVID",
    "CITYSCAPES",
    "CLASS_SETS",
    "NYUV2",
    "NYUV2_39",
    "VOC",
    "Batch",
    "ClassSet",
    "LabelFormat",
    "Pair",
    "PlacedBatch",
    "SegmentationDataModule",
    "SegmentationDataset",
    "find_acdc",
    "find_ade20k",
    "find_bdd100k",
    "find_camvid",
    "find_cityscapes",
    "find_coco",
    "find_folder",
    "find_mapillary",
    "find_nyuv2",
    "find_voc",
    "find_yolo",
    "mapillary_classes",
    "mapillary_label",
    "own_classes",
    "pair_by_name",
    "prepare_nyuv2",
]
