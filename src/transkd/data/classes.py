"""Class names and colours of the label sets."""

from collections.abc import Iterable
from typing import NamedTuple

from transkd.errors import UserError

__all__ = ["CAMVID", "CITYSCAPES", "CLASS_SETS", "NYUV2", "NYUV2_39", "VOC", "ClassSet", "class_set"]


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

NYUV2 = ClassSet(
    names=(
        "wall",
        "floor",
        "cabinet",
        "bed",
        "chair",
        "sofa",
        "table",
        "door",
        "window",
        "bookshelf",
        "picture",
        "counter",
        "blinds",
        "desk",
        "shelves",
        "curtain",
        "dresser",
        "pillow",
        "mirror",
        "floor mat",
        "clothes",
        "ceiling",
        "books",
        "refrigerator",
        "television",
        "paper",
        "towel",
        "shower curtain",
        "box",
        "whiteboard",
        "person",
        "night stand",
        "toilet",
        "sink",
        "lamp",
        "bathtub",
        "bag",
        "otherstructure",
        "otherfurniture",
        "otherprop",
    ),
    palette=(
        (174, 199, 232),
        (152, 223, 138),
        (31, 119, 180),
        (255, 187, 120),
        (188, 189, 34),
        (140, 86, 75),
        (255, 152, 150),
        (214, 39, 40),
        (197, 176, 213),
        (148, 103, 189),
        (196, 156, 148),
        (23, 190, 207),
        (178, 76, 76),
        (247, 182, 210),
        (66, 188, 102),
        (219, 219, 141),
        (140, 57, 197),
        (202, 185, 52),
        (51, 176, 203),
        (200, 54, 131),
        (92, 193, 61),
        (78, 71, 183),
        (172, 114, 82),
        (255, 127, 14),
        (91, 163, 138),
        (153, 98, 156),
        (140, 153, 101),
        (158, 218, 229),
        (100, 125, 154),
        (178, 127, 135),
        (120, 185, 128),
        (146, 111, 194),
        (44, 160, 44),
        (112, 128, 144),
        (96, 207, 209),
        (227, 119, 194),
        (213, 92, 176),
        (94, 106, 211),
        (82, 84, 163),
        (100, 85, 144),
    ),
)
"""The 40 classes of NYU Depth v2 (Gupta et al., CVPR 2013), in the usual NYU40 colours."""

NYUV2_39 = ClassSet(NYUV2.names[:39], NYUV2.palette[:39])
"""NYUV2 without its last class *otherprop*, for label files in which it is ignored."""

CLASS_SETS = {
    "cityscapes": CITYSCAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "nyuv2": NYUV2,
    "nyuv2_39": NYUV2_39,
}
"""Label sets by the name used in configurations."""


def class_set(classes: str | ClassSet) -> ClassSet:
    """Return a label set by its name, or one of a user's with plain texts and whole numbers.

    Raises:
        UserError: the name is unknown, or names and colours are not one text and one RGB colour per class.

    Example:
        >>> class_set(ClassSet(["road", "car"], [[128, 64, 128], [0, 0, 142]]))
        ClassSet(names=('road', 'car'), palette=((128, 64, 128), (0, 0, 142)))
    """
    if isinstance(classes, str):
        if classes not in CLASS_SETS:
            raise UserError(f"unknown classes {classes!r}; available: {', '.join(CLASS_SETS)}")
        return CLASS_SETS[classes]
    names, palette = getattr(classes, "names", None), getattr(classes, "palette", None)
    if not isinstance(names, Iterable) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"data.classes.names={names}: expected a list of names, one text per class")
    if not isinstance(palette, Iterable) or not all(map(_is_colour, palette)):
        raise UserError(
            f"data.classes.palette={palette}: expected one colour per class, three whole numbers from 0 to 255"
        )
    found = ClassSet(tuple(names), tuple((int(red), int(green), int(blue)) for red, green, blue in palette))
    if len(found.names) != len(found.palette) or len(set(found.names)) != len(found.names):
        raise UserError(
            f"data.classes has {len(found.names)} names, of which {len(set(found.names))} are different, and "
            f"{len(found.palette)} colours; expected one name and one colour per class"
        )
    return found


def _is_colour(colour: object) -> bool:
    return (
        isinstance(colour, list | tuple)
        and len(colour) == 3
        and all(isinstance(part, int) and 0 <= part <= 255 for part in colour)
    )
