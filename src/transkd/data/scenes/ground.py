"""Plan of a synthetic street, and its ground: road, markings, sidewalks and grass."""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from transkd.data.scenes.canvas import CAMERA_HEIGHT, LABELS, Array, Canvas, pick

__all__ = ["PARKING", "Street", "Verge", "draw_ground", "plan_street"]

LANE = 3.3
PARKING = 2.2
TRACK = 3.4
PAVING = [(138, 134, 130), (150, 138, 126), (124, 124, 126), (146, 128, 118)]
GRASS = [(96, 108, 58), (116, 112, 62), (112, 92, 68), (84, 98, 52)]


@dataclass(frozen=True)
class Verge:
    """Strips beside the road on one side.

    Attributes:
        side: −1 left, 1 right.
        curb: distance of the road's edge from the camera's line, in metres.
        strips: label name and width of each strip of ground, from the road outwards.
        parked: whether cars are parked at the curb.
    """

    side: int
    curb: float
    strips: tuple[tuple[str, float], ...]
    parked: bool

    @property
    def front(self) -> float:
        """Distance |x| of the houses."""
        return self.curb + sum(width for _, width in self.strips)

    def middle_of(self, name: str) -> float | None:
        """Signed x of the middle of a strip, None if there is no such strip."""
        x = self.curb
        for strip, width in self.strips:
            if strip == name:
                return self.side * (x + width / 2)
            x += width
        return None


@dataclass(frozen=True)
class Street:
    """Plan of a street; the camera is in the lane around x = 0.

    Attributes:
        oncoming: x of the lanes of oncoming traffic.
        track: x of the tram's track, if there is one.
        verges: left and right.
        crossing: depth of a zebra crossing, if there is one.
    """

    oncoming: tuple[float, ...]
    track: float | None
    verges: tuple[Verge, Verge]
    crossing: float | None


def plan_street(rng: np.random.Generator) -> Street:
    """Sample the lanes, the strips beside the road and the crossing."""
    oncoming: list[float] = []
    track, x = None, -LANE / 2
    with_track, track_first = rng.random() < 0.6, rng.random() < 0.6
    if with_track and track_first:
        track, x = x - TRACK / 2, x - TRACK
    for _ in range(int(rng.integers(1, 3))):
        oncoming.append(x - LANE / 2)
        x -= LANE
    if with_track and not track_first:
        track, x = x - TRACK / 2, x - TRACK
    left, right = _plan_verge(-1, -x, rng), _plan_verge(1, LANE / 2 + 0.3, rng)
    crossing = rng.uniform(9, 20) if rng.random() < 0.6 else None
    return Street(tuple(oncoming), track, (left, right), crossing)


def _plan_verge(side: int, curb: float, rng: np.random.Generator) -> Verge:
    parked = bool(rng.random() < 0.45)
    walk, grass = ("sidewalk", rng.uniform(1.8, 3.2)), ("terrain", rng.uniform(1.2, 4.0))
    choices = ((walk,), (walk, grass), (grass, walk), (walk, grass))
    return Verge(side, curb + PARKING * parked, choices[int(rng.integers(4))], parked)


class Ground(NamedTuple):
    """Ground point of each pixel below the horizon.

    Attributes:
        x: metres to the right [h, w].
        z: metres ahead [h, 1].
        pixel: metres that a pixel covers across [h, 1].
    """

    x: Array
    z: Array
    pixel: Array


def draw_ground(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Colour and label every pixel below the horizon by its ground point."""
    height, width = canvas.label.shape
    top = int(np.ceil(canvas.horizon + 0.5))
    rows = np.arange(top, height, dtype=np.float32)[:, None]
    z = canvas.focal * CAMERA_HEIGHT / (rows - canvas.horizon)
    x = (np.arange(width, dtype=np.float32)[None] - canvas.center) * z / canvas.focal - canvas.bend * z**2 / 2
    ground = Ground(x, z, z / canvas.focal)
    edges, names, colors = _strips(street, rng)
    strip = np.searchsorted(np.array(edges, np.float32), x)
    label = np.array([LABELS[name] for name in names], np.uint8)[strip]
    color = np.array(colors, np.float32)[strip] * _texture(ground, rng)
    _paint_slabs(color, label, ground)
    white = rng.uniform(185, 225)
    _paint_lane_lines(color, street, ground, white)
    for verge in street.verges:
        _paint_curb(color, verge, ground, white)
    if street.track is not None:
        _paint_rails(color, street.track, ground)
    if street.crossing is not None:
        _paint_crossing(color, street, street.crossing, ground, white)
    canvas.label[top:], canvas.depth[top:] = label, np.minimum(z, 300)
    canvas.image[top:] = color.clip(0, 255)


def _strips(street: Street, rng: np.random.Generator) -> tuple[list[float], list[str], list[Array]]:
    """Return the edges between the strips from left to right, and the name and colour of each strip."""
    tone = rng.uniform(66, 108)
    look = {
        "road": tone * np.array([1.0, 1.0, 1.02]),
        "sidewalk": np.array(pick(rng, PAVING), float),
        "terrain": np.array(pick(rng, GRASS), float),
    }
    left, right = street.verges
    edges, names = [-left.curb, right.curb], ["road"]
    colors = [look["road"]]
    for verge in street.verges:
        x = verge.curb
        for name, width in (*verge.strips, ("terrain", 0.0)):  # gardens beyond the last strip
            x += width
            at = 0 if verge.side < 0 else len(names)
            names.insert(at, name)
            colors.insert(at, look[name])
            if width:
                edges.append(verge.side * x)
    return sorted(edges), names, colors


def _texture(ground: Ground, rng: np.random.Generator) -> Array:
    """Texture factor [h, w, 1] in ground coordinates: grain, patches and worn tracks."""
    x, z, pixel = ground
    tile = rng.standard_normal((256, 256), np.float32)
    coarse = cv2.GaussianBlur(tile, (0, 0), 6) * 14
    sharp = np.clip(1 / (120 * pixel), 0.15, 1)  # fade grain finer than a pixel
    grain = tile[(z * 22).astype(int) & 255, (x * 22).astype(int) & 255]
    patches = coarse[(z * 9).astype(int) & 255, (x * 9).astype(int) & 255]
    worn = 0.05 * np.cos(x * 2 * np.pi / (LANE / 2))
    return np.asarray(1 + 0.07 * grain * sharp + 0.06 * patches + worn)[..., None]


def _paint_slabs(color: Array, label: Array, ground: Ground) -> None:
    """Draw the joints between sidewalk slabs, faded where they are thinner than a pixel."""
    joint = ((np.abs(ground.x) % 0.9 < 0.05) | (ground.z % 0.9 < 0.05)) & (label == LABELS["sidewalk"])
    color *= np.where(joint, 0.78 + 0.2 * np.clip(24 * ground.pixel, 0, 1), 1)[..., None]


def _paint_lane_lines(color: Array, street: Street, ground: Ground, white: float) -> None:
    x, z, pixel = ground
    half = np.maximum(0.08, 0.5 * pixel)  # at least one pixel wide
    lines = (np.abs(x + LANE / 2) < half) & (z % 9 < 6)
    for lane in street.oncoming:
        lines |= (np.abs(x - lane + LANE / 2) < half) & (z % 6 < 3)
    color[lines & (x > 0.5 - street.verges[0].curb) & (z < 70)] = white


def _paint_curb(color: Array, verge: Verge, ground: Ground, white: float) -> None:
    """Draw the curb, the gutter, and the line beside parked cars."""
    beyond = verge.side * ground.x - verge.curb
    if verge.parked:
        color[np.abs(beyond + PARKING) < np.maximum(0.08, 0.5 * ground.pixel)] = white * 0.92
    color[(beyond > 0) & (beyond < np.maximum(0.16, 0.8 * ground.pixel))] = (168, 166, 160)
    color[(beyond > -0.22) & (beyond <= 0)] *= 0.8


def _paint_rails(color: Array, track: float, ground: Ground) -> None:
    for rail in (track - 0.72, track + 0.72):
        color[np.abs(ground.x - rail) < np.maximum(0.06, 0.5 * ground.pixel)] = (48, 46, 48)


def _paint_crossing(color: Array, street: Street, crossing: float, ground: Ground, white: float) -> None:
    """Draw zebra stripes and the stop line."""
    x, ahead = ground.x, ground.z - crossing
    left, right = street.verges
    road = (x > 0.2 - left.curb) & (x < right.curb - 0.2)
    color[(ahead > 0) & (ahead < 3) & (x % 1 < 0.5) & road] = white
    color[(ahead > -1.6) & (ahead < -1.2) & (x > -LANE / 2) & road] = white
