"""Split a transform into its deterministic head, which can be done once, and the random rest."""

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import albumentations as A
import cv2

__all__ = ["split_transform"]

DETERMINISTIC = (A.Resize, A.SmallestMaxSize, A.LongestMaxSize)


def split_transform(transform: Any) -> tuple[Any, Any]:
    """Return the leading deterministic resizing of a transform and the rest of it; None for an empty part.

    The parts share their transforms with the whole and draw the same random numbers: seeded alike and applied one
    after the other, they give exactly its result.

    Example:
        >>> head, rest = split_transform(A.Compose([A.Resize(16, 32), A.HorizontalFlip()]))
        >>> [type(part).__name__ for part in (*head, *rest)]
        ['Resize', 'HorizontalFlip']
    """
    if type(transform) is not A.Compose or transform.p < 1:
        return None, transform
    head = list(takewhile(_is_deterministic, transform))
    return _part(transform, head), _part(transform, list(transform)[len(head) :])


def _is_deterministic(transform: Any) -> bool:
    if type(transform) not in DETERMINISTIC or transform.p < 1:
        return False
    several_sizes = isinstance(getattr(transform, "max_size", None), Sequence)
    keeps_ids = transform.mask_interpolation == cv2.INTER_NEAREST
    return not several_sizes and keeps_ids and getattr(transform, "area_for_downscale", None) != "image_mask"


def _part(transform: Any, parts: list[Any]) -> Any:
    if not parts:
        return None
    part = copy.copy(transform)
    part.transforms = parts
    return part
