"""Roadside objects of the synthetic scenes: houses, walls, fences, plants, poles, lights and signs."""

import numpy as np

from transkd.data.scenes.canvas import (
    Array,
    Canvas,
    Color,
    Face,
    circle,
    ground_ellipse,
    limb,
    pick,
    tint,
    upright,
)

__all__ = [
    "draw_building",
    "draw_bush",
    "draw_fence",
    "draw_hedge",
    "draw_sign",
    "draw_street_lamp",
    "draw_traffic_light",
    "draw_tree",
    "draw_wall",
]

FACADES = [
    (176, 160, 140),
    (150, 86, 66),
    (204, 194, 176),
    (128, 124, 120),
    (196, 160, 110),
    (140, 150, 160),
    (110, 96, 88),
    (206, 170, 150),
]
ROOFS = [(110, 56, 44), (70, 66, 68), (90, 78, 70)]
STONES = [(140, 134, 126), (120, 90, 74), (166, 156, 140), (104, 104, 104)]
FENCES = [(70, 74, 76), (120, 92, 62), (206, 204, 198), (46, 74, 56)]
GREENS = [(62, 84, 42), (84, 104, 50), (50, 72, 48), (104, 108, 52), (122, 96, 46)]
BARK: Color = (66, 54, 44)
STEEL = [(96, 100, 102), (64, 68, 70), (140, 142, 142)]
PANES = [(60, 72, 84), (84, 96, 104), (46, 54, 62)]
AWNINGS = [(170, 40, 40), (40, 80, 130), (40, 100, 70)]
LIT: Color = (255, 206, 128)


def draw_building(
    canvas: Canvas, side: int, front: float, near: float, length: float, rng: np.random.Generator
) -> None:
    """Draw a house along the street.

    Args:
        canvas: where to paint.
        side: −1 left of the street, 1 right of it.
        front: distance of the facade from the camera's line, in metres.
        near: depth at which the house starts.
        length: metres along the street.
        rng: source of colours, storeys and windows.
    """
    floors, deep = int(rng.integers(2, 6)), 10.0
    height = floors * 3.1 + 0.8
    color = pick(rng, FACADES)
    place = (side * (front + deep / 2), near + length / 2)
    faces = canvas.box(place, (length, deep, height), color, "building")
    for name, face in faces.items():
        if name != "top":
            _windows(canvas, face, floors, height, color, rng)
            _shop_front(canvas, face, 3.2 / height, rng)
    if rng.random() < 0.6:
        roof = rng.uniform(1.5, 3.5)
        canvas.box(
            place,
            (length + 0.3, deep + 0.6, roof),
            pick(rng, ROOFS),
            "building",
            bottom=height,
            taper=(0, 0, 3.5),
        )
    else:
        canvas.box(place, (length, deep + 0.3, 0.4), tint(color, 0.8), "building", bottom=height)


def _windows(canvas: Canvas, face: Face, floors: int, height: float, color: Color, rng: np.random.Generator) -> None:
    columns, low, high = max(1, int(face.length / 2.7)), 3.5 / height, 1 - 0.3 / height
    canvas.paint(face.grid(columns, floors - 1, low, high, (0.56, 0.64)), tint(color, 1.25))
    panes = face.grid(columns, floors - 1, low, high, (0.44, 0.54))
    lit = rng.random(len(panes)) < 0.3
    for chosen, pane, shines in ((lit, LIT, True), (~lit, pick(rng, PANES), False)):
        if chosen.any():
            canvas.paint(panes[chosen], tint(pane, rng.uniform(0.8, 1)) if shines else pane, shines=shines)
    canvas.paint(face.patch(0, 1, 3.1 / height, 3.35 / height), tint(color, 0.7))


def _shop_front(canvas: Canvas, face: Face, top: float, rng: np.random.Generator) -> None:
    columns, open_now = max(1, int(face.length / 3.5)), rng.random() < 0.3
    panes = face.grid(columns, 1, 0.12 * top, 0.78 * top, (0.72, 1))
    canvas.paint(panes, (230, 190, 130) if open_now else pick(rng, PANES), shines=open_now)
    canvas.paint(face.grid(columns, 1, 0, 0.74 * top, (0.2, 1)), tint((92, 66, 50), rng.uniform(0.5, 1.2)))
    if rng.random() < 0.4:
        canvas.paint(face.patch(0.08, 0.7, 0.82 * top, 0.97 * top), pick(rng, AWNINGS))


def draw_wall(canvas: Canvas, side: int, front: float, near: float, length: float, rng: np.random.Generator) -> None:
    """Draw a brick or stone wall with a coping."""
    height, color = rng.uniform(1.6, 3.0), pick(rng, STONES)
    place = (side * (front + 0.2), near + length / 2)
    for face in canvas.box(place, (length, 0.4, height), color, "wall").values():
        courses = int(height / 0.28)
        canvas.paint(face.grid(1, courses, 0, 1, (1, 0.12)), tint(color, 0.72))
        canvas.paint(face.grid(max(1, int(face.length / 2.5)), 1, 0, 1, (0.03, 1)), tint(color, 0.72))
    canvas.box(place, (length, 0.6, 0.16), tint(color, 1.2), "wall", bottom=height)


def draw_fence(canvas: Canvas, side: int, front: float, near: float, length: float, rng: np.random.Generator) -> None:
    """Draw railings; gaps between the bars are labelled fence, as in Cityscapes."""
    height, color, boarded = rng.uniform(1.1, 1.9), pick(rng, FENCES), rng.random() < 0.4
    x, far = side * front, near + length
    face = Face(np.array([[x, 0, near], [x, 0, far], [x, height, far], [x, height, near]]))
    canvas.paint(face.corners, None, "fence")
    gap = 0.32 if boarded else 0.26
    canvas.paint(face.grid(int(length / gap), 1, 0, 1, (0.8 if boarded else 0.26, 1)), color)
    for rail in (0.12, 0.9):
        canvas.paint(face.patch(0, 1, rail - 0.04, rail + 0.04), tint(color, 0.85))
    canvas.paint(face.grid(max(1, int(length / 2.5)), 1, 0, 1, (0.07, 1)), tint(color, 0.75))


def draw_hedge(canvas: Canvas, side: int, front: float, near: float, length: float, rng: np.random.Generator) -> None:
    """Draw a clipped hedge."""
    color, height = pick(rng, GREENS), rng.uniform(1.0, 2.4)
    place = (side * (front + 0.6), near + length / 2)
    for face in canvas.box(place, (length, 1.2, height), color, "vegetation", taper=(0, 0, 0.12)).values():
        for factor in (0.72, 1.2):
            spots = rng.uniform(0.02, 0.96, (int(12 * face.length), 2))
            leaves = [face.patch(u, u + 0.3 / face.length, v, v + 0.05) for u, v in spots[:60]]
            canvas.paint(np.stack(leaves), tint(color, factor))


def draw_tree(canvas: Canvas, place: tuple[float, float], rng: np.random.Generator) -> None:
    """Draw a broad-leaved tree or a conifer."""
    color, height = pick(rng, GREENS), rng.uniform(5.0, 10.0)
    conifer = rng.random() < 0.25
    trunk = height * (0.2 if conifer else 0.45)
    canvas.shadow(ground_ellipse(place, 1.4, 0.8), 0.4)
    canvas.paint(upright(place, limb((0, 0), (0, trunk + 0.5), 0.34)), BARK, "vegetation")
    if conifer:
        for layer in range(4):
            low, wide = trunk + layer * (height - trunk) / 5, 0.26 * height * (1 - layer / 5)
            tier = np.array([[-wide, low], [wide, low], [0, low + 0.42 * (height - trunk)]])
            canvas.paint(upright(place, tier), tint(color, 0.65 + 0.12 * layer), "vegetation")
        return
    for side in (-1, 1):
        branch = limb((0, trunk * 0.8), (side * 0.9, trunk + 1.0), 0.16)
        canvas.paint(upright(place, branch), BARK, "vegetation")
    _foliage(canvas, place, (0, trunk + 0.32 * height), 0.3 * height, color, rng)


def draw_bush(canvas: Canvas, place: tuple[float, float], rng: np.random.Generator) -> None:
    """Draw a round bush."""
    radius = rng.uniform(0.5, 1.1)
    canvas.shadow(ground_ellipse(place, radius, 0.4), 0.4)
    _foliage(canvas, place, (0, radius * 0.8), radius, pick(rng, GREENS), rng)


def _foliage(
    canvas: Canvas,
    place: tuple[float, float],
    center: tuple[float, float],
    radius: float,
    color: Color,
    rng: np.random.Generator,
) -> None:
    """Draw an irregular crown, darker at the bottom and lighter at the top."""
    wobble = rng.uniform(0.8, 1.12, (22, 1))
    outline = circle((0, 0), (radius * 1.1, radius), 22) * wobble
    outline[:, 1] = np.maximum(outline[:, 1], -center[1])  # never below the ground
    canvas.paint(upright(place, outline + center), color, "vegetation")
    for factor, lift in ((0.66, -0.25), (0.84, 0.0), (1.2, 0.12), (1.42, 0.3)):
        angle, distance = rng.uniform(0, 2 * np.pi, 26), radius * np.sqrt(rng.uniform(0, 0.55, 26))
        middles = np.stack([np.cos(angle), np.sin(angle)], -1) * distance[:, None] + [0, lift * radius]
        leaf = circle((0, 0), radius * 0.11, 6) * [1.3, 0.8]
        leaves = middles[:, None] + leaf * rng.uniform(0.5, 1.4, (26, 1, 1)) + center
        canvas.paint(upright(place, np.maximum(leaves, [-np.inf, 0])), tint(color, factor))


def draw_street_lamp(canvas: Canvas, place: tuple[float, float], rng: np.random.Generator) -> None:
    """Draw a lamp post with an arm over the road."""
    steel, height = pick(rng, STEEL), rng.uniform(5.5, 7.5)
    reach = -1.4 * float(np.sign(place[0]))
    canvas.paint(upright(place, limb((0, 0), (0, height), 0.17)), steel, "pole")
    canvas.paint(upright(place, limb((0, 0), (0, 0.9), 0.28)), tint(steel, 0.8), "pole")
    canvas.paint(upright(place, limb((0, height - 0.05), (reach, height + 0.25), 0.12)), steel, "pole")
    lamp = limb((reach * 0.75, height + 0.14), (reach * 1.25, height + 0.24), 0.2)
    canvas.paint(upright(place, lamp), (255, 232, 180), "pole", shines=True)


def draw_traffic_light(canvas: Canvas, place: tuple[float, float], rng: np.random.Generator) -> None:
    """Draw a traffic light on a mast, sometimes with a second one over the road."""
    steel, phase = pick(rng, STEEL), int(rng.integers(3))
    inward = -float(np.sign(place[0]))
    overhead = rng.random() < 0.5
    height = 5.6 if overhead else 3.3
    canvas.paint(upright(place, limb((0, 0), (0, height), 0.18)), steel, "pole")
    if overhead:
        canvas.paint(upright(place, limb((0, 5.5), (inward * 3.8, 5.5), 0.15)), steel, "pole")
        _signal_head(canvas, place, (inward * 3.6, 5.1), phase)
    _signal_head(canvas, place, (0, 2.75), phase)


def _signal_head(canvas: Canvas, place: tuple[float, float], middle: tuple[float, float], phase: int) -> None:
    board = np.array([[-0.27, -0.68], [0.27, -0.68], [0.27, 0.68], [-0.27, 0.68]])
    canvas.paint(upright(place, board + middle), (24, 26, 26), "traffic light")
    colors: list[Color] = [(255, 48, 34), (255, 184, 40), (60, 236, 120)]
    for index, color in enumerate(colors):
        lens = upright(place, circle((middle[0], middle[1] + 0.42 * (1 - index)), 0.16))
        canvas.paint(lens, color if index == phase else tint(color, 0.22), shines=index == phase)


_FIFTY = np.stack(
    [
        limb(start, end, 0.055)
        for start, end in (
            ((-0.2, 0.15), (-0.04, 0.15)),
            ((-0.18, 0.15), (-0.18, 0.02)),
            ((-0.2, 0.02), (-0.04, 0.02)),
            ((-0.06, 0.02), (-0.06, -0.14)),
            ((-0.2, -0.14), (-0.04, -0.14)),
            ((0.06, 0.17), (0.06, -0.16)),
            ((0.19, 0.17), (0.19, -0.16)),
            ((0.06, 0.15), (0.19, 0.15)),
            ((0.06, -0.14), (0.19, -0.14)),
        )
    ]
)


def draw_sign(canvas: Canvas, place: tuple[float, float], rng: np.random.Generator) -> None:
    """Draw a common traffic sign on a post."""
    red: Color = (196, 26, 32)
    white: Color = (236, 236, 232)
    blue: Color = (24, 76, 158)
    yellow: Color = (242, 196, 40)
    top = rng.uniform(2.1, 2.8)
    canvas.paint(upright(place, limb((0, 0), (0, top), 0.12)), pick(rng, STEEL), "pole")

    def plate(shape: Array, color: Color, name: str | None = None) -> None:
        canvas.paint(upright(place, shape + np.array([0, top])), color, name)

    triangle = np.array([[-0.5, -0.34], [0.5, -0.34], [0, 0.54]])
    square = np.array([[-0.4, -0.4], [0.4, -0.4], [0.4, 0.4], [-0.4, 0.4]])
    kind = rng.integers(6)
    if kind == 0:  # speed limit
        plate(circle((0, 0), 0.44), red, "traffic sign")
        plate(circle((0, 0), 0.32), white)
        plate(_FIFTY, (20, 20, 20))
    elif kind == 1:  # danger
        plate(triangle, red, "traffic sign")
        plate(triangle * 0.64, white)
    elif kind == 2:  # priority
        plate(circle((0, 0), 0.52, 4), white, "traffic sign")
        plate(circle((0, 0), 0.37, 4), yellow)
    elif kind == 3:  # crossing or parking
        plate(square * 1.05, blue, "traffic sign")
        plate(triangle * 0.55 if rng.random() < 0.5 else square * 0.45, white)
    elif kind == 4:  # no entry
        plate(circle((0, 0), 0.44), red, "traffic sign")
        plate(limb((-0.3, 0), (0.3, 0), 0.15), white)
    else:  # direction board
        plate(square * [2.0, 0.8], pick(rng, [yellow, blue, (30, 110, 70)]), "traffic sign")
        plate(np.stack([limb((-0.6, y), (0.5, y), 0.09) for y in (-0.12, 0.12)]), white)
