"""Data set of image and label files, paired by name and validated when read."""

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from transkd.data.classes import ClassSet
from transkd.data.geometry import ImageTransform, transform_both
from transkd.errors import UserError
from transkd.outputs import IGNORE

__all__ = [
    "IMAGE_SUFFIXES",
    "Batch",
    "Pair",
    "PlacedBatch",
    "SegmentationDataset",
    "is_image",
    "pair_by_name",
    "read_image",
    "seed_transform",
]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files, in lower case."""

_UNKNOWN = 254  # marks label values outside the classes


class Pair(NamedTuple):
    """Paths of an image and its label."""

    image: Path
    label: Path


class Batch(NamedTuple):
    """One sample, or a batch of them.

    Attributes:
        image: RGB uint8 [B, 3, H, W].
        target: class ids with 255 = ignore, [B, H, W], uint8 from the loader, int64 on the device.
        name: path of each image, for messages.
    """

    image: Tensor
    target: Tensor
    name: Any


class PlacedBatch(NamedTuple):
    """A ``Batch`` whose images were padded, flipped or turned, and its labels not.

    Attributes:
        image: as in ``Batch``.
        target: as in ``Batch``, at the labels' own size.
        name: as in ``Batch``.
        place: by which ``transkd.layers.restored`` brings scores to the labels, [B, 2, 3].
    """

    image: Tensor
    target: Tensor
    name: Any
    place: Tensor


def is_image(path: Path) -> bool:
    """Whether a path has the suffix of an image file, in upper or lower case.

    Example:
        >>> is_image(Path("street.JPG")), is_image(Path("train.txt"))
        (True, False)
    """
    return path.suffix.lower() in IMAGE_SUFFIXES


def pair_by_name(images: Mapping[str, Path], labels: Mapping[str, Path]) -> list[Pair]:
    """Pair images and labels by their common key and sort the pairs by key.

    Raises:
        UserError: an image has no label or a label no image; the message lists them.
    """
    unpaired = [f"image without a label: {images[key]}" for key in sorted(images.keys() - labels.keys())]
    unpaired += [f"label without an image: {labels[key]}" for key in sorted(labels.keys() - images.keys())]
    if unpaired:
        more = f"; and {len(unpaired) - 6} more" if len(unpaired) > 6 else ""
        raise UserError(f"images and labels must come in pairs of the same name; {'; '.join(unpaired[:6])}{more}")
    return [Pair(images[key], labels[key]) for key in sorted(images)]


def read_image(path: str | Path, mode: str | None = "RGB") -> npt.NDArray[np.uint8]:
    """Read an image: [H, W, 3] uint8 for mode "RGB", the stored values for None.

    Raises:
        UserError: the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode) if mode else image)
    except FileNotFoundError as error:
        raise UserError(f"image not found: {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: damaged, truncated or not an image ({error})") from error


def seed_transform(transform: Any, seed: int) -> None:
    """Seed an Albumentations transform so that its parts draw one after the other.

    Its own ``set_random_seed`` gives every part the same numbers: images would be flipped if and only if scaled down.
    """
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))


class SegmentationDataset(Dataset[Batch | PlacedBatch]):
    """Images with label maps of class ids.

    Args:
        pairs: paths of images and labels, see ``pair_by_name``.
        classes: names and colours of the label values 0 … K-1; 255 is ignored.
        void: other label values to ignore.
        transform: Albumentations transform of image and label.
        transform_labels: False leaves the label at its original size, for scores at full resolution; what the transform
            does to the image must then be possible to undo (``transkd.data.geometry``).
        ignore_padding: whether padding has the label 255 whatever the transform fills it with; for evaluation.

    Attributes:
        frame: gives image and label before the transform: ``read``, or a cache of its results (``data.feeding``).

    Keys are an index, or a pair of index and augmentation seed (``transkd.data.datamodule.SeededSampler``).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: ClassSet,
        void: Sequence[int] = (),
        transform: Any = None,
        transform_labels: bool = True,
        ignore_padding: bool = False,
    ) -> None:
        self.pairs = list(pairs)
        self.classes = classes
        self.transform_labels, self.ignore_padding = transform_labels, ignore_padding
        self._ids = np.full(256, _UNKNOWN, dtype=np.uint8)
        self._ids[: len(classes.names)] = np.arange(len(classes.names))
        self._ids[[IGNORE, *void]] = IGNORE
        self.use_frames(self.read, transform)

    def use_frames(
        self, frame: Callable[[int], tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]], transform: Any
    ) -> None:
        """Take image and label of an index from ``frame``, such as a cache, and apply this transform to them."""
        self.frame, self.transform = frame, transform
        alone = transform is not None and not self.transform_labels
        self._image_transform = ImageTransform(transform) if alone else None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def label_table(self) -> npt.NDArray[np.uint8]:
        """Class id of each of the 256 label values that a file can hold."""
        return self._ids

    def read(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Read image [H, W, 3] and label [H, W] at their size on disk, void label values mapped to 255."""
        pair = self.pairs[index]
        image, stored = read_image(pair.image), read_image(pair.label, mode=None)
        if stored.ndim != 2 or stored.dtype != np.uint8:
            raise UserError(
                f"{pair.label}: a label must be a single-channel 8-bit image of class ids, "
                f"got {stored.dtype} of shape {list(stored.shape)}"
            )
        if stored.shape != image.shape[:2]:
            raise UserError(
                f"image and label differ in size: {pair.image} is {image.shape[0]}×{image.shape[1]}, "
                f"{pair.label} is {stored.shape[0]}×{stored.shape[1]}"
            )
        label = self._ids[stored]
        if (label == _UNKNOWN).any():
            raise UserError(
                f"{pair.label}: label values {np.unique(stored[label == _UNKNOWN]).tolist()} are outside the "
                f"{len(self.classes.names)} classes 0…{len(self.classes.names) - 1} (255 = ignore)"
            )
        return image, label

    def __getitem__(self, key: int | tuple[int, int]) -> Batch | PlacedBatch:
        """Return the transformed sample as tensors."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, label = self.frame(index)
        place = None
        if self._image_transform is not None:
            image, place = self._image_transform(image)
        elif self.transform is not None:
            if seed is not None:
                seed_transform(self.transform, seed)
            if self.ignore_padding:
                image, label = transform_both(self.transform, image, label)
            else:
                transformed = self.transform(image=image, mask=label)
                image, label = transformed["image"], transformed["mask"]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        with warnings.catch_warnings():  # labels may be read-only arrays; they are never written to
            warnings.simplefilter("ignore", UserWarning)
            batch = Batch(pixels, torch.from_numpy(np.ascontiguousarray(label)), str(self.pairs[index].image))
        return batch if place is None else PlacedBatch(*batch, place)
