"""What an evaluation transform did to an image: padding, resizing, flips and turns are undone, the rest is refused."""

import copy
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transkd.data.transformed import check_image
from transkd.errors import UserError
from transkd.outputs import IGNORE

__all__ = ["ImageTransform", "class_of_padding", "ignoring_padding"]

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]

START = 1000.0  # added to coordinates: what padding is filled with is at most 255
SAMPLES = 96  # along each side, from which a transform is recognised
TRIES = 4
EXACT = 0.02  # pixels; cv2 keeps places in float32 or in 32nds of a pixel


class ImageTransform:
    """Transform images alone, and find out for each how to undo it.

    The coordinates of the pixels go through the transform together with the image, as a mask does, and show where each
    pixel came to lie. What keeps the whole image can be undone: resizing, padding on any side, flips, transposition,
    turns by 90°.

    Args:
        transform: an Albumentations transform.

    Example:
        >>> import albumentations as A
        >>> pad = ImageTransform(A.Compose([A.PadIfNeeded(8, 16, position="top_left")]))
        >>> image, place = pad(np.zeros((8, 8, 3), np.uint8))
        >>> image.shape, place.tolist()  # the image is the left half
        ((8, 16, 3), [[0.5, 0.0, -0.5], [0.0, 1.0, 0.0]])
    """

    def __init__(self, transform: Any) -> None:
        # coordinates stay exact under linear interpolation
        self.transform = _with(copy.deepcopy(transform), "mask_interpolation", cv2.INTER_LINEAR)

    def __call__(self, image: Pixels) -> tuple[Pixels, Tensor | None]:
        """Transform an image [H, W, 3].

        Returns:
            The transformed image, and the matrix [2, 3] by which ``transkd.layers.restored`` undoes padding, flips and
            turns; None if the whole image became the whole result, so that resizing undoes it.

        Raises:
            UserError: pixels of the image are lost, it is distorted, or the result is no image of bytes.
        """
        size = image.shape[:2]
        coordinates = np.empty((*size, 2), np.float32)
        coordinates[..., 0] = START + np.arange(size[0])[:, None]
        coordinates[..., 1] = START + np.arange(size[1])
        transformed = self.transform(image=image, mask=coordinates)
        check_image(transformed["image"])
        del coordinates
        return transformed["image"], _place(transformed["mask"], size)


def ignoring_padding(transform: Any) -> Any:
    """Copy a transform, in which padding gets the label 255, whatever ``fill_mask`` says.

    Example:
        >>> import albumentations as A
        >>> pad = ignoring_padding(A.Compose([A.PadIfNeeded(1, 3)]))
        >>> pad(image=np.zeros((1, 1, 3), np.uint8), mask=np.zeros((1, 1), np.uint8))["mask"].tolist()
        [[255, 0, 255]]
    """
    return _with(copy.deepcopy(transform), "fill_mask", IGNORE)


def class_of_padding(transform: Any, image: Pixels) -> int | None:
    """The class that a transform gives to what it adds to an image; None if that is ignored, or if it adds nothing.

    A transform that draws at random is tried a few times.

    Example:
        >>> import albumentations as A
        >>> image, pad = np.zeros((4, 4, 3), np.uint8), A.Compose([A.PadIfNeeded(8, 8)])
        >>> class_of_padding(pad, image), class_of_padding(A.Compose([A.PadIfNeeded(8, 8, fill_mask=255)]), image)
        (0, None)
    """
    transform = copy.deepcopy(transform)  # whose own draws stay as they are
    for seed in range(TRIES):
        transform.set_random_seed(seed)
        mask = transform(image=image, mask=np.full(image.shape[:2], IGNORE, np.uint8))["mask"]
        if (mask != IGNORE).any():
            return int(mask[mask != IGNORE][0])
    return None


def _with(transform: Any, setting: str, value: int) -> Any:
    """Set an argument of a transform and of its parts, in place, where they have it."""
    if getattr(transform, setting, None) is not None:
        setattr(transform, setting, value)
    for part in getattr(transform, "transforms", ()):
        _with(part, setting, value)
    return transform


def _place(coordinates: Values, size: tuple[int, int]) -> Tensor | None:
    """The matrix for ``restored`` from START + the coordinates (y, x) in the image that each result pixel shows."""
    before, after = np.array(size), np.array(coordinates.shape[:2])
    linear, offset = _fit(coordinates)
    _check(coordinates, linear, offset, before)
    # from pixels of the image to pixels of the result; whole pixels where it is nearly that
    inverse = np.linalg.inv(linear)
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * before - 0.5
    found = (corners - offset) @ inverse.T + 0.5
    whole = found.round()
    found = np.where(np.abs(found - whole) < EXACT, whole, found)
    if (found < 0).any() or (found > after).any():
        raise _lost("it cuts off pixels of the image")
    # in halves of each side from the centre, and (x, y), as F.affine_grid has it
    centres = 2 * found[:, ::-1] / after[::-1] - 1
    down, across = (centres[2] - centres[0]) / 2, (centres[1] - centres[0]) / 2
    matrix = np.stack([across, down, centres.mean(0)], axis=1)
    return None if np.array_equal(matrix, np.eye(2, 3)) else torch.from_numpy(matrix).float()


def _samples(length: int, first: float = 0, last: float = 1) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(first * (length - 1), last * (length - 1), SAMPLES).round().astype(np.int64))


def _fit(coordinates: Values) -> tuple[Values, Values]:
    """Least squares of ``coordinates ≈ linear @ (row, column) + offset``, in the middle of what is not padding."""
    inside = np.logical_and(coordinates[..., 0] >= START, coordinates[..., 1] >= START)
    if not inside.any():
        raise _lost("nothing of the image is left")
    lines = []
    for axis in (0, 1):
        found = np.flatnonzero(inside.any(1 - axis))
        lines.append(found[0] + _samples(found[-1] - found[0] + 1, 0.25, 0.75))
    rows, columns = np.meshgrid(*lines, indexing="ij")
    points = np.stack([rows.ravel(), columns.ravel(), np.ones(rows.size)], axis=1)
    solution = np.linalg.lstsq(points, coordinates[rows, columns].reshape(-1, 2) - START, rcond=None)[0]
    return solution[:2].T, solution[2]


def _check(coordinates: Values, linear: Values, offset: Values, before: npt.NDArray[np.int64]) -> None:
    """Check that every pixel lies where the fit says, but for those at the image's edge, where padding mixes in."""
    rows, columns = np.meshgrid(*map(_samples, coordinates.shape[:2]), indexing="ij")
    expected = np.stack([rows, columns], axis=-1) @ linear.T + offset
    margin = 1 + np.abs(linear).sum(1)
    inside = ((expected > margin - 1) & (expected < before - margin)).all(-1)
    far = np.abs(coordinates[rows, columns] - START - expected)[inside].max(initial=0) > 5 * EXACT
    if far or abs(np.linalg.det(linear)) < 1e-6:
        raise _lost("it does more than resize, pad, flip and turn by 90°")


def _lost(what: str) -> UserError:
    return UserError(
        f"data.eval_transform cannot be undone: {what}. Scores at the label's own size and predictions need every "
        "pixel of the image: resize, pad or flip it instead, score what the transform leaves with protocol=input-res, "
        "or predict with resize=false"
    )
