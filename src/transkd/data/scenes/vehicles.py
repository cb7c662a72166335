"""Vehicles of the synthetic road scenes: boxes with wheels."""

import numpy as np

from transkd.data.scenes.canvas import Array, Canvas, Color, Face, pick, tint

__all__ = ["CAR_LENGTH", "draw_bus", "draw_car", "draw_tram", "draw_truck"]

CAR_LENGTH = 4.3

GLASS: Color = (38, 46, 54)
RUBBER: Color = (22, 22, 24)
HEADLIGHT: Color = (255, 244, 214)
TAILLIGHT: Color = (214, 26, 22)
CAR_PAINT = [
    (28, 30, 34),
    (120, 124, 128),
    (205, 206, 206),
    (168, 24, 28),
    (34, 58, 112),
    (36, 84, 62),
    (196, 150, 40),
    (96, 70, 54),
    (88, 130, 160),
]
BUS_PAINT = [(226, 190, 46), (190, 36, 40), (44, 110, 160), (222, 222, 216), (80, 140, 76)]
TRAM_PAINT = [(214, 206, 180), (200, 34, 36), (60, 128, 90), (232, 198, 60), (70, 96, 150)]
CARGO_PAINT = [(220, 220, 216), (150, 156, 160), (60, 92, 140), (180, 90, 40), (72, 110, 80), (120, 40, 40)]


def draw_car(canvas: Canvas, place: tuple[float, float], yaw: float, rng: np.random.Generator) -> None:
    """Draw a hatchback, saloon or van."""
    color = pick(rng, CAR_PAINT)
    van = rng.random() < 0.2
    height, waist, width = (1.95, 1.05, 1.9) if van else (rng.uniform(1.42, 1.62), 0.88, 1.78)
    front, rear = (1.1, 0.15) if van else (1.35, rng.uniform(0.25, 0.9))
    _ground_shadow(canvas, place, CAR_LENGTH, width, yaw)
    body = canvas.box(place, (CAR_LENGTH, width, waist - 0.24), color, "car", bottom=0.24, yaw=yaw)
    cabin_size = (CAR_LENGTH - 0.1, width - 0.06, height - waist)
    cabin = canvas.box(place, cabin_size, color, "car", bottom=waist, yaw=yaw, taper=(front, rear, 0.22))
    for side, face in cabin.items():
        if side in ("left", "right"):
            panes = [face.patch(0.1, 0.47, 0.1, 0.86), face.patch(0.51, 0.9, 0.1, 0.86)]
            canvas.paint(np.stack(panes), GLASS)
        elif side != "top":
            canvas.paint(face.patch(0.08, 0.92, 0.1, 0.88), GLASS)
            canvas.paint(face.patch(0.12, 0.45, 0.45, 0.8), tint(GLASS, 1.7))
    _wheels(canvas, body, (0.8, CAR_LENGTH - 0.85), 0.31, "car")
    _tyres(canvas, body, 0.24, "car")
    _car_ends(canvas, body, color)


def draw_truck(canvas: Canvas, place: tuple[float, float], yaw: float, rng: np.random.Generator) -> None:
    """Draw a lorry: a cab and a load."""
    cab_color, load_color = pick(rng, CAR_PAINT), pick(rng, CARGO_PAINT)
    length, width, height = 8.0, 2.4, rng.uniform(2.9, 3.5)
    forward = np.array([np.sin(yaw), np.cos(yaw)])
    cab_place = _moved(place, forward * (length / 2 - 0.95))
    load_place = _moved(place, -forward * 1.05)
    _ground_shadow(canvas, place, length, width, yaw)

    def cab() -> None:
        faces = canvas.box(cab_place, (1.9, 2.3, 2.3), cab_color, "truck", bottom=0.4, yaw=yaw, taper=(0.25, 0, 0.05))
        _tyres(canvas, faces, 0.4, "truck")
        if "front" in faces:
            canvas.paint(faces["front"].patch(0.07, 0.93, 0.5, 0.88), GLASS)
            canvas.paint(faces["front"].patch(0.2, 0.8, 0.12, 0.36), tint(cab_color, 0.4))
            _lamps(canvas, faces["front"], HEADLIGHT, bottom=0.06, top=0.18)
        for side in ("left", "right"):
            if side in faces:
                canvas.paint(faces[side].patch(0.25, 0.8, 0.5, 0.88), GLASS)

    def load() -> None:
        size = (length - 2.1, width, height - 0.8)
        faces = canvas.box(load_place, size, load_color, "truck", bottom=0.8, yaw=yaw)
        chassis = canvas.box(load_place, (length - 2.1, width - 0.2, 0.35), (44, 44, 46), "truck", bottom=0.45, yaw=yaw)
        for side in ("left", "right"):
            if side in faces:
                canvas.paint(faces[side].grid(9, 1, 0.03, 0.97, (0.06, 1)), tint(load_color, 0.82))
        if "rear" in faces:
            canvas.paint(faces["rear"].patch(0.06, 0.485, 0.05, 0.95), tint(load_color, 0.84))
            canvas.paint(faces["rear"].patch(0.515, 0.94, 0.05, 0.95), tint(load_color, 0.84))
            _lamps(canvas, chassis["rear"], TAILLIGHT, bottom=0.1, top=0.9)
        _wheels(canvas, chassis, (1.0, 4.9), 0.48, "truck")
        _tyres(canvas, chassis, 0.45, "truck")

    for part in (cab, load) if np.cos(yaw) > 0 else (load, cab):  # the farther part first
        part()


def draw_bus(canvas: Canvas, place: tuple[float, float], yaw: float, rng: np.random.Generator) -> None:
    """Draw a city bus with an illuminated destination board."""
    color = pick(rng, BUS_PAINT)
    length, width = 11.0, 2.5
    _ground_shadow(canvas, place, length, width, yaw)
    faces = canvas.box(place, (length, width, 2.75), color, "bus", bottom=0.3, yaw=yaw, taper=(0.08, 0.05, 0.04))
    for side, face in faces.items():
        if side in ("left", "right"):
            canvas.paint(face.grid(7, 1, 0.42, 0.84, (0.9, 1)), (58, 64, 66), shines=True)
            canvas.paint(face.patch(0, 1, 0.2, 0.27), tint(color, 0.55))
        elif side != "top":
            canvas.paint(face.patch(0.06, 0.94, 0.4 if side == "front" else 0.52, 0.82), GLASS)
            canvas.paint(face.patch(0.25, 0.75, 0.86, 0.96), (250, 170, 40), shines=True)
            _lamps(canvas, face, HEADLIGHT if side == "front" else TAILLIGHT, bottom=0.1, top=0.18)
    _wheels(canvas, faces, (2.4, 8.6), 0.48, "bus")
    _tyres(canvas, faces, 0.3, "bus")


def draw_tram(canvas: Canvas, place: tuple[float, float], yaw: float, rng: np.random.Generator) -> None:
    """Draw a tram of two coaches, without visible wheels."""
    color = pick(rng, TRAM_PAINT)
    length, width = 16.0, 2.4
    _ground_shadow(canvas, place, length, width, yaw)
    faces = canvas.box(place, (length, width, 3.0), color, "train", bottom=0.2, yaw=yaw, taper=(0.45, 0.45, 0.06))
    roof = (length * 0.8, width * 0.6, 0.35)
    canvas.box(place, roof, tint(color, 0.55), "train", bottom=3.2, yaw=yaw)
    for side, face in faces.items():
        if side in ("left", "right"):
            canvas.paint(face.grid(10, 1, 0.44, 0.8, (0.82, 1)), (66, 70, 66), shines=True)
            canvas.paint(face.grid(4, 1, 0.08, 0.84, (0.16, 1)), tint(color, 0.5))
            canvas.paint(face.patch(0, 1, 0, 0.1), (36, 36, 38))
            canvas.paint(face.patch(0.485, 0.515, 0, 1), (30, 30, 32))
        elif side != "top":
            canvas.paint(face.patch(0, 1, 0, 0.12), (36, 36, 38))
            canvas.paint(face.patch(0.12, 0.88, 0.38, 0.8), GLASS)
            canvas.paint(face.patch(0.28, 0.72, 0.84, 0.95), (255, 196, 70), shines=True)
            _lamps(canvas, face, HEADLIGHT if np.cos(yaw) < 0 else TAILLIGHT, bottom=0.2, top=0.28)


def _car_ends(canvas: Canvas, body: dict[str, Face], color: Color) -> None:
    if "rear" in body:
        canvas.paint(body["rear"].patch(0, 1, 0, 0.22), tint(color, 0.4))
        canvas.paint(body["rear"].patch(0.36, 0.64, 0.38, 0.56), (226, 226, 218))
        _lamps(canvas, body["rear"], TAILLIGHT, bottom=0.6, top=0.9)
    if "front" in body:
        canvas.paint(body["front"].patch(0, 1, 0, 0.16), tint(color, 0.4))
        canvas.paint(body["front"].patch(0.28, 0.72, 0.3, 0.6), RUBBER)
        canvas.paint(body["front"].patch(0.37, 0.63, 0.12, 0.28), (226, 226, 218))
        _lamps(canvas, body["front"], HEADLIGHT, bottom=0.5, top=0.8)


def _lamps(canvas: Canvas, face: Face, color: Color, bottom: float, top: float) -> None:
    lamps = [face.patch(0.04, 0.2, bottom, top), face.patch(0.8, 0.96, bottom, top)]
    canvas.paint(np.stack(lamps), color, shines=True)


def _wheels(canvas: Canvas, body: dict[str, Face], along: tuple[float, ...], radius: float, name: str) -> None:
    for side in ("left", "right"):
        if side not in body:
            continue
        face = body[side]
        middles = [distance if side == "right" else face.length - distance for distance in along]
        canvas.paint(np.stack([face.disc(middle, radius, radius) for middle in middles]), RUBBER, name)
        canvas.paint(np.stack([face.disc(middle, radius, radius * 0.55) for middle in middles]), (130, 132, 134))


def _tyres(canvas: Canvas, body: dict[str, Face], clearance: float, name: str) -> None:
    """Draw the dark space under the near end of a vehicle and its two tyres."""
    for side in ("front", "rear"):
        if side in body:
            height = float(np.ptp(body[side].corners[:, 1]))
            canvas.paint(body[side].patch(0.06, 0.94, -0.55 * clearance / height, 0.02), tint(RUBBER, 0.7), name)
            tyres = [body[side].patch(left, left + 0.13, -clearance / height, 0.02) for left in (0.04, 0.83)]
            canvas.paint(np.stack(tyres), RUBBER, name)


def _ground_shadow(canvas: Canvas, place: tuple[float, float], length: float, width: float, yaw: float) -> None:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2 + 0.25, length / 2 + 0.3]
    turned = corners @ np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    canvas.shadow(np.stack([turned[:, 0] + place[0], np.zeros(4), turned[:, 1] + place[1]], -1), 0.6)


def _moved(place: tuple[float, float], offset: Array) -> tuple[float, float]:
    return float(place[0] + offset[0]), float(place[1] + offset[1])
