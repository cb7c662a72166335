"""Coloured label maps, overlays, comparison sheets and training curves."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from transkd.data.classes import CLASS_SETS, ClassSet
from transkd.outputs import IGNORE

__all__ = ["colourise", "draw_curves", "legend_of", "overlay", "palette_of", "save_sheet"]

FEW = 20  # points of a curve, so few that each is marked; a single one has no line
ENOUGH = 700  # pixels of width of a picture in a sheet; matplotlib is slow at shrinking large ones
Pixels = npt.NDArray[np.uint8]


def palette_of(card: Mapping[str, Any]) -> Sequence[Sequence[int]]:
    """Palette of a network: from its card, from a label set with the same class names, or generated hues."""
    if card.get("palette"):
        return card["palette"]
    for classes in CLASS_SETS.values():
        if list(classes.names) == card.get("class_names"):
            return classes.palette
    # golden-ratio steps: distinct hues for consecutive ids
    hues = [(i * 0.618034) % 1 for i in range(card["num_classes"])]
    return [[round(255 * part) for part in hsv_to_rgb(hue, 0.75, 0.9)] for hue in hues]


def colourise(label: Pixels, palette: Sequence[Sequence[int]]) -> Pixels:
    """Convert class ids [H, W] to colours [H, W, 3]; 255 is black."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(palette)] = palette
    return colours[label]


def overlay(image: Pixels, colours: Pixels, opacity: float = 0.5) -> Pixels:
    """Blend an image [H, W, 3] with colours of the same size."""
    blended = np.empty_like(image)
    for i in range(0, len(image), 256):  # float64 for a part of the rows at a time
        rows = slice(i, i + 256)
        blended[rows] = (image[rows] * (1 - opacity) + colours[rows] * opacity).round()
    return blended


def legend_of(labels: Iterable[Pixels], classes: ClassSet) -> dict[str, Sequence[int]]:
    """Colours of the classes that occur in label maps, by name; black for what is ignored.

    Example:
        >>> from transkd.data import CAMVID
        >>> legend_of([np.array([[3, 255]], dtype=np.uint8)], CAMVID)
        {'road': (128, 64, 128), 'ignored': (0, 0, 0)}
    """
    present = set().union(*(np.unique(label).tolist() for label in labels))
    named = zip(classes.names, classes.palette, strict=True)
    legend: dict[str, Sequence[int]] = {name: colour for i, (name, colour) in enumerate(named) if i in present}
    return legend | ({"ignored": (0, 0, 0)} if IGNORE in present else {})


def save_sheet(
    rows: Sequence[Sequence[Pixels]],
    titles: Sequence[str],
    path: Path,
    title: str = "",
    legend: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Save a grid of images: a row per sample, a titled column per source, below it what the colours stand for."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = rows[0][0].shape[:2]
    cell = 3.2
    entries = [Patch(facecolor=_rgb(colour), label=name) for name, colour in (legend or {}).items()]
    longest = max(map(len, legend or [""]))
    columns = max(1, int(cell * len(titles) / (0.6 + 0.08 * longest)))  # inches of a patch and of a letter
    lines = -(-len(entries) // columns)
    size = (cell * len(titles), cell * height / width * len(rows) + 0.5 + 0.2 * lines)
    figure = Figure(figsize=size, layout="constrained")
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for axis, picture, heading in zip(axes[i], row, titles, strict=True):
            axis.imshow(Image.fromarray(picture).reduce(max(1, picture.shape[1] // ENOUGH)))
            axis.set_axis_off()
            if i == 0:
                axis.set_title(heading, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _rgb(colour: Sequence[int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def read_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the (step, value) pairs of each metric in a ``metrics.csv``."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    curves[name].append((float(row["step"]), float(value)))
    return dict(curves)


def draw_curves(metrics: Path, path: Path) -> None:
    """Plot losses, validation scores and learning rate of a ``metrics.csv``."""
    from matplotlib.figure import Figure

    curves = read_metrics(metrics)
    panels = {
        "training losses (unweighted)": [n for n in curves if n.startswith("train/") and not n.endswith("_step")],
        "validation": [n for n in curves if n.startswith("val/")],
        "learning rate": [n for n in curves if n.startswith("lr-")],
    }
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (heading, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            mark = "." if len(curves[name]) <= FEW else None
            axis.plot(*zip(*curves[name], strict=True), label=name.removesuffix("_epoch"), linewidth=1.2, marker=mark)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if names:
            axis.legend(fontsize=7)
        if heading.startswith("training"):
            axis.set_yscale("log")
    figure.savefig(path, dpi=110)
