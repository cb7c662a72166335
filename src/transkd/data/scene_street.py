"""The street of a drawn scene: its plan, the ground, and who and what is where."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from transkd.data.scene_canvas import CAMERA_HEIGHT, LABELS, Array, Canvas, pick
from transkd.data.scene_people import draw_person, draw_two_wheeler
from transkd.data.scene_roadside import (
    draw_building,
    draw_bush,
    draw_fence,
    draw_hedge,
    draw_sign,
    draw_street_lamp,
    draw_traffic_light,
    draw_tree,
    draw_wall,
)
from transkd.data.scene_vehicles import CAR_LENGTH, draw_bus, draw_car, draw_tram, draw_truck

__all__ = ["Street", "draw_ground", "draw_street", "plan_street"]

LANE = 3.3
PARKING = 2.2
TRACK = 3.4
STREET_END = 110.0
AWAY, TOWARDS = 0.0, np.pi  # headings

Thing = tuple[float, Callable[[], None]]
"""Something to draw: its depth, and the function that draws it."""


@dataclass(frozen=True)
class Verge:
    """What lies beside the road on one side.

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
        """Distance of the houses from the camera's line."""
        return self.curb + sum(width for _, width in self.strips)

    def middle_of(self, name: str) -> float | None:
        """Signed x in the middle of a strip, or None where there is none."""
        x = self.curb
        for strip, width in self.strips:
            if strip == name:
                return self.side * (x + width / 2)
            x += width
        return None


@dataclass(frozen=True)
class Street:
    """The plan of one street; the camera drives in the lane around x = 0.

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
    """Draw lots for the lanes, the strips beside the road and the crossing."""
    oncoming: list[float] = []
    track, x = None, -LANE / 2
    with_track, track_first = rng.random() < 0.5, rng.random() < 0.6
    if with_track and track_first:
        track, x = x - TRACK / 2, x - TRACK
    for _ in range(int(rng.integers(1, 3))):
        oncoming.append(x - LANE / 2)
        x -= LANE
    if with_track and not track_first:
        track, x = x - TRACK / 2, x - TRACK
    left, right = _plan_verge(-1, -x, rng), _plan_verge(1, LANE / 2 + 0.3, rng)
    crossing = rng.uniform(9, 22) if rng.random() < 0.5 else None
    return Street(tuple(oncoming), track, (left, right), crossing)


def _plan_verge(side: int, curb: float, rng: np.random.Generator) -> Verge:
    parked = bool(rng.random() < 0.45)
    walk, grass = ("sidewalk", rng.uniform(1.8, 3.2)), ("terrain", rng.uniform(1.2, 4.0))
    choices = ((walk,), (walk, grass), (grass, walk), (walk, grass))
    return Verge(side, curb + PARKING * parked, choices[int(rng.integers(4))], parked)


# --- the ground -------------------------------------------------------------------------------------------------


def draw_ground(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Road, markings, sidewalks and grass, evaluated at the point of the ground that each pixel sees."""
    height, width = canvas.label.shape
    top = int(np.ceil(canvas.horizon + 0.5))
    rows = np.arange(top, height, dtype=np.float32)[:, None]
    z = canvas.focal * CAMERA_HEIGHT / (rows - canvas.horizon)
    x = (np.arange(width, dtype=np.float32)[None] - canvas.center) * z / canvas.focal - canvas.bend * z**2 / 2
    edges, names, colors = _strips(street, rng)
    strip = np.searchsorted(np.array(edges, np.float32), x)
    label = np.array([LABELS[name] for name in names], np.uint8)[strip]
    color = np.array(colors, np.float32)[strip] * _ground_texture(x, z, canvas.focal, rng)
    _paint_slabs(color, label, x, z, canvas.focal)
    _paint_markings(color, street, x, z, canvas.focal, rng)
    canvas.label[top:], canvas.depth[top:] = label, np.minimum(z, 300)
    canvas.image[top:] = color.clip(0, 255)


def _strips(street: Street, rng: np.random.Generator) -> tuple[list[float], list[str], list[Array]]:
    """Edges between the strips from left to right, and the name and colour of each strip."""
    tone = rng.uniform(66, 108)
    grass = np.array(pick(rng, [(96, 108, 58), (116, 112, 62), (112, 92, 68), (84, 98, 52)]), float)
    look = {
        "road": tone * np.array([1.0, 1.0, 1.02]),
        "sidewalk": np.array(pick(rng, [(138, 134, 130), (150, 138, 126), (124, 124, 126), (146, 128, 118)]), float),
        "terrain": grass,
    }
    left, right = street.verges
    edges, names = [-left.curb, right.curb], ["road"]
    colors = [look["road"]]
    for verge in street.verges:
        x = verge.curb
        for name, width in (*verge.strips, ("terrain", 0.0)):  # beyond the last strip the garden starts
            x += width
            at = 0 if verge.side < 0 else len(names)
            names.insert(at, name)
            colors.insert(at, look[name])
            if width:
                edges.append(verge.side * x)
    return sorted(edges), names, colors


def _ground_texture(x: Array, z: Array, focal: float, rng: np.random.Generator) -> Array:
    """A factor [h, w, 1] that lies on the ground in perspective: grain, patches and worn tracks."""
    tile = rng.normal(0, 1, (256, 256)).astype(np.float32)
    coarse = cv2.GaussianBlur(tile, (0, 0), 6, borderType=cv2.BORDER_WRAP) * 14
    sharp = np.clip(focal / z / 120, 0.15, 1)  # grain finer than a pixel averages out
    grain = tile[(z * 22).astype(int) & 255, (x * 22).astype(int) & 255]
    patches = coarse[(z * 9).astype(int) & 255, (x * 9).astype(int) & 255]
    worn = 0.05 * np.cos(x * 2 * np.pi / (LANE / 2))
    return np.asarray(1 + 0.07 * grain * sharp + 0.06 * patches + worn)[..., None]


def _paint_slabs(color: Array, label: Array, x: Array, z: Array, focal: float) -> None:
    """Joints between the slabs of the sidewalk, and its curb."""
    blur = np.clip(z / focal * 24, 0, 1)
    joint = ((np.abs(x) % 0.9 < 0.05) | (z % 0.9 < 0.05)) & (label == LABELS["sidewalk"])
    color *= np.where(joint, 0.78 + 0.2 * blur, 1)[..., None]


def _paint_markings(
    color: Array, street: Street, x: Array, z: Array, focal: float, rng: np.random.Generator
) -> None:
    left, right = street.verges
    white = rng.uniform(185, 225)
    half = np.maximum(0.08, 0.5 * z / focal)  # at least a pixel wide
    inner = [-LANE / 2, *(lane - LANE / 2 for lane in street.oncoming)]
    dashed = np.zeros(x.shape, bool)
    for line in inner:
        dashed |= (np.abs(x - line) < half) & ((z % 6 < 3) if line != inner[0] else (z % 9 < 6))
    dashed &= (x > -left.curb + 0.5) & (z < 70)
    color[dashed] = white
    for verge in street.verges:
        distance = verge.side * x - verge.curb
        if verge.parked:
            color[np.abs(distance + PARKING) < half] = white * 0.92
        color[(distance > -0.02) & (distance < np.maximum(0.16, 0.8 * z / focal))] = (168, 166, 160)
        color[(distance > -0.22) & (distance <= -0.02)] *= 0.8
    if street.track is not None:
        for rail in (-0.72, 0.72):
            color[np.abs(x - street.track - rail) < np.maximum(0.06, 0.5 * z / focal)] = (48, 46, 48)
    if street.crossing is not None:
        ahead = z - street.crossing
        road = (x > -left.curb + 0.2) & (x < right.curb - 0.2)
        color[(ahead > 0) & (ahead < 3) & (x % 1 < 0.5) & road] = white
        color[(ahead > -1.6) & (ahead < -1.2) & (x > -LANE / 2) & road] = white


# --- what stands on it ------------------------------------------------------------------------------------------


def draw_street(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Everything above the ground, from far to near."""
    _draw_skyline(canvas, rng)
    frontage = [thing for verge in street.verges for thing in _frontage(canvas, verge, rng)]
    things = _traffic(canvas, street, rng) + _walkers(canvas, street, rng)
    for verge in street.verges:
        things += _furniture(canvas, street, verge, rng) + _parked(canvas, street, verge, rng)
    # Houses never stand before what is nearer to the middle of the street, whatever its depth.
    for layer in (frontage, things):
        for _, draw in sorted(layer, key=lambda thing: -thing[0]):
            draw()


def _draw_skyline(canvas: Canvas, rng: np.random.Generator) -> None:
    """Far houses and trees where the street ends."""
    x = -150.0
    while x < 150:
        width, green = rng.uniform(8, 24), rng.random() < 0.4
        height = rng.uniform(5, 9) if green else rng.uniform(7, 20)
        left, right, depth = x, x + width + 1, rng.uniform(140, 170)
        shape = np.array([[left, 0, depth], [right, 0, depth], [right, height, depth], [left, height, depth]])
        color = pick(rng, [(74, 86, 62)] if green else [(130, 126, 124), (112, 106, 104), (146, 134, 122)])
        canvas.paint(shape, color, "vegetation" if green else "building")
        x += width


def _frontage(canvas: Canvas, verge: Verge, rng: np.random.Generator) -> list[Thing]:
    """Houses, walls, fences and hedges along one side."""
    things: list[Thing] = []
    near = rng.uniform(2, 8)
    built_up = rng.uniform(0.3, 0.75)
    while near < STREET_END:
        length = rng.uniform(8, 18)
        draw = draw_building if rng.random() < built_up else None
        if draw is None:
            draw = (draw_wall, draw_fence, draw_hedge)[int(rng.choice(3, p=(0.42, 0.4, 0.18)))]
            things += _garden(canvas, verge, near, length, rng)
        things.append(_thing(near, draw, canvas, verge.side, verge.front, near, length - 0.02, rng=rng))
        near += length
    return things


def _garden(canvas: Canvas, verge: Verge, near: float, length: float, rng: np.random.Generator) -> list[Thing]:
    """Trees and at times a house behind a wall or fence."""
    things = []
    for _ in range(int(rng.integers(0, 4))):
        place = (verge.side * (verge.front + rng.uniform(2.5, 7)), near + rng.uniform(0.2, 0.95) * length)
        things.append(_thing(place[1], draw_tree, canvas, place, rng=rng))
    if rng.random() < 0.35:
        back = verge.front + rng.uniform(8, 14)
        things.append(_thing(near + length, draw_building, canvas, verge.side, back, near, length - 2, rng=rng))
    return things


def _traffic(canvas: Canvas, street: Street, rng: np.random.Generator) -> list[Thing]:
    """Vehicles in the lanes and on the track."""
    things: list[Thing] = []
    lanes = [(0.0, AWAY), *((x, TOWARDS) for x in street.oncoming)]
    for lane, heading in lanes:
        near = rng.uniform(7, 26) if heading == AWAY else rng.uniform(5, 24)
        while near < 75:
            kind, length = _VEHICLES[int(rng.choice(len(_VEHICLES), p=_VEHICLE_SHARES))]
            near = _clear_of_crossing(street, near, length)
            place = (lane + rng.uniform(-0.25, 0.25), near + length / 2)
            things.append(_thing(near, _draw_vehicle, canvas, kind, place, heading, rng=rng))
            near += length + rng.uniform(4, 22)
    if street.track is not None and rng.random() < 0.85:
        near = _clear_of_crossing(street, rng.uniform(7, 32), 16)
        heading = AWAY if rng.random() < 0.5 else TOWARDS
        things.append(_thing(near, draw_tram, canvas, (street.track, near + 8), heading, rng=rng))
    return things


_VEHICLES = (("car", CAR_LENGTH), ("truck", 8.0), ("bus", 11.0), ("motorcycle", 2.0), ("bicycle", 1.8))
_VEHICLE_SHARES = (0.42, 0.18, 0.16, 0.13, 0.11)


def _draw_vehicle(
    canvas: Canvas, kind: str, place: tuple[float, float], heading: float, rng: np.random.Generator
) -> None:
    if kind in ("motorcycle", "bicycle"):
        draw_two_wheeler(canvas, (place[0] + rng.uniform(0, 0.8), place[1]), heading, rng, motor=kind == "motorcycle")
    else:
        {"car": draw_car, "truck": draw_truck, "bus": draw_bus}[kind](canvas, place, heading, rng)


def _clear_of_crossing(street: Street, near: float, length: float) -> float:
    """Where a vehicle can stand without blocking the zebra crossing."""
    if street.crossing is not None and near < street.crossing + 4 and near + length > street.crossing - 1:
        return street.crossing + 4
    return near


def _walkers(canvas: Canvas, street: Street, rng: np.random.Generator) -> list[Thing]:
    """People on the sidewalks and on the crossing, two-wheelers beside and across the road."""
    things: list[Thing] = []
    for verge in street.verges:
        walk = verge.middle_of("sidewalk")
        if walk is None:
            continue
        for _ in range(int(rng.integers(2, 6))):
            place = (walk + rng.uniform(-0.8, 0.8), _spread_depth(rng, 7, 45))
            things.append(_thing(place[1], draw_person, canvas, place, rng=rng))
        if rng.random() < 0.65:
            things += _bike_stand(canvas, walk, rng)
    if street.crossing is not None:
        left, right = street.verges
        for _ in range(int(rng.integers(1, 5))):
            place = (rng.uniform(-left.curb, right.curb), street.crossing + rng.uniform(0.4, 2.6))
            if rng.random() < 0.65:
                things.append(_thing(place[1], draw_person, canvas, place, rng=rng))
            else:
                yaw, motor = float(rng.choice([-1, 1])) * np.pi / 2, bool(rng.random() < 0.4)
                things.append(_thing(place[1], draw_two_wheeler, canvas, place, yaw, motor=motor, rng=rng))
    return things


def _bike_stand(canvas: Canvas, walk: float, rng: np.random.Generator) -> list[Thing]:
    """A few bicycles or motorcycles left on the sidewalk."""
    motor, depth = bool(rng.random() < 0.5), _spread_depth(rng, 8, 26)
    yaw = float(np.sign(-walk)) * np.pi / 2 + rng.uniform(-0.4, 0.4)
    return [
        _thing(
            depth + 1.1 * index,
            draw_two_wheeler,
            canvas,
            (walk + rng.uniform(-0.2, 0.2), depth + 1.1 * index),
            yaw,
            motor=motor,
            ridden=False,
            rng=rng,
        )
        for index in range(int(rng.integers(1, 4)))
    ]


def _furniture(canvas: Canvas, street: Street, verge: Verge, rng: np.random.Generator) -> list[Thing]:
    """Lamps, signs, traffic lights, trees and bushes of one side."""
    things: list[Thing] = []
    edge = verge.side * (verge.curb + 0.4)
    for depth in np.arange(rng.uniform(9, 18), 90, rng.uniform(16, 26)):
        things.append(_thing(depth, draw_street_lamp, canvas, (edge, float(depth)), rng=rng))
    for _ in range(int(rng.integers(1, 4))):
        place = (edge + 0.2 * verge.side, _spread_depth(rng, 8, 36))
        things.append(_thing(place[1], draw_sign, canvas, place, rng=rng))
    lights_at = street.crossing - 0.8 if street.crossing is not None else _spread_depth(rng, 14, 40)
    if street.crossing is not None or rng.random() < 0.4:
        things.append(_thing(lights_at, draw_traffic_light, canvas, (edge, lights_at), rng=rng))
    grass = verge.middle_of("terrain")
    if grass is not None:
        for _ in range(int(rng.integers(1, 6))):
            place = (grass + rng.uniform(-0.3, 0.3), _spread_depth(rng, 9, 70))
            draw = draw_tree if rng.random() < 0.6 else draw_bush
            things.append(_thing(place[1], draw, canvas, place, rng=rng))
    return things


def _parked(canvas: Canvas, street: Street, verge: Verge, rng: np.random.Generator) -> list[Thing]:
    """A row of cars at the curb, with gaps."""
    things: list[Thing] = []
    near = rng.uniform(5, 12)
    heading = AWAY if verge.side > 0 else TOWARDS
    while verge.parked and near < 70:
        near = _clear_of_crossing(street, near, CAR_LENGTH)
        place = (verge.side * (verge.curb - PARKING / 2), near + CAR_LENGTH / 2)
        things.append(_thing(near, draw_car, canvas, place, heading, rng=rng))
        near += CAR_LENGTH + (rng.uniform(0.8, 2) if rng.random() < 0.7 else rng.uniform(7, 16))
    return things


def _spread_depth(rng: np.random.Generator, near: float, far: float) -> float:
    """A depth between the two, near ones more often."""
    return float(np.exp(rng.uniform(np.log(near), np.log(far))))


def _thing(depth: float, draw: Callable[..., None], *args: object, rng: np.random.Generator, **options: object) -> Thing:
    """Postpone a drawing until its turn comes."""
    return float(depth), lambda: draw(*args, rng=rng, **options)


