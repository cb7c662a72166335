"""Synthetic labelled road scenes: a data set for demonstrations and tests without a download.

A scene is a street from the perspective of a car's camera, with all 19 Cityscapes classes, in fog, at night, in rain or
in snow. ``write_road_scenes`` writes a data set in ACDC's folder layout, so that ``find_acdc`` reads it.

The package ``transkd.data.scenes`` draws a scene in these steps: ``ground`` plans the street and draws the ground,
``street`` places the objects, ``vehicles``, ``people`` and ``roadside`` draw one kind of object per function,
``canvas`` rasterises their shapes into image, labels and depth, and ``weather`` renders light and weather from these.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from transkd.data.scenes.canvas import Array, Canvas, pick
from transkd.data.scenes.ground import draw_ground, plan_street
from transkd.data.scenes.street import draw_street
from transkd.data.scenes.weather import WEATHER, draw_sky
from transkd.errors import UserError
from transkd.outputs import IGNORE

__all__ = ["CONDITIONS", "draw_scene", "write_road_scenes"]

CONDITIONS = ("fog", "night", "rain", "snow")
SPLITS = ("train", "val")
MANIFEST = "drawn.json"
FORMAT = 1  # increase it whenever the same seed draws different pixels


def draw_scene(rng: np.random.Generator, height: int, width: int, condition: str) -> tuple[Array, Array]:
    """Draw a scene.

    Args:
        rng: source of all randomness; the same state gives the same pixels.
        height: rows.
        width: columns.
        condition: one of ``CONDITIONS``.

    Returns:
        The image, uint8 RGB [height, width, 3], and its labels, uint8 [height, width]: Cityscapes train ids, and 255 on
        the bonnet of the camera's car.

    Example:
        >>> image, label = draw_scene(np.random.default_rng(0), 64, 128, "snow")
        >>> image.shape, label.shape, image.dtype.name
        ((64, 128, 3), (64, 128), 'uint8')
    """
    if condition not in CONDITIONS:
        raise UserError(f"condition must be one of {', '.join(CONDITIONS)}; got {condition!r}")
    canvas = Canvas.blank(height, width, rng)
    street = plan_street(rng)
    draw_sky(canvas, condition, rng)
    draw_ground(canvas, street, rng)
    draw_street(canvas, street, rng)
    if rng.random() < 0.6:
        _draw_bonnet(canvas, rng)
    image = WEATHER[condition](canvas, rng) + 2 * rng.standard_normal(canvas.image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), canvas.label


def _draw_bonnet(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw the bonnet of the camera's car at the bottom of the image."""
    height, width = canvas.label.shape
    middle = (round(width * rng.uniform(0.47, 0.53)), round(height * 1.06))
    axes = (round(width * 0.62), round(height * rng.uniform(0.11, 0.15)))
    color = np.array(pick(rng, [(36, 38, 42), (70, 72, 76), (28, 34, 50)]), float)
    for ring in range(6):  # lighter towards the windscreen: reflection of the sky
        shrunk = (axes[0], round(axes[1] * (1 - 0.09 * ring)))
        shade = (color * (0.75 + 0.12 * ring)).tolist()
        cv2.ellipse(canvas.image, middle, shrunk, 0, 0, 360, shade, -1, cv2.LINE_AA)
    for layer, value in ((canvas.label, IGNORE), (canvas.depth, 2), (canvas.light, (0, 0, 0))):
        cv2.ellipse(layer, middle, axes, 0, 0, 360, value, -1)


def write_road_scenes(
    root: str | Path, train: int = 240, val: int = 60, height: int = 192, width: int = 384, seed: int = 0
) -> Path:
    """Write a data set in ACDC's folder layout, with the four conditions in equal shares.

    Each image depends only on the seed, its split and its index. The data set is written to a temporary folder next to
    ``root`` and renamed when complete; later calls with the same settings return immediately.

    Args:
        root: folder of the data set; must not exist, be empty, or hold a data set written with the same settings.
        train: number of training images.
        val: number of validation images.
        height: rows of each image.
        width: columns of each image.
        seed: seed of the data set.

    Returns:
        ``root`` as a path.

    Raises:
        UserError: a setting is out of range, or ``root`` holds other files; nothing is overwritten.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> root = write_road_scenes(Path(folder.name) / "drawn", train=4, val=0, height=32, width=64)
        >>> sorted(path.name for path in root.glob("rgb_anon/fog/train/*/*.png"))
        ['DRAWN0001_frame_000000_rgb_anon.png']
        >>> folder.cleanup()
    """
    root = Path(root).expanduser()
    settings = {"format": FORMAT, "train": train, "val": val, "height": height, "width": width, "seed": seed}
    _check_settings(settings)
    if _already_drawn(root, settings):
        return root
    scratch = root.absolute().with_name(f".{root.absolute().name}.{uuid.uuid4().hex[:8]}")
    try:
        _draw_split(scratch, "train", train, settings)
        _draw_split(scratch, "val", val, settings)
        (scratch / MANIFEST).write_text(json.dumps(settings, indent=2) + "\n")
        _move_into_place(scratch, root, settings)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return root


def _draw_split(root: Path, split: str, count: int, settings: dict[str, int]) -> None:
    sequence = f"DRAWN{SPLITS.index(split) + 1:04d}"
    console = Console(stderr=True)
    indices = track(
        range(count),
        f"Drawing {split} scenes",
        transient=True,
        console=console,
        disable=not console.is_terminal,
    )
    for index in indices:
        condition = CONDITIONS[index % len(CONDITIONS)]
        rng = np.random.default_rng([settings["seed"], SPLITS.index(split), index])
        image, label = draw_scene(rng, settings["height"], settings["width"], condition)
        stem = f"{sequence}_frame_{index:06d}"
        for kind, suffix, pixels in (("rgb_anon", "rgb_anon", image), ("gt", "gt_labelTrainIds", label)):
            folder = root / kind / condition / split / sequence
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{stem}_{suffix}.png", compress_level=3)


def _check_settings(settings: dict[str, int]) -> None:
    smallest = {"format": 1, "train": 0, "val": 0, "height": 32, "width": 32, "seed": 0}
    for name, value in settings.items():
        if value < smallest[name]:
            raise UserError(f"road scenes need {name} ≥ {smallest[name]}; got {value}")


def _already_drawn(root: Path, settings: dict[str, int]) -> bool:
    """True if root holds a data set with these settings, False if it is empty; otherwise an error."""
    manifest = root / MANIFEST
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not manifest.is_file():
        raise UserError(
            f"{root} holds other files (it has no {MANIFEST}), so no road scenes are written there. "
            "Choose another folder."
        )
    found = _read_manifest(manifest)
    if found != settings:
        raise UserError(
            f"{root} was drawn with {_describe(found)}, but {_describe(settings)} is requested. "
            "Choose another folder or delete that one."
        )
    return True


def _read_manifest(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {"settings": "unreadable"}


def _describe(settings: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in dict(settings).items())


def _move_into_place(scratch: Path, root: Path, settings: dict[str, int]) -> None:
    try:
        if root.exists():
            root.rmdir()  # empty, see _already_drawn; os.replace does not replace folders on Windows
        os.replace(scratch, root)
    except OSError:
        if not _already_drawn(root, settings):  # another process wrote the same data set meanwhile
            raise
