"""The canvas of the drawn road scenes: shapes given in metres land in picture, labels and depth at once.

The world has x to the right, y up from the ground and z ahead, all in metres; the camera stands at (0, CAMERA_HEIGHT, 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from transkd.data.classes import CITYSCAPES

__all__ = [
    "CAMERA_HEIGHT",
    "IGNORE",
    "LABELS",
    "Array",
    "Canvas",
    "Color",
    "Face",
    "circle",
    "limb",
    "pick",
    "tint",
    "upright",
]

Array = npt.NDArray[Any]
Color = tuple[int, int, int]

CAMERA_HEIGHT = 1.4
IGNORE = 255
LABELS = {name: index for index, name in enumerate(CITYSCAPES.names)} | {"ignore": IGNORE}

FAR = 400.0  # the depth of the sky
NEAREST = 0.8  # what reaches behind the camera is pulled to this depth
SUBPIXEL_BITS = 4


@dataclass
class Canvas:
    """A picture in the making.

    Attributes:
        image: RGB colours, uint8 [H, W, 3].
        label: train ids, uint8 [H, W].
        depth: metres, float32 [H, W].
        light: what shines by itself, uint8 [H, W, 3].
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
        """An empty sky under a randomly pointed camera."""
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
        """Metres [..., 3] to pixel columns and rows [..., 2]."""
        x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        z = np.maximum(z, NEAREST)
        columns = self.center + self.focal * (x / z + self.bend * z / 2)
        rows = self.horizon + self.focal * (CAMERA_HEIGHT - y) / z
        return np.stack([columns, rows], -1)

    def paint(self, points: Array, color: Color | None, name: str | None = None, *, shines: bool = False) -> None:
        """Fill flat polygons [..., P, 3].

        Args:
            points: corners in metres; all polygons of one call share the colour.
            color: RGB, or None to leave the picture as it is and only label it.
            name: class of a new object, which then hides what lies behind; None for a detail on an object.
            shines: whether the colour is still seen at night.
        """
        points = np.asarray(points, np.float64)
        points = points.reshape(-1, *points.shape[-2:])
        pixels = list(np.round(self.project(points) * 2**SUBPIXEL_BITS).clip(-1e7, 1e7).astype(np.int32))
        if color is not None:
            cv2.fillPoly(self.image, pixels, color, cv2.LINE_AA, SUBPIXEL_BITS)
        if name is not None:
            cv2.fillPoly(self.label, pixels, LABELS[name], cv2.LINE_8, SUBPIXEL_BITS)
            cv2.fillPoly(self.light, pixels, (0, 0, 0), cv2.LINE_8, SUBPIXEL_BITS)
            self._fill_depth(points, pixels)
        if shines and color is not None:
            cv2.fillPoly(self.light, pixels, color, cv2.LINE_AA, SUBPIXEL_BITS)

    def shadow(self, points: Array, strength: float = 0.5) -> None:
        """Darken one polygon [P, 3], softly."""
        pixels = self.project(points)
        blur = max(1, int(0.02 * (np.ptp(pixels[:, 0]) + np.ptp(pixels[:, 1]))))
        window = self._window(pixels, margin=2 * blur)
        patch = self.image[window]
        if patch.size == 0:
            return
        mask = np.zeros(patch.shape[:2], np.float32)
        origin = [window[1].start, window[0].start]
        cv2.fillPoly(mask, [np.round(pixels - origin).clip(-1e5, 1e5).astype(np.int32)], strength)
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
        """Paint the sides of a box that the camera sees, and return them by name.

        Args:
            place: x and z of the centre.
            size: length (along the heading), width and height.
            color: RGB; each side is shaded by its direction.
            name: class of the object.
            bottom: height of the underside over the ground.
            yaw: heading in radians; 0 looks away from the camera, π/2 to the right.
            taper: how far the top is drawn in at the front, the rear and either side.
        """
        faces = _box_faces(place, size, bottom, yaw, taper)
        seen = {side: face for side, face in faces.items() if _turns_to_camera(self.project(face.corners))}
        for side, face in seen.items():
            self.paint(face.corners, tint(color, _BRIGHTNESS[side]), name)
        return seen

    def _fill_depth(self, points: Array, pixels: list[Array]) -> None:
        if len(pixels) > 1 or np.ptp(points[..., 2]) < 1.0:
            cv2.fillPoly(self.depth, pixels, float(max(points[..., 2].mean(), NEAREST)), cv2.LINE_8, SUBPIXEL_BITS)
            return
        window = self._window(pixels[0] / 2**SUBPIXEL_BITS)
        depth = self.depth[window]
        if depth.size == 0:
            return
        origin = np.array([window[1].start, window[0].start])
        mask = np.zeros(depth.shape, np.uint8)
        cv2.fillPoly(mask, [pixels[0] - origin.astype(np.int32) * 2**SUBPIXEL_BITS], 1, cv2.LINE_8, SUBPIXEL_BITS)
        np.copyto(depth, self._plane_depth(points[0], origin, depth.shape), where=mask.astype(bool))

    def _plane_depth(self, points: Array, origin: Array, shape: tuple[int, ...]) -> Array:
        """Depth of the plane through a polygon along the ray of every pixel of a window."""
        bent = points - [0.0, CAMERA_HEIGHT, 0.0]
        bent[:, 0] += self.bend * bent[:, 2] ** 2 / 2
        normal = np.cross(bent[1] - bent[0], bent[2] - bent[0])
        columns = (np.arange(shape[1]) + origin[0] - self.center) / self.focal
        rows = (self.horizon - np.arange(shape[0]) - origin[1]) / self.focal
        along_ray = normal[0] * columns[None] + normal[1] * rows[:, None] + normal[2]
        near, far = max(points[:, 2].min(), NEAREST), max(points[:, 2].max(), NEAREST)
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = np.nan_to_num(normal @ bent[0] / along_ray, nan=near)
        return depth.clip(near, far).astype(np.float32)

    def _window(self, pixels: Array, margin: int = 1) -> tuple[slice, slice]:
        height, width = self.label.shape
        left, top = np.floor(pixels.min(0)).astype(int) - margin
        right, bottom = np.ceil(pixels.max(0)).astype(int) + margin + 1
        return (
            slice(int(np.clip(top, 0, height)), int(np.clip(bottom, 0, height))),
            slice(int(np.clip(left, 0, width)), int(np.clip(right, 0, width))),
        )


class Face(NamedTuple):
    """One side of a box: corners [4, 3] as bottom left, bottom right, top right, top left, seen from outside."""

    corners: Array

    def patch(self, left: float, right: float, bottom: float, top: float) -> Array:
        """The part between fractions of the width and the height, as corners [4, 3]."""
        return self._at(np.array([[left, bottom], [right, bottom], [right, top], [left, top]]))

    def grid(self, columns: int, rows: int, bottom: float, top: float, fill: tuple[float, float]) -> Array:
        """Evenly spaced patches [columns·rows, 4, 3] between two heights, each filling a share of its cell."""
        cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 1, 2)
        spread = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array(fill) / 2
        unit = (cells + 0.5 + spread) / np.array([columns, rows])
        return self._at(unit * [1, top - bottom] + [0, bottom])

    def disc(self, across: float, height: float, radius: float) -> Array:
        """A disc [P, 3] on the face; centre and radius in metres from the bottom left corner."""
        right = self.corners[1] - self.corners[0]
        right = right / np.linalg.norm(right)
        angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)[:, None]
        up = np.array([0.0, 1.0, 0.0])
        middle = np.array([self.corners[0][0], 0.0, self.corners[0][2]]) + across * right + height * up
        return np.asarray(middle + radius * (np.cos(angles) * right + np.sin(angles) * up))

    @property
    def length(self) -> float:
        """Metres along the bottom edge."""
        return float(np.linalg.norm(self.corners[1] - self.corners[0]))

    def _at(self, unit: Array) -> Array:
        u, v = unit[..., :1], unit[..., 1:]
        a, b, c, d = self.corners
        return np.asarray((a + u * (b - a)) * (1 - v) + (d + u * (c - d)) * v)


_BRIGHTNESS = {"front": 0.9, "rear": 0.9, "left": 0.75, "right": 1.0, "top": 1.15}


def _box_faces(
    place: tuple[float, float],
    size: tuple[float, float, float],
    bottom: float,
    yaw: float,
    taper: tuple[float, float, float],
) -> dict[str, Face]:
    length, width, height = size
    front, rear, side = taper

    def corner(ahead: int, across: int, up: int) -> list[float]:
        a = ahead * length / 2 - up * (front if ahead > 0 else -rear)
        r = across * (width / 2 - up * side)
        x = place[0] + r * np.cos(yaw) + a * np.sin(yaw)
        z = place[1] + a * np.cos(yaw) - r * np.sin(yaw)
        return [x, bottom + up * height, z]

    edges = {
        "rear": ((-1, -1), (-1, 1)),
        "front": ((1, 1), (1, -1)),
        "right": ((-1, 1), (1, 1)),
        "left": ((1, -1), (-1, -1)),
    }
    faces = {
        name: Face(np.array([corner(*a, 0), corner(*b, 0), corner(*b, 1), corner(*a, 1)]))
        for name, (a, b) in edges.items()
    }
    faces["top"] = Face(np.array([corner(-1, -1, 1), corner(-1, 1, 1), corner(1, 1, 1), corner(1, -1, 1)]))
    return faces


def _turns_to_camera(pixels: Array) -> bool:
    x, y = pixels.T
    return bool(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) < 0)


def circle(center: Sequence[float], radius: float | tuple[float, float], corners: int = 14) -> Array:
    """An ellipse as a polygon [corners, 2] in its own plane; a radius across and a radius up, or one for both."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.asarray(center) + np.stack([np.cos(angles), np.sin(angles)], -1) * radius


def limb(start: Sequence[float], end: Sequence[float], thickness: float) -> Array:
    """A straight bar [4, 2] between two points of a plane."""
    a, b = np.asarray(start, float), np.asarray(end, float)
    along = (b - a) / max(float(np.linalg.norm(b - a)), 1e-6)
    across = np.array([-along[1], along[0]]) * thickness / 2
    return np.stack([a - across, b - across, b + across, a + across])


def upright(place: tuple[float, float], shape: Array, yaw: float = np.pi / 2) -> Array:
    """Stand a flat shape [..., P, 2] of (along, up) metres on the ground, its first axis pointing along the yaw."""
    shape = np.asarray(shape, np.float64)
    along, up = shape[..., 0], shape[..., 1]
    return np.stack([place[0] + along * np.sin(yaw), up, place[1] + along * np.cos(yaw)], -1)


def tint(color: Color, factor: float) -> Color:
    """A colour made darker or lighter."""
    r, g, b = (int(min(max(channel * factor, 0), 255)) for channel in color)
    return r, g, b


def pick(rng: np.random.Generator, colors: Sequence[Color], spread: float = 0.15) -> Color:
    """One of the colours at a slightly random brightness."""
    return tint(colors[int(rng.integers(len(colors)))], 1 + rng.uniform(-spread, spread))
