"""Data set of image and label files, paired by name and validated when read."""

import warnings
from collections.abc import Mapping, Sequence
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
    "UNLABELLED_BYTE",
    "Batch",
    "Pair",
    "PlacedBatch",
    "SegmentationDataset",
    "UnpairedError",
    "check_sizes",
    "is_image",
    "pair_by_name",
    "read_image",
]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files, in lower case."""

UNLABELLED_BYTE = 254
"""``transkd.outputs.UNLABELLED`` as uint8, in samples and in batches before they reach the device."""

_UNKNOWN = 254  # marks label values outside the classes


class Pair(NamedTuple):
    """Paths of an image and its label; None for an image without labels."""

    image: Path
    label: Path | None


class UnpairedError(UserError):
    """Images without a label, or labels without an image.

    Attributes:
        unpaired: one line for each of them.
        pairs: the images and labels that do have a counterpart.
    """

    def __init__(self, unpaired: Sequence[str], pairs: Sequence[Pair]) -> None:
        more = f"; and {len(unpaired) - 6} more" if len(unpaired) > 6 else ""
        super().__init__(f"images and labels must come in pairs of the same name; {'; '.join(unpaired[:6])}{more}")
        self.unpaired, self.pairs = list(unpaired), list(pairs)


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
        UnpairedError: an image has no label or a label no image; the message lists them.
    """
    unpaired = [f"image without a label: {images[key]}" for key in sorted(images.keys() - labels.keys())]
    unpaired += [f"label without an image: {labels[key]}" for key in sorted(labels.keys() - images.keys())]
    pairs = [Pair(images[key], labels[key]) for key in sorted(images.keys() & labels.keys())]
    if unpaired:
        raise UnpairedError(unpaired, pairs)
    return pairs


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


def check_sizes(pair: Pair, image: npt.NDArray[np.uint8], label: npt.NDArray[np.uint8]) -> None:
    """Raise a `UserError` unless an image [H, W, 3] and its label [H, W] have the same size."""
    if label.shape != image.shape[:2]:
        raise UserError(
            f"image and label differ in size: {pair.image} is {image.shape[0]}×{image.shape[1]}, "
            f"{pair.label} is {label.shape[0]}×{label.shape[1]}"
        )


class SegmentationDataset(Dataset[Batch | PlacedBatch]):
    """Images with label maps of class ids.

    Args:
        pairs: paths of images and labels, see ``pair_by_name``; those without a label come last.
        classes: names and colours of the label values 0 … K-1; 255 is ignored.
        void: other label values to ignore.
        transform: Albumentations transform of image and label.
        transform_labels: False leaves the label at its original size, for scores at full resolution; what the transform
            does to the image must then be possible to undo (``transkd.data.geometry``).
        ignore_padding: whether padding has the label 255 whatever the transform fills it with; for evaluation.

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
        self.transform = transform
        self.transform_labels, self.ignore_padding = transform_labels, ignore_padding
        self._image_transform = None if transform is None or transform_labels else ImageTransform(transform)
        self._ids = np.full(256, _UNKNOWN, dtype=np.uint8)
        self._ids[: len(classes.names)] = np.arange(len(classes.names))
        self._ids[[IGNORE, *void]] = IGNORE

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def labelled(self) -> int:
        """Number of images with labels."""
        return sum(pair.label is not None for pair in self.pairs)

    def read(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Read image [H, W, 3] and label [H, W] at their size on disk, void label values mapped to 255."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        if pair.label is None:
            return image, np.full(image.shape[:2], UNLABELLED_BYTE, dtype=np.uint8)
        label = self.read_label(pair.label)
        check_sizes(pair, image, label)
        return image, label

    def read_label(self, path: Path) -> npt.NDArray[np.uint8]:
        """Read a label [H, W] as class ids, void label values mapped to 255.

        Raises:
            UserError: the file cannot be read or is no map of class ids, or ids are outside the classes.
        """
        stored = read_image(path, mode=None)
        if stored.ndim != 2 or stored.dtype != np.uint8:
            raise UserError(
                f"{path}: a label must be a single-channel 8-bit image of class ids, "
                f"got {stored.dtype} of shape {list(stored.shape)}"
            )
        label = self._ids[stored]
        if (label == _UNKNOWN).any():
            raise UserError(
                f"{path}: label values {np.unique(stored[label == _UNKNOWN]).tolist()} are outside the "
                f"{len(self.classes.names)} classes 0…{len(self.classes.names) - 1} (255 = ignore)"
            )
        return label

    def __getitem__(self, key: int | tuple[int, int]) -> Batch | PlacedBatch:
        """Return the transformed sample as tensors."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, label = self.read(index)
        place = None
        if self._image_transform is not None:
            image, place = self._image_transform(image)
        elif self.transform is not None:
            if seed is not None:
                self.transform.set_random_seed(seed)
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
