"""Placement of the objects in a synthetic street."""

from collections.abc import Callable

import numpy as np

from transkd.data.scenes.canvas import Canvas, pick
from transkd.data.scenes.ground import PARKING, Street, Verge
from transkd.data.scenes.people import draw_person, draw_two_wheeler
from transkd.data.scenes.roadside import (
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
from transkd.data.scenes.vehicles import CAR_LENGTH, draw_bus, draw_car, draw_tram, draw_truck

__all__ = ["draw_street"]

STREET_END = 90.0
AWAY, TOWARDS = 0.0, np.pi  # headings

VEHICLES = (("car", CAR_LENGTH), ("truck", 8.0), ("bus", 11.0), ("motorcycle", 2.0), ("bicycle", 1.8))
VEHICLE_SHARES = (0.36, 0.17, 0.2, 0.15, 0.12)

Thing = tuple[float, Callable[[], None]]
"""Object to draw: its distance, for the drawing order, and the function that draws it."""


def draw_street(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Draw all objects above the ground, from far to near."""
    _draw_skyline(canvas, rng)
    frontage = [thing for verge in street.verges for thing in _frontage(canvas, verge, rng)]
    things = _traffic(canvas, street, rng) + _walkers(canvas, street, rng)
    for verge in street.verges:
        things += _furniture(canvas, street, verge, rng) + _parked(canvas, street, verge, rng)
    # Draw the frontage first: houses never occlude objects closer to the middle of the street.
    for layer in (frontage, things):
        for _, draw in sorted(layer, key=lambda thing: -thing[0]):
            draw()


def _draw_skyline(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw distant houses and trees at the end of the street."""
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
    """Return houses, walls, fences and hedges along one side."""
    things: list[Thing] = []
    near = rng.uniform(2, 8)
    built_up = rng.uniform(0.3, 0.75)
    while near < STREET_END:
        length = rng.uniform(8, 18)
        draw = draw_building
        if rng.random() > built_up:
            draw = (draw_wall, draw_fence, draw_hedge)[int(rng.choice(3, p=(0.38, 0.45, 0.17)))]
            things += _garden(canvas, verge, near, length, rng)
        things.append(_thing(near, draw, canvas, verge.side, verge.front, near, length - 0.02, rng=rng))
        near += length
    return things


def _garden(canvas: Canvas, verge: Verge, near: float, length: float, rng: np.random.Generator) -> list[Thing]:
    """Return trees, and sometimes a house, behind a wall or fence."""
    things = []
    for _ in range(int(rng.integers(0, 4))):
        place = (verge.side * (verge.front + rng.uniform(2.5, 7)), near + rng.uniform(0.2, 0.95) * length)
        things.append(_thing(place[1], draw_tree, canvas, place, rng=rng))
    if rng.random() < 0.35:
        back = verge.front + rng.uniform(8, 14)
        things.append(_thing(near + length, draw_building, canvas, verge.side, back, near, length - 2, rng=rng))
    return things


def _traffic(canvas: Canvas, street: Street, rng: np.random.Generator) -> list[Thing]:
    """Return the vehicles in the lanes and on the track."""
    things: list[Thing] = []
    lanes = [(0.0, AWAY), *((x, TOWARDS) for x in street.oncoming)]
    for lane, heading in lanes:
        near = rng.uniform(7, 26) if heading == AWAY else rng.uniform(5, 24)
        while near < 60:
            kind, length = VEHICLES[int(rng.choice(len(VEHICLES), p=VEHICLE_SHARES))]
            near = _clear_of_crossing(street, near, length)
            place = (lane + rng.uniform(-0.25, 0.25), near + length / 2)
            things.append(_thing(_distance(lane, near), _draw_vehicle, canvas, kind, place, heading, rng=rng))
            near += length + rng.uniform(4, 22)
    if street.track is not None and rng.random() < 0.9:
        near = _clear_of_crossing(street, rng.uniform(7, 32), 16)
        heading = AWAY if rng.random() < 0.5 else TOWARDS
        things.append(
            _thing(_distance(street.track, near), draw_tram, canvas, (street.track, near + 8), heading, rng=rng)
        )
    return things


def _draw_vehicle(
    canvas: Canvas, kind: str, place: tuple[float, float], heading: float, rng: np.random.Generator
) -> None:
    if kind in ("motorcycle", "bicycle"):
        place = (place[0] + rng.uniform(0, 0.8), place[1])
        draw_two_wheeler(canvas, place, heading, rng, motor=kind == "motorcycle")
    else:
        {"car": draw_car, "truck": draw_truck, "bus": draw_bus}[kind](canvas, place, heading, rng)


def _clear_of_crossing(street: Street, near: float, length: float) -> float:
    """Move a vehicle's depth so that it does not block the zebra crossing."""
    if street.crossing is not None and near < street.crossing + 4 and near + length > street.crossing - 1:
        return street.crossing + 4
    return near


def _walkers(canvas: Canvas, street: Street, rng: np.random.Generator) -> list[Thing]:
    """Return people on the sidewalks and the crossing, and two-wheelers beside and on the road."""
    things: list[Thing] = []
    for verge in street.verges:
        walk = verge.middle_of("sidewalk")
        if walk is None:
            continue
        for _ in range(int(rng.integers(2, 6))):
            place = (walk + rng.uniform(-0.8, 0.8), _spread_depth(rng, 7, 45))
            things.append(_thing(_distance(*place), draw_person, canvas, place, rng=rng))
        if rng.random() < 0.8:
            things += _bike_stand(canvas, walk, rng)
    if street.crossing is not None:
        left, right = street.verges
        for _ in range(int(rng.integers(2, 6))):
            place = (rng.uniform(-left.curb, right.curb), street.crossing + rng.uniform(0.4, 2.6))
            if rng.random() < 0.5:
                things.append(_thing(_distance(*place), draw_person, canvas, place, rng=rng))
            else:
                yaw, motor = float(rng.choice([-1, 1])) * np.pi / 2, bool(rng.random() < 0.4)
                things.append(_thing(_distance(*place), draw_two_wheeler, canvas, place, yaw, motor=motor, rng=rng))
    return things


def _bike_stand(canvas: Canvas, walk: float, rng: np.random.Generator) -> list[Thing]:
    """Return a few bicycles or motorcycles parked on the sidewalk."""
    motor, depth = bool(rng.random() < 0.4), _spread_depth(rng, 8, 20)
    yaw = float(np.sign(-walk)) * np.pi / 2 + rng.uniform(-0.4, 0.4)
    things = []
    for index in range(int(rng.integers(1, 5))):
        place = (walk + rng.uniform(-0.2, 0.2), depth + 1.1 * index)
        options = {"motor": motor, "ridden": False}
        things.append(_thing(_distance(*place), draw_two_wheeler, canvas, place, yaw, rng=rng, **options))
    return things


def _furniture(canvas: Canvas, street: Street, verge: Verge, rng: np.random.Generator) -> list[Thing]:
    """Return lamps, signs, traffic lights, trees and bushes of one side."""
    things: list[Thing] = []
    edge = verge.side * (verge.curb + 0.4)
    for depth in np.arange(rng.uniform(9, 18), 70, rng.uniform(16, 26)):
        things.append(_thing(_distance(edge, float(depth)), draw_street_lamp, canvas, (edge, float(depth)), rng=rng))
    for _ in range(int(rng.integers(1, 4))):
        place = (edge + 0.2 * verge.side, _spread_depth(rng, 8, 36))
        things.append(_thing(_distance(*place), draw_sign, canvas, place, rng=rng))
    lights_at = street.crossing - 0.8 if street.crossing is not None else _spread_depth(rng, 14, 40)
    if street.crossing is not None or rng.random() < 0.4:
        things.append(_thing(_distance(edge, lights_at), draw_traffic_light, canvas, (edge, lights_at), rng=rng))
    grass = verge.middle_of("terrain")
    if grass is not None:
        for _ in range(int(rng.integers(1, 6))):
            place = (grass + rng.uniform(-0.3, 0.3), _spread_depth(rng, 9, 70))
            draw = draw_tree if rng.random() < 0.6 else draw_bush
            things.append(_thing(_distance(*place), draw, canvas, place, rng=rng))
    return things


def _parked(canvas: Canvas, street: Street, verge: Verge, rng: np.random.Generator) -> list[Thing]:
    """Return a row of parked cars at the curb, with gaps."""
    things: list[Thing] = []
    near = rng.uniform(5, 12)
    heading = AWAY if verge.side > 0 else TOWARDS
    while verge.parked and near < 50:
        near = _clear_of_crossing(street, near, CAR_LENGTH)
        place = (verge.side * (verge.curb - PARKING / 2), near + CAR_LENGTH / 2)
        things.append(_thing(_distance(place[0], near), draw_car, canvas, place, heading, rng=rng))
        near += CAR_LENGTH + (rng.uniform(0.8, 2) if rng.random() < 0.7 else rng.uniform(7, 16))
    return things


def _distance(x: float, near: float) -> float:
    """Sorting distance of a vehicle: increases with |x|, because a long vehicle occludes those farther to the side."""
    return near + 0.7 * abs(x)


def _spread_depth(rng: np.random.Generator, near: float, far: float) -> float:
    """Sample a depth log-uniformly between two values."""
    return float(np.exp(rng.uniform(np.log(near), np.log(far))))


def _thing(
    distance: float, draw: Callable[..., None], *args: object, rng: np.random.Generator, **options: object
) -> Thing:
    """Bind the arguments of a drawing function, to be called in depth order."""
    return distance, lambda: draw(*args, rng=rng, **options)
