"""Light and weather of the synthetic scenes: renders the image of a canvas in an adverse condition."""

import cv2
import numpy as np

from transkd.data.scenes.canvas import LABELS, Array, Canvas

__all__ = ["WEATHER", "draw_sky"]

SKIES = {
    "fog": ((186, 190, 194), (196, 198, 200)),
    "night": ((58, 66, 92), (96, 92, 100)),
    "rain": ((128, 136, 146), (176, 180, 184)),
    "snow": ((172, 182, 196), (214, 218, 224)),
}
"""Sky colours at the zenith and at the horizon."""

GRAIN = {"vegetation": 0.13, "terrain": 0.11, "building": 0.045, "wall": 0.07, "sky": 0.0}
"""Noise amplitude of surface textures by class; 0.03 for all other classes."""


def draw_sky(canvas: Canvas, condition: str, rng: np.random.Generator) -> None:
    """Draw a sky gradient with clouds."""
    width = canvas.label.shape[1]
    overhead, horizon = (np.array(color, np.float32) for color in SKIES[condition])
    down = np.linspace(0, 1, max(int(canvas.horizon) + 2, 2), dtype=np.float32)[:, None, None]
    shape = (len(down), width)
    clouds = _soft_noise(rng, shape, cells=(4, 5)) + 0.5 * _soft_noise(rng, shape, cells=(9, 12))
    sky = overhead + (horizon - overhead) * down + 9 * clouds[..., None] * (1 - 0.6 * down)
    canvas.image[: len(down)] = sky.clip(0, 255)


def fog(canvas: Canvas, rng: np.random.Generator) -> Array:
    """Fog: blend with grey by distance."""
    image = _daylight(canvas, rng) * rng.uniform(0.78, 0.95)
    image = _veiled(image, canvas, rng.uniform(25, 55), _rgb(190, 193, 196) * rng.uniform(0.88, 1.08))
    return image + 0.35 * _halo(canvas.light, 0.02)


def night(canvas: Canvas, rng: np.random.Generator) -> Array:
    """Night: darkness with street lamps, lit windows and the camera car's headlights."""
    image = _daylight(canvas, rng) * (_rgb(0.82, 0.9, 1.12) * rng.uniform(0.22, 0.34))
    columns = np.arange(image.shape[1], dtype=np.float32) - canvas.center
    beam = np.exp(-((columns / (0.33 * image.shape[1])) ** 2))[None] * np.exp(-canvas.depth / 16)
    beam *= np.clip(np.arange(len(beam), dtype=np.float32) / canvas.horizon, 0.2, 1)[:, None]  # dipped headlights
    image *= 1 + 2.6 * beam[..., None] * _rgb(1.0, 0.96, 0.84)
    glow = 0.9 * _halo(canvas.light, 0.012) + 1.5 * _halo(canvas.light, 0.05)
    image += image * glow / 60 + 0.55 * glow  # illumination near lamps, plus light scattered in the air
    return np.maximum(image, canvas.light) + 4 * rng.standard_normal(image.shape, np.float32)


def rain(canvas: Canvas, rng: np.random.Generator) -> Array:
    """Rain: grey light, reflections on the road and rain streaks."""
    image = _daylight(canvas, rng)
    grey = image.mean(-1, keepdims=True)
    image = (grey + 0.72 * (image - grey)) * rng.uniform(0.58, 0.75)
    image = _veiled(image, canvas, rng.uniform(90, 160), _rgb(150, 155, 160))
    image = np.maximum(image, 0.9 * canvas.light) + 0.5 * _halo(canvas.light, 0.02)
    image = _mirrored_in_road(image, canvas, rng)
    streaks = _streaks(image.shape[:2], rng)
    return np.asarray(image + streaks[..., None] * (225 - image))


def snow(canvas: Canvas, rng: np.random.Generator) -> Array:
    """Snow: snow cover on ground and roofs, and snowflakes."""
    image = _daylight(canvas, rng)
    cover = _snow_cover(canvas, rng)[..., None]
    image += cover * (_rgb(232, 236, 242) * rng.uniform(0.93, 1.02) - image)
    image = _veiled(image, canvas, rng.uniform(60, 120), _rgb(206, 211, 218))
    image += 0.25 * _halo(canvas.light, 0.02)
    flakes = _flakes(image.shape[:2], rng)
    return np.asarray(image + flakes[..., None] * (246 - image))


WEATHER = {"fog": fog, "night": night, "rain": rain, "snow": snow}
"""Rendering functions by condition; each returns the image, float [H, W, 3] from 0 to 255."""


def _rgb(*channels: float) -> Array:
    return np.array(channels, np.float32)


def _daylight(canvas: Canvas, rng: np.random.Generator) -> Array:
    """The image with surface texture and a slight colour cast."""
    shape = canvas.label.shape
    rough = np.full(256, 0.03, np.float32)
    for name, strength in GRAIN.items():
        rough[LABELS[name]] = strength
    noise = 0.7 * rng.standard_normal(shape, np.float32) + 0.6 * _soft_noise(rng, shape, cells=(24, 40))
    image = canvas.image * (1 + rough[canvas.label] * noise)[..., None]
    return np.asarray(image * rng.uniform(0.94, 1.06, 3).astype(np.float32))


def _veiled(image: Array, canvas: Canvas, sight: float, veil: Array) -> Array:
    """Blend with a colour by distance; at ``sight`` metres, 1/e of the image is left."""
    clear = np.exp(-canvas.depth / sight)[..., None]
    return np.asarray(image * clear + veil * (1 - clear))


def _halo(light: Array, spread: float) -> Array:
    """Blur the lights by a fraction of the width, at a quarter of the resolution for speed."""
    height, width = light.shape[:2]
    small = cv2.resize(light, (max(width // 4, 1), max(height // 4, 1)), interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(small.astype(np.float32), (0, 0), max(spread * width / 4, 0.5))
    return np.asarray(cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR))


def _mirrored_in_road(image: Array, canvas: Canvas, rng: np.random.Generator) -> Array:
    height, width = canvas.label.shape
    source = (2 * canvas.horizon - np.arange(height)).round().astype(int).clip(0, height - 1)
    mirror = cv2.blur(image[source], (max(width // 160, 1), max(height // 12, 1)))
    wet = np.isin(canvas.label, [LABELS["road"], LABELS["sidewalk"]])
    puddles = 0.3 + 0.13 * _soft_noise(rng, (height, width), cells=(14, 8))
    share = (wet * puddles.clip(0.08, 0.6))[..., None]
    return np.asarray(image * (1 - share) + mirror * share)


def _snow_cover(canvas: Canvas, rng: np.random.Generator) -> Array:
    """Snow cover of each pixel, 0–1."""
    label, depth = canvas.label, canvas.depth
    lying = np.zeros(256, np.float32)
    for name, share in (("terrain", 0.95), ("sidewalk", 0.72), ("road", 0.48), ("vegetation", 0.3)):
        lying[LABELS[name]] = share
    uneven = 1 + 0.12 * _soft_noise(rng, label.shape, cells=(30, 24))
    columns = np.arange(label.shape[1], dtype=np.float32) - canvas.center
    x = columns * depth / canvas.focal - canvas.bend / 2 * depth**2
    tracks = 0.2 * np.cos(x * 2 * np.pi / 1.65) * (label == LABELS["road"])  # wheel tracks
    cover = lying[label] * uneven + tracks
    cover[_catches_snow(canvas)] = 0.92
    return np.asarray(cover.clip(0, 0.96))


def _catches_snow(canvas: Canvas) -> Array:
    """Mask of upper edges, where the pixel above is much farther away: roofs, copings, bonnets and crowns."""
    height = len(canvas.label)
    bare = [LABELS[name] for name in ("sky", "person", "rider", "road", "sidewalk", "ignore")]
    caps = np.zeros(canvas.label.shape, bool)
    for rows in sorted({max(1, height // 110), max(1, height // 55)}):
        above = np.vstack([canvas.depth[:rows], canvas.depth[:-rows]])
        thick_enough = canvas.focal * 0.22 / canvas.depth >= rows - 0.8
        caps |= thick_enough & (above > canvas.depth * 1.15 + 1)
    return caps & ~np.isin(canvas.label, bare)


def _streaks(shape: tuple[int, int], rng: np.random.Generator) -> Array:
    height, width = shape
    layer = np.zeros(shape, np.uint8)
    slant = rng.uniform(-0.25, 0.25)
    for _ in range(int(rng.uniform(120, 260))):
        x, y, length = rng.uniform(0, width), rng.uniform(-0.1, 1) * height, rng.uniform(0.03, 0.1) * height
        end = (int(x + slant * length), int(y + length))
        cv2.line(layer, (int(x), int(y)), end, int(rng.uniform(25, 80)), max(1, height // 300), cv2.LINE_AA)
    return layer.astype(np.float32) / 255


def _flakes(shape: tuple[int, int], rng: np.random.Generator) -> Array:
    height, width = shape
    layer = np.zeros(shape, np.uint8)
    for _ in range(int(rng.uniform(150, 420))):
        near = rng.random() ** 4
        middle = (int(rng.uniform(0, width) * 16), int(rng.uniform(0, height) * 16))
        radius = int(16 * height * (0.0022 + 0.008 * near))
        cv2.circle(layer, middle, radius, int(230 - 110 * near), -1, cv2.LINE_AA, 4)
    return cv2.blur(layer, (3, 3)).astype(np.float32) / 255


def _soft_noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Smooth noise of about unit variance, with ``cells`` (rows, columns)."""
    coarse = rng.normal(0, 1, cells).astype(np.float32)
    return np.asarray(cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC))
