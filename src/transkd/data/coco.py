"""COCO annotations, polygons and RLE, drawn to label maps once."""

import hashlib
import importlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from transkd.data.folder import BySplit, of_split
from transkd.data.listing import Pair, elsewhere, find_files, named
from transkd.data.reading import read_size
from transkd.data.writing import save_png
from transkd.errors import UserError
from transkd.files import write_atomically
from transkd.outputs import IGNORE

__all__ = ["find_coco"]

INDEX = "images.txt"  # written last: the label maps are complete


def find_coco(
    root: str | Path,
    split: str,
    names: Sequence[str],
    images: BySplit = "{split}2017",
    annotations: BySplit = "annotations/instances_{split}2017.json",
    categories: Mapping[str, str | None] | None = None,
    background: str | None = None,
    masks: str = "label_maps",
) -> list[Pair]:
    """Find the images of an annotation file, and draw their annotations to label maps unless that is done.

    Small annotations lie over large ones. The maps lie in ``<root>/<masks>/<file>_<hash>/``; the hash is that of the
    annotation file and of the settings, so a changed one is drawn anew.

    Args:
        root: folder of the data set.
        split: "train" or "val"; replaces ``{split}``.
        names: class names, in the order of their ids.
        images: folder of the images, for all splits or each.
        annotations: annotation file, likewise.
        categories: class of a category, or null = ignored; without an entry a category is the class of its name.
        background: class of the pixels without an annotation; null: they are ignored.
        masks: folder for the label maps.

    Raises:
        UserError: pycocotools is not installed; a file is missing or not as COCO has it; a category has no class;
            images are missing or of another size than the file says.
    """
    root, categories = Path(root), {str(name): of for name, of in (categories or {}).items()}  # YAML's 1 is a number
    path = root / of_split(annotations, split, "data.find.annotations")
    folder = root / of_split(images, split, "data.find.images")
    if not path.is_file() or not folder.is_dir():
        places = [os.path.relpath(place, root) for place in (folder, path)]
        raise UserError(
            f"no COCO data under data.root={root}: expected images in {places[0]} and annotations in {places[1]}; "
            f"data.find.images and data.find.annotations say where they are{elsewhere(root, *places)}"
        )
    content = path.read_bytes()
    settings = json.dumps([list(names), categories, background, 1])
    key = hashlib.sha256(content + settings.encode()).hexdigest()[:12]
    target = root / masks / f"{path.stem}_{key}"
    files = {named(file.relative_to(folder).as_posix()): file for file in find_files(folder)}
    if not (target / INDEX).is_file():
        data = _loaded(content, path)
        _check_images(data["images"], files, path, folder)
        _draw(data, path, target, _class_ids(names, categories, background))
    listed = (target / INDEX).read_text(encoding="utf-8").splitlines()
    _check_names(listed, files, path, folder)
    return [Pair(files[named(name)], target / f"{name}.png") for name in listed]


def _class_ids(
    names: Sequence[str], categories: Mapping[str, str | None], background: str | None
) -> dict[str | None, int]:
    """Class id of each category name; of None that of the background."""
    ids: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    unknown = {str(name) for name in (*categories.values(), background) if name is not None and name not in ids}
    if unknown:
        raise UserError(
            f"data.find.categories or data.find.background names {', '.join(sorted(unknown))}, no class; there are "
            f"{', '.join(names)}"
        )
    for category, name in categories.items():
        ids[category] = IGNORE if name is None else names.index(name)
    ids[None] = IGNORE if background is None else names.index(background)
    return ids


def _loaded(content: bytes, path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(content)
        for category in data["categories"]:
            category |= {"id": category["id"], "name": str(category["name"])}
        for image in data["images"]:  # some tools write 480.0
            image |= {"id": image["id"], "height": int(image["height"]), "width": int(image["width"])}
            named(image["file_name"])
        _ = [(a["image_id"], a["category_id"], a["segmentation"]) for a in data["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a COCO file with images, categories and annotations that have a segmentation "
            f"({type(error).__name__}: {error})"
        ) from error
    return data


def _draw(data: dict[str, Any], path: Path, target: Path, ids: Mapping[str | None, int]) -> None:
    """Write the label map of every image of an annotation file."""
    try:
        mask_tools = importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise UserError(f"drawing {path.name} needs pycocotools: pip install 'transkd[coco]'") from error
    without = [c["name"] for c in data["categories"] if c["name"] not in ids]
    if without:
        raise UserError(
            f"{path} has categories that are no class: {', '.join(without[:8])}{' …' if len(without) > 8 else ''}; add "
            f"them to data.classes.names, or say 'data.find.categories={{{without[0]}: CLASS}}' (null = ignored)"
        )
    classes = {c["id"]: ids[c["name"]] for c in data["categories"]}
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in data["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    console = Console(stderr=True)
    for image in track(
        data["images"], "Drawing labels", transient=True, console=console, disable=not console.is_terminal
    ):
        label = np.full((image["height"], image["width"]), ids[None], dtype=np.uint8)
        drawn = []
        for annotation in by_image[image["id"]]:
            mask = _mask(annotation, image, path, mask_tools)
            if annotation["category_id"] not in classes:
                raise UserError(
                    f"{path}: an annotation has the category {annotation['category_id']}, which is not listed"
                )
            drawn.append((int(mask.sum()), mask, classes[annotation["category_id"]]))
        for _, mask, class_id in sorted(drawn, key=lambda entry: -entry[0]):
            label[mask] = class_id
        save_png(label, target / f"{image['file_name']}.png", compress_level=3)
    names = "".join(f"{name}\n" for name in sorted(image["file_name"] for image in data["images"]))
    write_atomically(target / INDEX, names.encode())


def _check_names(names: Sequence[str], files: Mapping[str, Path], path: Path, folder: Path) -> None:
    """Refuse images that are not there, or are there twice."""
    missing = [name for name in names if named(name) not in files]
    if missing or not names:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{path} lists {len(names)} images, of which {len(missing)} are not in {folder}: "
            f"{', '.join(missing[:3]) or 'none'}{more}; data.find.images says where they are"
        )
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"{path} lists the image {twice} twice; merge the two entries")


def _check_images(images: Sequence[dict[str, Any]], files: Mapping[str, Path], path: Path, folder: Path) -> None:
    """Refuse images that are missing or have another size than the annotation file says."""
    _check_names([image["file_name"] for image in images], files, path, folder)
    for image in images:
        said, file = (image["height"], image["width"]), files[named(image["file_name"])]
        (height, width), orientation = read_size(file)
        if said != (height, width) and (orientation == 1 or said != (width, height)):
            raise UserError(
                f"{path} says that {image['file_name']} is {said[0]}×{said[1]}, but {file} is {height}×{width}: the "
                "annotations belong to other images or to resized ones"
            )


def _mask(annotation: dict[str, Any], image: dict[str, Any], path: Path, mask_tools: Any) -> npt.NDArray[np.bool_]:
    """Pixels [H, W] of an annotation."""
    stored, size = annotation["segmentation"], (image["height"], image["width"])
    try:
        if isinstance(stored, list):  # the polygons of one object
            if any(isinstance(polygon[0], list) for polygon in stored if len(polygon)):
                raise TypeError("corners [x, y] in lists; expected x, y, x, y, …")
            polygons = [polygon for polygon in stored if len(polygon) >= 6]
            if not polygons:
                return np.zeros(size, dtype=bool)
            parts = mask_tools.frPyObjects(polygons, *size)
            return np.asarray(mask_tools.decode(mask_tools.merge(parts)), dtype=bool)
        if isinstance(stored["counts"], list):
            stored = mask_tools.frPyObjects(stored, *size)
        mask = np.asarray(mask_tools.decode(stored), dtype=bool)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path}: the segmentation of an annotation of {image['file_name']} is neither polygons nor RLE ({error})"
        ) from error
    if mask.shape != size:
        raise UserError(
            f"{path}: an RLE of {image['file_name']} is {mask.shape[0]}×{mask.shape[1]}, the image {size[0]}×{size[1]}"
        )
    return mask
