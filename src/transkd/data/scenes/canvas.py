"""Canvas of the synthetic road scenes: rasterises shapes given in metres into image, labels and depth.

World coordinates in metres: x to the right, y up from the ground, z ahead; the camera is at (0, CAMERA_HEIGHT, 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, hypot, sin
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from transkd.data.classes import CITYSCAPES
from transkd.outputs import IGNORE

__all__ = [
    "CAMERA_HEIGHT",
    "LABELS",
    "Array",
    "Canvas",
    "Color",
    "Face",
    "circle",
    "ground_ellipse",
    "limb",
    "pick",
    "tint",
    "upright",
]

Array = npt.NDArray[Any]
Color = tuple[int, int, int]

CAMERA_HEIGHT = 1.4
LABELS = {name: index for index, name in enumerate(CITYSCAPES.names)} | {"ignore": IGNORE}

FAR = 400.0  # depth of the sky
NEAREST = 0.8  # depth to which points closer to or behind the camera are moved
SUBPIXEL_BITS = 4


@dataclass
class Canvas:
    """Image, labels, depth and light sources of a scene, with the camera's parameters.

    Attributes:
        image: RGB colours, uint8 [H, W, 3].
        label: train ids, uint8 [H, W].
        depth: metres, float32 [H, W].
        light: colours of light sources, uint8 [H, W, 3].
        horizon: the row at which the ground ends.
        center: the column towards which the street runs.
        focal: focal length in pixels.
        bend: curvature of the street in 1/m.
    """

    image: Array
    label: Array
    depth: Array
    light: Array
    horizon: float
    center: float
    focal: float
    bend: float

    @classmethod
    def blank(cls, height: int, width: int, rng: np.random.Generator) -> "Canvas":
        """Create a canvas of sky with random camera parameters."""
        return cls(
            image=np.zeros((height, width, 3), np.uint8),
            label=np.full((height, width), LABELS["sky"], np.uint8),
            depth=np.full((height, width), FAR, np.float32),
            light=np.zeros((height, width, 3), np.uint8),
            horizon=height * rng.uniform(0.41, 0.49),
            center=width * rng.uniform(0.4, 0.6),
            focal=1.13 * (height * width) ** 0.5,
            bend=rng.uniform(-0.0025, 0.0025),
        )

    def project(self, points: Array) -> Array:
        """Project points in metres [..., 3] to pixel columns and rows [..., 2]."""
        points = np.asarray(points, np.float64)
        z = np.maximum(points[..., 2], NEAREST)
        pixels = np.empty((*points.shape[:-1], 2))
        pixels[..., 0] = self.center + self.focal * (points[..., 0] / z + self.bend / 2 * z)
        pixels[..., 1] = self.horizon + self.focal * (CAMERA_HEIGHT - points[..., 1]) / z
        return pixels

    def paint(self, points: Array, color: Color | None, name: str | None = None, *, shines: bool = False) -> None:
        """Fill flat polygons [..., P, 3].

        Args:
            points: corners in metres; all polygons of one call share the colour.
            color: RGB, or None to write only the label.
            name: class of a new object, which occludes what is behind it; None for a detail on an object.
            shines: whether the polygon is a light source, visible at night.
        """
        points = np.asarray(points, np.float64)
        points = points.reshape(-1, *points.shape[-2:])
        pixels = _fixed_point(self.project(points))
        window = self._window(pixels)
        if window is None:
            return
        corners = list(pixels)
        if color is not None:
            cv2.fillPoly(self.image, corners, color, cv2.LINE_AA, SUBPIXEL_BITS)
        if name is not None:
            cv2.fillPoly(self.label, corners, LABELS[name], cv2.LINE_8, SUBPIXEL_BITS)
            cv2.fillPoly(self.light, corners, (0, 0, 0), cv2.LINE_8, SUBPIXEL_BITS)
            self._fill_depth(points, corners, window)
        if shines and color is not None:
            cv2.fillPoly(self.light, corners, color, cv2.LINE_AA, SUBPIXEL_BITS)

    def shadow(self, points: Array, strength: float = 0.5) -> None:
        """Darken a polygon [P, 3] with blurred edges."""
        pixels = _fixed_point(self.project(points))
        extent = np.ptp(pixels, 0) / 2**SUBPIXEL_BITS
        blur = max(1, int(0.02 * extent.sum()))
        window = self._window(pixels, margin=2 * blur)
        if window is None:
            return
        patch = self.image[window]
        mask = np.zeros(patch.shape[:2], np.float32)
        cv2.fillPoly(mask, [_shifted(pixels, window)], strength, cv2.LINE_8, SUBPIXEL_BITS)
        patch[:] = patch * (1 - cv2.blur(mask, (2 * blur + 1, 2 * blur + 1)))[..., None]

    def box(
        self,
        place: tuple[float, float],
        size: tuple[float, float, float],
        color: Color,
        name: str,
        *,
        bottom: float = 0.0,
        yaw: float = 0.0,
        taper: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> dict[str, "Face"]:
        """Paint the visible sides of a box and return them by name.

        Args:
            place: x and z of the centre.
            size: length (along the heading), width and height.
            color: RGB; each side is shaded by its direction.
            name: class of the object.
            bottom: height of the underside over the ground.
            yaw: heading in radians; 0 looks away from the camera, π/2 to the right.
            taper: how far the top is drawn in at the front, the rear and either side.
        """
        corners = _box_corners(place, size, bottom, yaw, taper)
        pixels = self.project(corners).tolist()
        seen = {}
        for side, at in _SIDES.items():
            outline = [pixels[index] for index in at]
            if _turns_to_camera(*outline) and self._in_sight(outline):
                seen[side] = Face(corners.take(at, 0))
        for side, face in seen.items():
            self.paint(face.corners, tint(color, _BRIGHTNESS[side]), name)
        return seen

    def _fill_depth(self, points: Array, corners: list[Array], window: tuple[slice, slice]) -> None:
        near, far = max(points[..., 2].min(), NEAREST), max(points[..., 2].max(), NEAREST)
        if len(corners) > 1 or far < 1.15 * near:
            cv2.fillPoly(self.depth, corners, float(near + far) / 2, cv2.LINE_8, SUBPIXEL_BITS)
            return
        depth = self.depth[window]
        mask = np.zeros(depth.shape, np.uint8)
        cv2.fillPoly(mask, [_shifted(corners[0], window)], 1, cv2.LINE_8, SUBPIXEL_BITS)
        plane = self._plane_depth(points[0], window).clip(near, far)
        np.copyto(depth, plane.astype(np.float32), where=mask.astype(bool))

    def _plane_depth(self, points: Array, window: tuple[slice, slice]) -> Array:
        """Depth of the polygon's plane at each pixel of a window."""
        bent = points[:3] - [0.0, CAMERA_HEIGHT, 0.0]
        bent[:, 0] += self.bend * bent[:, 2] ** 2 / 2
        normal = np.cross(bent[1] - bent[0], bent[2] - bent[0])
        columns = (np.arange(window[1].start, window[1].stop) - self.center) / self.focal
        rows = (self.horizon - np.arange(window[0].start, window[0].stop)) / self.focal
        along_ray = normal[0] * columns[None] + normal[1] * rows[:, None] + normal[2]
        along_ray[np.abs(along_ray) < 1e-9] = 1e-9
        return np.asarray(normal @ bent[0] / along_ray)

    def _in_sight(self, outline: list[list[float]]) -> bool:
        columns = [column for column, _ in outline]
        return max(columns) >= 0 and min(columns) < self.label.shape[1]

    def _window(self, pixels: Array, margin: int = 1) -> tuple[slice, slice] | None:
        """Bounding window of polygons (fixed-point pixels) in the image; None if they are outside of it."""
        height, width = self.label.shape
        left, top, across, down = cv2.boundingRect(pixels.reshape(-1, 2))
        one = 2**SUBPIXEL_BITS
        columns = slice(max(left // one - margin, 0), min((left + across) // one + margin + 1, width))
        rows = slice(max(top // one - margin, 0), min((top + down) // one + margin + 1, height))
        return (rows, columns) if columns.start < columns.stop and rows.start < rows.stop else None


class Face(NamedTuple):
    """Side of a box: corners [4, 3] from bottom left to top left, counter-clockwise seen from outside."""

    corners: Array

    def patch(self, left: float, right: float, bottom: float, top: float) -> Array:
        """Corners [4, 3] of the part between fractions of the width and the height."""
        return self._at(np.array([[left, bottom], [right, bottom], [right, top], [left, top]]))

    def grid(self, columns: int, rows: int, bottom: float, top: float, fill: tuple[float, float]) -> Array:
        """Grid of patches [columns·rows, 4, 3] between two heights; each fills a fraction of its cell."""
        cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 1, 2)
        spread = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array(fill) / 2
        unit = (cells + 0.5 + spread) / np.array([columns, rows])
        return self._at(unit * [1, top - bottom] + [0, bottom])

    def disc(self, across: float, height: float, radius: float) -> Array:
        """Disc [P, 3] on the face; centre in metres from the bottom left corner."""
        right = self.corners[1] - self.corners[0]
        right = right / np.linalg.norm(right)
        up = np.array([0.0, 1.0, 0.0])
        middle = np.array([self.corners[0][0], 0.0, self.corners[0][2]]) + across * right + height * up
        return np.asarray(middle + _unit_circle(16) * radius @ np.stack([right, up]))

    @property
    def length(self) -> float:
        """Length of the bottom edge in metres."""
        return float(np.linalg.norm(self.corners[1] - self.corners[0]))

    def _at(self, unit: Array) -> Array:
        weights = np.concatenate([unit, unit[..., :1] * unit[..., 1:]], -1)
        return np.asarray(weights @ (_BILINEAR @ self.corners) + self.corners[0])


_BILINEAR = np.array([[-1, 1, 0, 0], [-1, 0, 0, 1], [1, -1, 1, -1]])
"""Matrix from the corners to the coefficients of u, v and u·v in bilinear interpolation."""

_BRIGHTNESS = {"front": 0.9, "rear": 0.9, "left": 0.75, "right": 1.0, "top": 1.15}


_SIDES = {
    "rear": (0, 1, 5, 4),
    "front": (2, 3, 7, 6),
    "right": (1, 2, 6, 5),
    "left": (3, 0, 4, 7),
    "top": (4, 5, 6, 7),
}
"""Corner indices of each side: rear left, rear right, front right, front left; 0 to 3 at the bottom, 4 to 7 on top."""


def _box_corners(
    place: tuple[float, float],
    size: tuple[float, float, float],
    bottom: float,
    yaw: float,
    taper: tuple[float, float, float],
) -> Array:
    (length, width, height), (front, rear, side) = size, taper
    back, ahead, half, narrow = -length / 2, length / 2, width / 2, width / 2 - side
    along = np.array([back, back, ahead, ahead, back + rear, back + rear, ahead - front, ahead - front])
    across = np.array([-half, half, half, -half, -narrow, narrow, narrow, -narrow])
    up = np.repeat([bottom, bottom + height], 4)
    x = place[0] + across * cos(yaw) + along * sin(yaw)
    z = place[1] + along * cos(yaw) - across * sin(yaw)
    return np.stack([x, up, z], -1)


def _turns_to_camera(a: list[float], b: list[float], c: list[float], d: list[float]) -> bool:
    """Whether the projected corners of a quad have the orientation of a side seen from outside."""
    return (c[0] - a[0]) * (d[1] - b[1]) < (d[0] - b[0]) * (c[1] - a[1])


def _fixed_point(pixels: Array) -> Array:
    """Convert pixels to OpenCV's fixed-point format with SUBPIXEL_BITS fractional bits."""
    return np.asarray(np.rint(pixels * 2**SUBPIXEL_BITS).astype(np.int32))


def _shifted(corners: Array, window: tuple[slice, slice]) -> Array:
    return np.asarray(corners - np.array([window[1].start, window[0].start], np.int32) * 2**SUBPIXEL_BITS)


def circle(center: Sequence[float], radius: float | tuple[float, float], corners: int = 14) -> Array:
    """Ellipse as a polygon [corners, 2]; `radius` is (horizontal, vertical) or one number for both."""
    return np.asarray(_unit_circle(corners) * radius + np.asarray(center))


@lru_cache
def _unit_circle(corners: int) -> Array:
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def limb(start: Sequence[float], end: Sequence[float], thickness: float) -> Array:
    """Straight bar [4, 2] between two points of a plane."""
    (ax, ay), (bx, by) = start, end
    factor = thickness / 2 / max(hypot(bx - ax, by - ay), 1e-6)
    x, y = (ay - by) * factor, (bx - ax) * factor
    return np.array([[ax - x, ay - y], [bx - x, by - y], [bx + x, by + y], [ax + x, ay + y]])


def upright(place: tuple[float, float], shape: Array, yaw: float = np.pi / 2) -> Array:
    """Place a flat shape [..., P, 2] of (along, up) metres upright on the ground, its first axis along the yaw."""
    shape = np.asarray(shape, np.float64)
    turn = np.array([[sin(yaw), 0, cos(yaw)], [0, 1, 0]])
    return np.asarray(shape @ turn + [place[0], 0, place[1]])


def ground_ellipse(place: tuple[float, float], across: float, ahead: float) -> Array:
    """Ellipse [P, 3] on the ground with radii in metres."""
    ellipse = circle(place, (across, ahead))
    return np.stack([ellipse[:, 0], np.zeros(len(ellipse)), ellipse[:, 1]], -1)


def tint(color: Color, factor: float) -> Color:
    """Scale the brightness of a colour."""
    r, g, b = (int(min(max(channel * factor, 0), 255)) for channel in color)
    return r, g, b


def pick(rng: np.random.Generator, colors: Sequence[Color], spread: float = 0.15) -> Color:
    """Sample one of the colours, with a random brightness within ±spread."""
    return tint(colors[int(rng.integers(len(colors)))], 1 + rng.uniform(-spread, spread))
