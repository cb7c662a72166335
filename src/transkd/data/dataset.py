"""Data set of image and label files: read, checked, transformed."""

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transkd.data.classes import ClassSet
from transkd.data.geometry import ImageTransform, ignoring_padding
from transkd.data.labels import LabelFormat, LabelReader
from transkd.data.listing import IMAGE_SUFFIXES, Pair, is_image, pair_by_name
from transkd.data.reading import read_image, read_oriented, read_size, read_stored
from transkd.data.transformed import check_image, check_label, transforming

__all__ = [
    "IMAGE_SUFFIXES",
    "UNLABELLED_BYTE",
    "Batch",
    "Pair",
    "PlacedBatch",
    "SegmentationDataset",
    "is_image",
    "pair_by_name",
    "read_image",
    "seed_transform",
]


UNLABELLED_BYTE = 254
"""``transkd.outputs.UNLABELLED`` as uint8, in samples and in batches before they reach the device."""


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
        place: by which ``transkd.layers.restored`` brings scores to the labels, [B, 2, 3]; from the loader the bits of
            float32 as int32, since Lightning rounds all floating-point numbers of a batch to ``trainer.precision``.
    """

    image: Tensor
    target: Tensor
    name: Any
    place: Tensor


def seed_transform(transform: Any, seed: int) -> None:
    """Seed an Albumentations transform so that its parts draw one after the other.

    Its own ``set_random_seed`` gives every part the same numbers: images would be flipped if and only if scaled down.
    """
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))


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
        label: how label files are read.

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
        label: LabelFormat | None = None,
    ) -> None:
        self.pairs = list(pairs)
        self.classes = classes
        self.transform_labels = transform_labels
        self.label_reader = LabelReader(classes, void, label)
        self.use_frames(self.read, ignoring_padding(transform) if ignore_padding else transform)

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
    def labelled(self) -> int:
        """Number of images with labels."""
        return sum(pair.label is not None for pair in self.pairs)

    def read(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Read image [H, W, 3] and label [H, W], upright, at their size on disk: RGB, and ids with 255 = ignore."""
        pair = self.pairs[index]
        image, orientation = read_oriented(pair.image)
        height, width, _ = image.shape
        if pair.label is None:
            return image, np.full((height, width), UNLABELLED_BYTE, dtype=np.uint8)
        return image, self.label_reader.read(pair.label, (height, width), orientation, pair.image)

    def read_label(self, index: int) -> npt.NDArray[np.uint8]:
        """Read the label that `read` gives; of its image only the header."""
        pair = self.pairs[index]
        size, orientation = read_size(pair.image)
        if pair.label is None:
            return np.full(size, UNLABELLED_BYTE, dtype=np.uint8)
        return self.label_reader.read(pair.label, size, orientation, pair.image)

    def check(self, images: int = 16) -> None:
        """Check some labels and the first transformed sample, before anything long begins.

        Raises:
            UserError: labels have values, colours or a palette that are not the classes', or the transform gives what
                the networks do not take.
        """
        labels = [pair.label for pair in self.pairs if pair.label is not None]
        step = max(1, len(labels) // images)
        paths = [label for label in labels[::step][:images] if label.suffix.lower() != ".txt"]
        self.label_reader.check_masks((path, read_stored(path)) for path in paths)
        _ = self[0]

    def __getitem__(self, key: int | tuple[int, int]) -> Batch | PlacedBatch:
        """Return the transformed sample as tensors."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, label = self.frame(index)
        place = None
        with transforming(self.pairs[index].image, image):
            if self._image_transform is not None:
                image, place = self._image_transform(image)
            elif self.transform is not None:
                image, label = self._transformed(image, label, seed)
        check_image(image)
        check_label(label)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        with warnings.catch_warnings():  # labels may be read-only arrays; they are never written to
            warnings.simplefilter("ignore", UserWarning)
            batch = Batch(pixels, torch.from_numpy(np.ascontiguousarray(label)), str(self.pairs[index].image))
        return batch if place is None else PlacedBatch(*batch, place)

    def _transformed(
        self, image: npt.NDArray[np.uint8], label: npt.NDArray[np.uint8], seed: int | None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        if seed is not None:
            seed_transform(self.transform, seed)
        transformed = self.transform(image=image, mask=label)
        return transformed["image"], transformed["mask"]
