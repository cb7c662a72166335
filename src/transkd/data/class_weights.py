"""Weights of the classes by how often they occur in the training labels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from transkd.data.dataset import SegmentationDataset
from transkd.errors import UserError

__all__ = ["RULES", "ClassCounts", "class_weights", "count_classes"]

Numbers = npt.NDArray[np.float64]


class ClassCounts(NamedTuple):
    """How often classes occur in labels; ignored pixels are not counted.

    Attributes:
        pixels: pixels of each class.
        around: labelled pixels of the images in which each class occurs.
    """

    pixels: list[int]
    around: list[int]


class _Counts(Dataset[npt.NDArray[np.int64]]):
    """Pixels of each class, image by image."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.labelled  # images without a label come last

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        label = self.dataset.read_label(index)
        return np.bincount(label.ravel(), minlength=256)[: len(self.dataset.classes.names)]


def count_classes(dataset: SegmentationDataset, num_workers: int = 0, progress: bool = False) -> ClassCounts:
    """Count the pixels of each class in all labels of a data set, at their size on disk.

    Raises:
        UserError: a file cannot be read.
    """
    pixels, around = np.zeros((2, len(dataset.classes.names)), np.int64)
    labels = DataLoader(
        _Counts(dataset),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=np.asarray,
        generator=torch.Generator(),  # the global one gives random weights, which must not depend on whether we count
    )
    for found in track(labels, "counting classes", total=dataset.labelled, disable=not progress):
        pixels += found
        around += (found > 0) * found.sum()
    return ClassCounts(pixels.tolist(), around.tolist())


def class_weights(rule: str, counts: ClassCounts) -> list[float]:
    """Weights of the classes, to six digits; p is a class's share of all labelled pixels.

    ``auto``: ``1 / ln(1.02 + p)`` (ENet, arXiv 1606.02147). ``median``: ``median f / f``, f a class's share of the
    labelled pixels of the images in which it occurs (arXiv 1411.4734). ``sqrt``: ``1 / √p``. The last two give 0 to a
    class that never occurs.

    Raises:
        UserError: the rule is unknown, or no pixel has a label.

    Example:
        >>> class_weights("median", ClassCounts([60, 20, 0], [80, 40, 0]))
        [0.833333, 1.25, 0.0]
    """
    if rule not in RULES:
        raise UserError(f"class_weights={rule}: expected {', '.join(RULES)}, or one number per class")
    if not sum(counts.pixels):
        raise UserError(f"class_weights={rule}: no pixel of the training labels has a class")
    pixels, around = (np.array(part, np.float64) for part in counts)
    return [float(f"{weight:.6g}") for weight in RULES[rule](pixels, around)]


def _logarithmic(pixels: Numbers, around: Numbers) -> Numbers:
    weights: Numbers = 1 / np.log(1.02 + pixels / pixels.sum())
    return weights


def _median(pixels: Numbers, around: Numbers) -> Numbers:
    frequency = pixels / np.maximum(around, 1)
    return _inverse(frequency) * np.median(frequency[frequency > 0])


def _inverse_root(pixels: Numbers, around: Numbers) -> Numbers:
    return _inverse(np.sqrt(pixels / pixels.sum()))


def _inverse(values: Numbers) -> Numbers:
    return np.divide(1, values, out=np.zeros_like(values), where=values > 0)


RULES: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "auto": _logarithmic,
    "median": _median,
    "sqrt": _inverse_root,
}
"""Rules by their name in ``class_weights``."""
