"""Class names and colours of the label sets."""

from typing import NamedTuple

__all__ = ["CAMVID", "CITYSCAPES", "CLASS_SETS", "VOC", "ClassSet"]


class ClassSet(NamedTuple):
    """The classes of a label set, in the order of their train ids.

    Pixels without a class have the label 255: losses and scores ignore them, pictures show them in black.

    Attributes:
        names: one name per train id.
        palette: one RGB colour per train id.

    Example:
        >>> CITYSCAPES.names.index("car"), CITYSCAPES.palette[13]
        (13, (0, 0, 142))
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


CITYSCAPES = ClassSet(
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    palette=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
)
"""The 19 classes of Cityscapes and ACDC."""

CAMVID = ClassSet(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign_symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)
"""The 11 classes of CamVid as grouped by the SegNet tutorial."""

VOC = ClassSet(
    names=(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
    palette=(
        (224, 224, 192),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
        (192, 0, 0),
        (64, 128, 0),
        (192, 128, 0),
        (64, 0, 128),
        (192, 0, 128),
        (64, 128, 128),
        (192, 128, 128),
        (0, 64, 0),
        (128, 64, 0),
        (0, 192, 0),
        (128, 192, 0),
        (0, 64, 128),
    ),
)
"""The 21 classes of Pascal VOC 2012, with its colours except for the background.

Pictures show ignored pixels in black, so the background has the colour that VOC uses for ignored pixels.
"""

CLASS_SETS = {"cityscapes": CITYSCAPES, "camvid": CAMVID, "voc": VOC}
"""Label sets by the name used in configurations."""
