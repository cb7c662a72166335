"""Mapillary Vistas (Neuhold et al., ICCV 2017), versions 1.2 and 2.0, with the classes of its configuration file."""

import json
from pathlib import Path
from typing import Any

from transkd.data.classes import ClassSet
from transkd.data.folder import find_by_pattern
from transkd.data.labels import LabelFormat
from transkd.data.listing import Pair, elsewhere
from transkd.errors import UserError

__all__ = ["find_mapillary", "mapillary_classes", "mapillary_label"]

FOLDERS = {"train": "training", "val": "validation"}


def find_mapillary(root: str | Path, split: str, version: str = "v2.0") -> list[Pair]:
    """Find images ``training/images/*.jpg`` and labels ``training/v2.0/labels/*.png``.

    Version 1.2 may also have its labels in ``training/labels/``, as its first archive has.

    Args:
        root: folder with ``training/``, ``validation/`` and ``config_v2.0.json``.
        split: "train" (18,000 images) or "val" (2,000).
        version: "v1.2" or "v2.0".

    Raises:
        UserError: the folder does not have that layout, or an image or label has no counterpart.
    """
    root, folder = Path(root), FOLDERS.get(split, split)
    labels = f"{folder}/{_known(version)}/labels/*.png"
    if version == "v1.2" and not (root / folder / version).is_dir():
        labels = f"{folder}/labels/*.png"
    return find_by_pattern(
        root,
        split,
        f"{folder}/images/*.jpg",
        labels,
        about=f"Mapillary Vistas {version}",
        note="get it from mapillary.com/dataset/vistas",
    )


def mapillary_classes(root: str | Path, version: str = "v2.0") -> ClassSet:
    """Names and colours of the evaluated classes, in the order of the data set's configuration file.

    Raises:
        UserError: the file does not exist or is not the data set's.
    """
    evaluated = [label for label in _labels(Path(root), version) if label["evaluate"]]
    colours = [tuple(label["color"]) for label in evaluated]
    return ClassSet(tuple(label["readable"] for label in evaluated), tuple((r, g, b) for r, g, b in colours))


def mapillary_label(root: str | Path, version: str = "v2.0") -> LabelFormat:
    """Map of the stored ids to the evaluated classes; the others are ignored.

    Raises:
        UserError: the configuration file does not exist or is not the data set's.
    """
    labels = _labels(Path(root), version)
    evaluated = [value for value, label in enumerate(labels) if label["evaluate"]]
    ids: dict[int | str, int | str | None] = dict.fromkeys(range(len(labels)))
    return LabelFormat(ids=ids | {value: i for i, value in enumerate(evaluated)}, colors=False)


def _known(version: str) -> str:
    if version not in ("v1.2", "v2.0"):
        raise UserError(f"Mapillary Vistas has no version {version}; there are v1.2 and v2.0")
    return version


def _labels(root: Path, version: str) -> list[dict[str, Any]]:
    names = [f"config_{_known(version)}.json", *(["config.json"] if version == "v1.2" else [])]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise UserError(
            f"no {' or '.join(names)} under data.root={root}, which has the classes of Mapillary Vistas {version}; "
            f"data.find.version=v1.2 or v2.0 chooses{elsewhere(root, names[0])}"
        )
    try:
        labels: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["labels"]
        _ = [(label["readable"], label["evaluate"], [int(part) for part in label["color"]]) for label in labels]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration file of Mapillary Vistas ({error})") from error
    return labels
