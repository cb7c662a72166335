"""Zip files of predicted class ids for the test servers of Cityscapes and ACDC."""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from transkd.data.writing import as_png
from transkd.errors import UserError
from transkd.files import write_atomically

__all__ = ["ARCHIVES", "check_archive", "write_archive"]


class Archive(NamedTuple):
    """What a test server expects.

    Attributes:
        name: regular expression of an image's name without suffix; its group is kept.
        member: name of a prediction in the zip file, ``{}`` being that group.
        ids: value in the file of each of the 19 classes.
        images: images of the test split.
    """

    name: str
    member: str
    ids: Sequence[int]
    images: int


ARCHIVES: Mapping[str, Archive] = {
    "cityscapes": Archive(
        r"(.+_\d{6}_\d{6})(?:_leftImg8bit)?",
        "{}_pred_labelIds.png",
        (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
        1525,
    ),
    "acdc": Archive(r"(.+_rgb_anon)", "labelTrainIds/{}.png", range(19), 2000),
}
"""Cityscapes: label ids, a PNG ``<city>_<sequence>_<frame>*.png`` an image. ACDC: train ids, names as the images."""


def check_archive(kind: str, classes: int, images: Sequence[Path]) -> None:
    """Check that predictions for these images can be submitted.

    Raises:
        UserError: the network does not have the 19 classes, an image is not named as in the data set, or two have the
            same name.
    """
    archive = ARCHIVES[kind]
    if classes != len(archive.ids):
        raise UserError(
            f"archive={kind} needs a network of the {len(archive.ids)} Cityscapes classes, this has {classes}"
        )
    seen: dict[str, Path] = {}
    for image in images:
        member = _member(archive, image)
        if member is None:
            example = {
                "cityscapes": "berlin_000000_000019_leftImg8bit.png",
                "acdc": "GOPR0122_frame_000161_rgb_anon.png",
            }
            raise UserError(f"archive={kind}: {image} is not named as in the data set; expected {example[kind]}")
        if seen.setdefault(member, image) != image:
            raise UserError(f"archive={kind}: {seen[member]} and {image} would have the same name; predict one split")


def write_archive(kind: str, predictions: Mapping[Path, Path], path: Path) -> str:
    """Write the zip file for a test server.

    Args:
        kind: a name in `ARCHIVES`.
        predictions: file of class ids for each image.
        path: the zip file.

    Returns:
        A line that says how much of the test split it covers.
    """
    archive, content = ARCHIVES[kind], io.BytesIO()
    values = np.array([*archive.ids], dtype=np.uint8)
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:  # PNGs are compressed
        for image, ids in predictions.items():
            member = _member(archive, image)
            assert member is not None
            file.writestr(member, as_png(values[np.asarray(Image.open(ids))]))
    write_atomically(path, content.getbuffer())
    lacking = f"; the server scores all {archive.images}" if len(predictions) != archive.images else ""
    return f"{path} has {len(predictions)} of the {archive.images} test images of {kind}{lacking}"


def _member(archive: Archive, image: Path) -> str | None:
    match = re.fullmatch(archive.name, image.stem)
    return None if match is None else archive.member.format(match[1])
