"""Classes of a data set of one's own."""

import colorsys
from collections.abc import Sequence
from typing import Any

from transkd.data.classes import ClassSet, class_set

__all__ = ["own_classes"]


def own_classes(names: Sequence[str], palette: Sequence[Sequence[int]] | None = None) -> ClassSet:
    """Class set of lists, as a yaml gives them.

    Args:
        names: one name per class id.
        palette: one RGB colour per class id; by default colours far from each other.

    Raises:
        UserError: there are fewer than two different names, or the palette does not fit them; see ``class_set``.

    Example:
        >>> own_classes(["road", "car"])
        ClassSet(names=('road', 'car'), palette=((242, 24, 24), (71, 103, 178)))
    """
    colours: Any = [_colour(i) for i in range(len(names))] if palette is None else palette
    return class_set(ClassSet(tuple(str(name) for name in names), colours))


def _colour(i: int) -> tuple[int, ...]:
    """Colour i of as many as are needed: hues by the golden ratio, in three brightnesses.

    They are nobody's palette, so a label file whose palette is Pascal VOC's is not taken for one in another order.
    """
    hue, saturation, value = i * 0.618034 % 1, (0.9, 0.6)[i % 2], (0.95, 0.7, 0.5)[i % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
