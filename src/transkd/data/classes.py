"""Class names and colours of the label sets."""

from collections.abc import Iterable
from typing import NamedTuple

from transkd.errors import UserError

__all__ = ["ADE20K", "CAMVID", "CITYSCAPES", "CLASS_SETS", "NYUV2", "NYUV2_39", "VOC", "ClassSet", "class_set"]


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

ADE20K_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane,
dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
monitor, bulletin board, shower, radiator, glass, clock, flag
"""
ADE20K_COLOURS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""

ADE20K = ClassSet(
    names=tuple(" ".join(name.split()) for name in ADE20K_NAMES.split(",")),
    palette=tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in ADE20K_COLOURS.split()),
)
"""The 150 classes of ADE20K's SceneParsing benchmark, in the usual colours."""

CLASS_SETS = {
    "cityscapes": CITYSCAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "nyuv2": NYUV2,
    "nyuv2_39": NYUV2_39,
    "ade20k": ADE20K,
}
"""Label sets by the name used in configurations."""


def class_set(classes: str | ClassSet) -> ClassSet:
    """Return a label set by its name, or one of a user's with plain texts and whole numbers.

    Raises:
        UserError: the name is unknown, or names and colours are not one text and one RGB colour per class, two classes
            at least.

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
    names = tuple(names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.classes.names has {', '.join(twice)} more than once; expected different names")
    if len(names) < 2:
        raise UserError(
            f"data.classes.names=[{', '.join(names)}]: expected at least two classes; the rest of the image is one "
            "too, such as [background,crack] for masks of 0 and 1"
        )
    colours = tuple(palette) if isinstance(palette, Iterable) else (palette,)
    if wrong := [colour for colour in colours if not _is_colour(colour)]:
        raise UserError(f"data.classes.palette has {wrong[0]}: expected [r,g,b], whole numbers from 0 to 255")
    if len(colours) != len(names):
        raise UserError(f"data.classes.palette has {len(colours)} colours for {len(names)} names; give one each")
    return ClassSet(names, tuple((int(red), int(green), int(blue)) for red, green, blue in colours))


def _is_colour(colour: object) -> bool:
    return (
        isinstance(colour, list | tuple)
        and len(colour) == 3
        and all(isinstance(part, int) and 0 <= part <= 255 for part in colour)
    )
