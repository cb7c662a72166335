"""Classes of a data set of one's own."""

import colorsys
from collections.abc import Sequence

from transkd.data.classes import ClassSet
from transkd.errors import UserError

__all__ = ["own_classes"]


def own_classes(names: Sequence[str], palette: Sequence[Sequence[int]] | None = None) -> ClassSet:
    """Class set of lists, as a yaml gives them.

    Args:
        names: one name per class id.
        palette: one RGB colour per class id; by default colours far from each other.

    Raises:
        UserError: two classes have one name, or the palette does not fit the names.

    Example:
        >>> own_classes(["road", "car"])
        ClassSet(names=('road', 'car'), palette=((242, 24, 24), (71, 103, 178)))
    """
    names = tuple(str(name) for name in names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(f"data.classes.names must be different names, at least one; {', '.join(twice) or 'none'} given")
    colours = [_colour(i) for i in range(len(names))] if palette is None else [tuple(c) for c in palette]
    if len(colours) != len(names):
        raise UserError(f"data.classes.palette has {len(colours)} colours for {len(names)} names; give one each")
    wrong = [colour for colour in colours if len(colour) != 3 or not all(0 <= part <= 255 for part in colour)]
    if wrong:
        raise UserError(f"data.classes.palette has {list(wrong[0])}: expected [r,g,b], each from 0 to 255")
    return ClassSet(names, tuple((red, green, blue) for red, green, blue in colours))


def _colour(i: int) -> tuple[int, ...]:
    """Colour i of as many as are needed: hues by the golden ratio, in three brightnesses.

    They are nobody's palette, so a label file whose palette is Pascal VOC's is not taken for one in another order.
    """
    hue, saturation, value = i * 0.618034 % 1, (0.9, 0.6)[i % 2], (0.95, 0.7, 0.5)[i % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
