"""Polygons to label maps."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transkd.errors import UserError
from transkd.outputs import IGNORE

__all__ = ["read_yolo"]

Polygon = npt.NDArray[np.float64]


def read_yolo(path: Path, size: tuple[int, int], classes: int, more: Collection[int] = ()) -> npt.NDArray[Any]:
    """Draw the polygons of a YOLO segmentation file, small ones over large ones; 255 where there are none.

    Args:
        path: text file with a polygon a line: class id, then x and y of each corner from 0 to 1.
        size: height and width of the upright image.
        classes: number of classes, for the check of ids.
        more: further ids below 255 that may occur.

    Returns:
        Class ids [H, W] uint8.

    Raises:
        UserError: the file is not readable, or a line is not a polygon of a known class.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the label {path}: {error}") from error
    polygons = [_polygon(line, path, number, classes, more) for number, line in enumerate(lines, 1) if line.strip()]
    label = np.full(size, IGNORE, dtype=np.uint8)
    for class_id, corners in sorted(polygons, key=lambda polygon: -_area(polygon[1])):
        _fill(label, corners * (size[1], size[0]), class_id)
    return label


def _polygon(line: str, path: Path, number: int, classes: int, more: Collection[int]) -> tuple[int, Polygon]:
    where = f"{path}, line {number}"
    try:
        first, *rest = line.split()
        class_id, values = int(first), np.array([float(part) for part in rest])
    except ValueError as error:
        raise UserError(
            f"{where}: expected a class id and the corners x y x y … of a polygon, got {line[:60]!r}"
        ) from error
    if len(values) == 4:
        raise UserError(f"{where} has 4 numbers, a box; segmentation needs polygons of at least 3 corners x y")
    if len(values) < 6 or len(values) % 2 or not ((values >= 0) & (values <= 1)).all():
        raise UserError(f"{where}: expected at least 3 corners x y, each from 0 to 1, got {len(values)} numbers")
    if not 0 <= class_id < classes and class_id not in more:
        raise UserError(f"{where}: the class id {class_id} is outside the {classes} classes 0…{classes - 1}")
    return class_id, values.reshape(-1, 2)


def _fill(label: npt.NDArray[np.uint8], corners: Polygon, value: int) -> None:
    """Set the pixels whose centres lie in a polygon of pixel coordinates, by the even-odd rule."""
    (x, y), (next_x, next_y) = corners.T, np.roll(corners, -1, axis=0).T
    first, last = np.ceil(np.array([y.min(), y.max()]) - 0.5).astype(int)
    for row in range(max(first, 0), min(last, len(label))):
        centre = row + 0.5
        cut = (y <= centre) != (next_y <= centre)
        slope = (next_x[cut] - x[cut]) / (next_y[cut] - y[cut])
        edges = np.ceil(np.sort(x[cut] + (centre - y[cut]) * slope) - 0.5).astype(int)
        for start, end in edges.reshape(-1, 2).tolist():
            label[row, start:end] = value


def _area(corners: Polygon) -> float:
    x, y = corners.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
