"""People and two-wheelers of the synthetic road scenes."""

import numpy as np

from transkd.data.scenes.canvas import Array, Canvas, Color, circle, ground_ellipse, limb, pick, tint, upright

__all__ = ["draw_person", "draw_two_wheeler"]

SKIN = [(224, 178, 148), (190, 138, 104), (120, 82, 60), (84, 58, 44)]
HAIR = [(30, 24, 20), (84, 58, 36), (150, 120, 70), (110, 108, 106)]
COATS = [
    (40, 42, 50),
    (120, 30, 34),
    (46, 74, 120),
    (196, 186, 166),
    (60, 96, 70),
    (210, 130, 40),
    (110, 110, 116),
    (150, 90, 120),
]
TROUSERS = [(30, 32, 40), (52, 66, 98), (90, 82, 70), (66, 66, 68)]
FRAMES = [(30, 30, 32), (160, 40, 40), (60, 100, 150), (210, 210, 208), (70, 120, 90)]
RUBBER: Color = (20, 20, 22)


def draw_person(canvas: Canvas, place: tuple[float, float], rng: np.random.Generator) -> None:
    """Draw a standing or walking person, sometimes with a bag."""
    size = rng.uniform(0.92, 1.06) if rng.random() < 0.85 else 0.7
    coat, trousers = pick(rng, COATS), pick(rng, TROUSERS)
    stride, long_coat = rng.uniform(0.05, 0.3), rng.random() < 0.3

    def part(shape: Array, color: Color) -> None:
        canvas.paint(upright(place, shape * size), color, "person")

    canvas.shadow(ground_ellipse(place, 0.45, 0.3), 0.45)
    for side in (-1, 1):
        part(limb((side * 0.08, 0.9), (side * stride, 0.06), 0.17), trousers)
        part(limb((side * stride - 0.06, 0.05), (side * stride + 0.12, 0.05), 0.1), RUBBER)
    hem = 0.6 if long_coat else 0.86
    part(np.array([[-0.2, hem], [0.2, hem], [0.25, 1.42], [0.12, 1.52], [-0.12, 1.52], [-0.25, 1.42]]), coat)
    swing = rng.uniform(0.02, 0.2)
    for side in (-1, 1):
        part(limb((side * 0.24, 1.4), (side * (0.27 + swing), 0.88), 0.12), tint(coat, 0.85))
    if rng.random() < 0.35:
        part(np.array([[0.26, 0.55], [0.5, 0.55], [0.48, 0.88], [0.28, 0.88]]), pick(rng, COATS))
    _head(canvas, place, size, rng, "person")


def draw_two_wheeler(
    canvas: Canvas,
    place: tuple[float, float],
    yaw: float,
    rng: np.random.Generator,
    *,
    motor: bool = False,
    ridden: bool = True,
) -> None:
    """Draw a bicycle or motorcycle, with or without a rider.

    Args:
        canvas: canvas to draw on.
        place: x and z of the middle.
        yaw: heading in radians; near 0 or π it is seen from its end, otherwise from the side.
        rng: source of the colours.
        motor: a motorcycle instead of a bicycle.
        ridden: whether someone rides it.
    """
    name = "motorcycle" if motor else "bicycle"
    color = pick(rng, FRAMES)
    canvas.shadow(ground_ellipse(place, 0.4 + 0.6 * abs(np.sin(yaw)), 0.45), 0.45)
    if abs(np.sin(yaw)) < 0.4:
        _machine_from_end(canvas, place, yaw, name, color)
        if ridden:
            _rider_from_end(canvas, place, rng)
        return
    (_motorcycle_side if motor else _bicycle_side)(canvas, place, yaw, color)
    if ridden:
        _rider_side(canvas, place, yaw, rng)


def _bicycle_side(canvas: Canvas, place: tuple[float, float], yaw: float, color: Color) -> None:
    def part(shape: Array, paint: Color | None, labelled: bool = True) -> None:
        canvas.paint(upright(place, shape, yaw), paint, "bicycle" if labelled else None)

    for axle in (-0.54, 0.54):
        part(
            circle((axle, 0.35), 0.37), None
        )  # label the whole wheel including the gaps between the spokes, as in Cityscapes
        rim = circle((axle, 0.35), 0.34, 17)
        part(np.stack([limb(a, b, 0.07) for a, b in zip(rim, np.roll(rim, 1, 0), strict=True)]), RUBBER, False)
        part(np.stack([limb((axle, 0.35), end, 0.015) for end in rim[::3]]), (120, 120, 122), False)
    part(np.array([[-0.54, 0.35], [-0.06, 0.3], [0.42, 0.84], [-0.2, 0.84]]), None)
    rear, crank, seat, bar, front = (-0.54, 0.35), (-0.06, 0.3), (-0.22, 0.88), (0.4, 0.86), (0.54, 0.35)
    for start, end in ((rear, crank), (rear, seat), (crank, seat), (crank, bar), (seat, bar), (bar, front)):
        part(limb(start, end, 0.06), color)
    part(limb((-0.36, 0.95), (-0.1, 0.97), 0.08), RUBBER)
    part(limb((0.36, 0.86), (0.42, 1.04), 0.05), RUBBER)


def _motorcycle_side(canvas: Canvas, place: tuple[float, float], yaw: float, color: Color) -> None:
    def part(shape: Array, paint: Color, labelled: bool = True) -> None:
        canvas.paint(upright(place, shape, yaw), paint, "motorcycle" if labelled else None)

    for axle in (-0.72, 0.72):
        part(circle((axle, 0.33), 0.33), RUBBER)
        part(circle((axle, 0.33), 0.17), (120, 120, 122), False)
    part(np.array([[-0.45, 0.25], [0.35, 0.25], [0.4, 0.62], [-0.5, 0.62]]), (70, 72, 76))
    part(np.array([[-0.95, 0.78], [-0.5, 0.6], [0.3, 0.6], [0.55, 0.9], [0.2, 1.0], [-0.1, 0.8]]), color)
    part(limb((-0.7, 0.84), (-0.02, 0.82), 0.1), RUBBER)
    part(limb((0.72, 0.33), (0.45, 1.08), 0.1), (90, 92, 96))
    part(np.array([[0.45, 0.88], [0.62, 0.9], [0.58, 1.22], [0.46, 1.16]]), tint(color, 0.7))
    part(limb((-0.8, 0.3), (-0.1, 0.28), 0.1), (150, 150, 152), False)


def _machine_from_end(canvas: Canvas, place: tuple[float, float], yaw: float, name: str, color: Color) -> None:
    def part(shape: Array, paint: Color, shines: bool = False) -> None:
        canvas.paint(upright(place, shape), paint, name, shines=shines)

    motor = name == "motorcycle"
    part(limb((0, 0), (0, 0.68), 0.2 if motor else 0.09), RUBBER)
    if motor:
        part(
            np.array([[-0.26, 0.38], [0.26, 0.38], [0.3, 0.7], [0.18, 0.98], [-0.18, 0.98], [-0.3, 0.7]]),
            color,
        )
        part(limb((-0.42, 1.1), (0.42, 1.1), 0.08), RUBBER)
    else:
        part(limb((0, 0.6), (0, 1.0), 0.08), color)
        part(limb((-0.3, 1.02), (0.3, 1.02), 0.06), RUBBER)
    part(circle((0, 0.82), 0.1 if motor else 0.06), (255, 240, 200) if np.cos(yaw) < 0 else (214, 26, 22), True)


def _rider_from_end(canvas: Canvas, place: tuple[float, float], rng: np.random.Generator) -> None:
    coat, trousers = pick(rng, COATS), pick(rng, TROUSERS)
    for side in (-1, 1):
        canvas.paint(upright(place, limb((side * 0.12, 0.95), (side * 0.2, 0.32), 0.16)), trousers, "rider")
        canvas.paint(upright(place, limb((side * 0.22, 1.48), (side * 0.34, 1.06), 0.12)), tint(coat, 0.85), "rider")
    torso = np.array([[-0.19, 0.86], [0.19, 0.86], [0.25, 1.48], [0.12, 1.58], [-0.12, 1.58], [-0.25, 1.48]])
    canvas.paint(upright(place, torso), coat, "rider")
    _head(canvas, place, 1.03, rng, "rider")


def _rider_side(canvas: Canvas, place: tuple[float, float], yaw: float, rng: np.random.Generator) -> None:
    coat, trousers = pick(rng, COATS), pick(rng, TROUSERS)

    def part(shape: Array, color: Color) -> None:
        canvas.paint(upright(place, shape, yaw), color, "rider")

    part(limb((-0.2, 0.98), (0.16, 0.66), 0.19), trousers)
    part(limb((0.16, 0.7), (-0.02, 0.24), 0.15), trousers)
    part(np.array([[-0.36, 0.92], [-0.06, 0.92], [0.26, 1.4], [0.16, 1.54], [-0.06, 1.5]]), coat)
    part(limb((0.12, 1.4), (0.42, 1.04), 0.12), tint(coat, 0.85))
    part(circle((0.2, 1.66), (0.11, 0.14)), pick(rng, SKIN))
    part(circle((0.18, 1.73), (0.14, 0.1)), pick(rng, COATS))


def _head(canvas: Canvas, place: tuple[float, float], size: float, rng: np.random.Generator, name: str) -> None:
    canvas.paint(upright(place, circle((0, 1.64), (0.1, 0.13)) * size), pick(rng, SKIN), name)
    canvas.paint(upright(place, circle((0, 1.71), (0.12, 0.09)) * size), pick(rng, HAIR), name)
