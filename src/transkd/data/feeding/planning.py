"""The workers' half of augmentation on the device: its random numbers, drawn without touching a pixel."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transkd.data.dataset import SegmentationDataset
from transkd.data.transformed import transforming
from transkd.errors import UserError

__all__ = ["OUTSIDE", "Axis", "Jitter", "Plan", "PlannedBatch", "PlannedDataset", "PlannedSample", "collate_planned"]

OUTSIDE = -1  # marks positions that are filled

Pixels = npt.NDArray[np.uint8]
Jitter = tuple[Sequence[int], Sequence[float]] | tuple[()]
"""Order and factors of brightness, contrast, saturation and hue; empty leaves the image as it is."""


class Axis:
    """Rows or columns of an image under geometric transforms: which position of the scaled image each one shows.

    Args:
        size: number of rows or columns.

    Example:
        >>> axis = Axis(4)
        >>> axis.shift(1), axis.flip()
        (None, None)
        >>> axis.positions.tolist()
        [2, 1, 0, -1]
    """

    def __init__(self, size: int) -> None:
        self.size = self.scaled = size
        self.positions = np.arange(size)

    def scale(self, factor: float) -> None:
        """Resize by a factor; only before the other methods."""
        self.scaled = int(self.size * factor)
        self.positions = np.arange(self.scaled)

    def pad(self, before: int, after: int) -> None:
        """Add filled positions."""
        self.positions = np.pad(self.positions, (before, after), constant_values=OUTSIDE)

    def crop(self, start: int, stop: int) -> None:
        """Keep a part."""
        self.positions = self.positions[start:stop]

    def flip(self) -> None:
        """Reverse the order."""
        self.positions = self.positions[::-1]

    def shift(self, by: int) -> None:
        """Move the content forwards, or backwards if negative; what leaves the image is lost."""
        length = len(self.positions)
        self.pad(max(0, by), max(0, -by))
        self.crop(max(0, -by), max(0, -by) + length)

    def linear(self) -> npt.NDArray[np.float64]:
        """Coordinates in the image for bilinear interpolation with half-pixel centres."""
        return np.clip((self.positions + 0.5) * (self.size / self.scaled) - 0.5, 0, self.size - 1)

    def nearest(self) -> npt.NDArray[np.int64]:
        """Indices in the image for nearest neighbours as OpenCV computes them; ``OUTSIDE`` where filled."""
        found = np.floor(self.positions * (1 / (self.scaled / self.size))).astype(np.int64)
        return np.where(self.positions == OUTSIDE, OUTSIDE, np.minimum(found, self.size - 1))


class Plan(NamedTuple):
    """How to make one augmented sample from a frame."""

    rows: Axis
    columns: Axis
    colours: list[Pixels | Jitter]  # one of each colour transform: a table of 256 values, or factors


class PlannedSample(NamedTuple):
    """The part of a frame that an augmented sample shows, and how to make it from that.

    Attributes:
        image: uint8 [H, W, 3].
        target: uint8 [H, W].
        name: path of the image, for messages.
        rows: coordinate of each row of the sample, float32 [h].
        columns: likewise, [w].
        target_rows: index of each row of the sample's label, int64 [h]; ``OUTSIDE`` where filled.
        target_columns: likewise, [w].
        colours: a table [256] or factors for each colour transform.
    """

    image: Pixels
    target: Pixels
    name: str
    rows: npt.NDArray[np.float32]
    columns: npt.NDArray[np.float32]
    target_rows: npt.NDArray[np.int64]
    target_columns: npt.NDArray[np.int64]
    colours: list[Pixels | Jitter]


class PlannedBatch(NamedTuple):
    """A batch of planned samples; images and targets are zero-padded to the largest [B, H, W, …].

    Rows and columns are the bits of float32 as int32: Lightning rounds all floating-point numbers of a batch to
    ``trainer.precision``.
    """

    image: Tensor
    target: Tensor
    name: list[str]
    rows: Tensor
    columns: Tensor
    target_rows: Tensor
    target_columns: Tensor
    colours: list[Tensor | list[Jitter]]  # factors stay on the CPU, since they decide which kernels are launched


class PlannedDataset(Dataset[PlannedSample]):
    """Frames of a data set with the plan of their augmentation.

    Args:
        dataset: the frames.
        plan: ``plan(image, label, seed)`` gives what the plan starts from and the plan.

    Keys are pairs of index and augmentation seed (``transkd.data.datamodule.SeededSampler``).
    """

    def __init__(
        self, dataset: SegmentationDataset, plan: Callable[[Pixels, Pixels, int], tuple[Pixels, Pixels, Plan]]
    ) -> None:
        self.dataset, self.plan = dataset, plan

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> PlannedSample:
        """Return the part of the frame that the sample shows, with its plan."""
        index, seed = key
        frame, whole_label = self.dataset.frame(index)
        with transforming(self.dataset.pairs[index].image, frame):
            image, label, (rows, columns, colours) = self.plan(frame, whole_label, seed)
        (top, bottom), (left, right) = _extent(rows), _extent(columns)
        return PlannedSample(
            image[top:bottom, left:right],
            label[top:bottom, left:right],
            str(self.dataset.pairs[index].image),
            (rows.linear() - top).astype(np.float32),
            (columns.linear() - left).astype(np.float32),
            _moved(rows.nearest(), top),
            _moved(columns.nearest(), left),
            colours,
        )


def _extent(axis: Axis) -> tuple[int, int]:
    """First and last source position that is read, for image and label; coordinates of filled positions count."""
    linear, nearest = axis.linear(), axis.nearest()
    used = nearest[nearest != OUTSIDE]
    first, last = int(np.floor(linear.min())), int(np.ceil(linear.max()))
    return (min(first, int(used.min())), max(last, int(used.max())) + 1) if len(used) else (first, last + 1)


def _moved(indices: npt.NDArray[np.int64], by: int) -> npt.NDArray[np.int64]:
    return np.where(indices == OUTSIDE, OUTSIDE, indices - by)


def collate_planned(samples: Sequence[PlannedSample]) -> PlannedBatch:
    """Collate planned samples to a batch.

    Raises:
        UserError: the augmented samples differ in size.
    """
    if len({(len(sample.rows), len(sample.columns)) for sample in samples}) > 1:
        sizes = "; ".join(f"{sample.name}: {len(sample.rows)}×{len(sample.columns)}" for sample in samples)
        raise UserError(
            f"images and labels of a batch must have the same size, got {sizes}. Add a Resize or a crop to the "
            "transforms, or set data.batch_size=1"
        )
    height, width = (max(sample.target.shape[axis] for sample in samples) for axis in (0, 1))
    image = torch.zeros((len(samples), height, width, 3), dtype=torch.uint8)
    target = torch.zeros((len(samples), height, width), dtype=torch.uint8)
    for index, sample in enumerate(samples):
        rows_sent, columns_sent = sample.target.shape
        image.numpy()[index, :rows_sent, :columns_sent] = sample.image
        target.numpy()[index, :rows_sent, :columns_sent] = sample.target

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))

    names = [sample.name for sample in samples]
    rows, columns = (stack(name).view(torch.int32) for name in ("rows", "columns"))
    colours: list[Any] = [
        torch.from_numpy(np.stack(column)) if isinstance(column[0], np.ndarray) else list(column)
        for column in zip(*(sample.colours for sample in samples), strict=True)
    ]
    return PlannedBatch(image, target, names, rows, columns, stack("target_rows"), stack("target_columns"), colours)
