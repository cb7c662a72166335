"""Drawn, labelled road scenes: a data set for demonstrations and tests that needs no download.

A scene is a street as a car's camera sees it, with all 19 classes of Cityscapes, in fog, at night, in rain
or in snow. ``write_road_scenes`` lays a set of them out as ACDC does, so that what reads ACDC reads them.

How a scene comes about: ``scene_ground`` plans a street and paints its ground, ``scene_street`` says who and
what is where, ``scene_vehicles``, ``scene_people`` and ``scene_roadside`` draw one object a function,
``scene_canvas`` puts their shapes into picture, labels and depth, and ``scene_weather`` turns these into the
picture that a camera would take.
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
FORMAT = 1  # raise it whenever the same seed draws other pixels


def draw_scene(rng: np.random.Generator, height: int, width: int, condition: str) -> tuple[Array, Array]:
    """Draw one street.

    Args:
        rng: decides everything about the scene; the same state gives the same bytes.
        height: rows.
        width: columns.
        condition: one of ``CONDITIONS``.

    Returns:
        The picture, uint8 RGB [height, width, 3], and its labels, uint8 [height, width]: train ids of
        Cityscapes, and 255 on the camera car's own bonnet.

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
    """The front of the camera's own car at the bottom of the picture."""
    height, width = canvas.label.shape
    middle = (round(width * rng.uniform(0.47, 0.53)), round(height * 1.06))
    axes = (round(width * 0.62), round(height * rng.uniform(0.11, 0.15)))
    color = np.array(pick(rng, [(36, 38, 42), (70, 72, 76), (28, 34, 50)]), float)
    for ring in range(6):  # lighter towards the windscreen, where the sky is mirrored
        shrunk = (axes[0], round(axes[1] * (1 - 0.09 * ring)))
        shade = (color * (0.75 + 0.12 * ring)).tolist()
        cv2.ellipse(canvas.image, middle, shrunk, 0, 0, 360, shade, -1, cv2.LINE_AA)
    for layer, value in ((canvas.label, IGNORE), (canvas.depth, 2), (canvas.light, (0, 0, 0))):
        cv2.ellipse(layer, middle, axes, 0, 0, 360, value, -1)


def write_road_scenes(
    root: str | Path, train: int = 240, val: int = 60, height: int = 192, width: int = 384, seed: int = 0
) -> Path:
    """Draw a data set once, in ACDC's folder layout, spread evenly over the four conditions.

    Each picture depends on the seed, its split and its index alone. The set is drawn into a temporary folder
    beside ``root`` and moved there when complete; a later call with the same settings returns at once.

    Args:
        root: folder of the set; must be new, empty or drawn earlier with the same settings.
        train: number of training pictures.
        val: number of validation pictures.
        height: rows of each picture.
        width: columns of each picture.
        seed: which set to draw.

    Returns:
        ``root`` as a path.

    Raises:
        UserError: for impossible settings, and where ``root`` holds anything else; nothing is overwritten.

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
            raise UserError(f"drawn road scenes need {name} ≥ {smallest[name]}; got {value}")


def _already_drawn(root: Path, settings: dict[str, int]) -> bool:
    """True for a finished set with these settings, False for a free place; anything else is an error."""
    manifest = root / MANIFEST
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not manifest.is_file():
        raise UserError(
            f"{root} holds other files (there is no {MANIFEST} in it), so no road scenes are drawn there. "
            "Choose another folder."
        )
    found = _read_manifest(manifest)
    if found != settings:
        raise UserError(
            f"{root} was drawn with {_in_words(found)}, but {_in_words(settings)} is asked for. "
            "Choose another folder or delete that one."
        )
    return True


def _read_manifest(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {"settings": "unreadable"}


def _in_words(settings: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in dict(settings).items())


def _move_into_place(scratch: Path, root: Path, settings: dict[str, int]) -> None:
    try:
        if root.exists():
            root.rmdir()  # empty, as checked; Windows replaces no folder
        os.replace(scratch, root)
    except OSError:
        if not _already_drawn(root, settings):  # another process drew the same set meanwhile
            raise
