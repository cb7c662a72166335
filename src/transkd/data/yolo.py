"""Polygons in the text files of YOLO segmentation."""

from pathlib import Path

from transkd.data.folder import BySplit, of_split
from transkd.data.listing import Pair, elsewhere, matching, pair_by_name
from transkd.errors import UserError

__all__ = ["find_yolo"]


def find_yolo(
    root: str | Path,
    split: str,
    images: BySplit = "images/{split}",
    labels: BySplit = "labels/{split}",
    without_label: str = "refuse",
) -> list[Pair]:
    """Find images and their files of polygons, ``labels/<split>/<name>.txt``.

    A line of such a file is a class id and the corners x y of a polygon, from 0 to 1 over the upright image. Small
    polygons lie over large ones. Pixels outside all of them have the label 255, ignored; ``data.label.ids`` with a key
    255 makes them a class.

    Args:
        root: folder of the data set.
        split: "train" or "val".
        images: pattern of the images, as of ``find_folder``.
        labels: pattern of the text files.
        without_label: an image without a text file: "refuse", or "skip" to leave it out. An empty text file says that
            an image shows no object.

    Raises:
        UserError: nothing matches, or an image or text file has no counterpart.
    """
    if without_label not in ("refuse", "skip"):
        raise UserError(f"data.find.without_label={without_label}: expected refuse or skip")
    root, patterns = (
        Path(root),
        [of_split(images, split, "data.find.images"), of_split(labels, split, "data.find.labels")],
    )
    pictures, texts = matching(root, patterns[0]), matching(root, patterns[1], [".txt"])
    if not pictures or not texts:
        raise UserError(
            f"no {'text files of polygons' if pictures else 'images'} under data.root={root}: expected images in "
            f"{patterns[0]} and <name>.txt in {patterns[1]}{elsewhere(root, *patterns)}"
        )
    if without_label == "skip":
        pictures = {key: path for key, path in pictures.items() if key in texts}
    return pair_by_name(pictures, texts)
