"""Inspection of a split's files: damage, labels outside the classes, sizes, classes that occur, duplicates."""

import hashlib
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from transkd.data.datamodule import SegmentationDataModule
from transkd.data.dataset import SegmentationDataset
from transkd.data.listing import UnpairedError
from transkd.data.reading import check_sums, read_oriented
from transkd.errors import UserError

__all__ = ["Inspection", "absent_classes", "check_intact", "duplicates", "inspect_split", "open_split"]


class Examined(NamedTuple):
    """What one image and its label are.

    Attributes:
        place: index of the pair in its data set.
        problems: one line for each file that cannot be used.
        size: height and width of the image; None if it is not readable.
        digest: hash of the image's pixels, empty if it is not readable.
        pixels: pixels of each class [K]; None without a readable label.
    """

    place: int
    problems: list[str]
    size: tuple[int, int] | None
    digest: str
    pixels: npt.NDArray[np.int64] | None


@dataclass
class Inspection:
    """What the files of a split are.

    Attributes:
        split: "train" or "val".
        total: number of images in the split.
        checked: number of images that were read.
        problems: one line for each file that cannot be used.
        broken: indices of pairs with such a file.
        sizes: number of images of each height and width.
        pixels: pixels of each class in the labels [K].
        labels: number of labels that were read, and of those in the split.
        digests: images by the hash of their pixels.
    """

    split: str
    total: int
    checked: int
    pixels: npt.NDArray[np.int64]
    labels: tuple[int, int]
    problems: list[str] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    digests: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))


def open_split(data: SegmentationDataModule, split: str) -> tuple[SegmentationDataset, list[str]]:
    """Return a split and one line for each of its files without a counterpart, which are left out of it.

    Raises:
        UserError: the folder does not have the data set's layout.
    """
    try:
        return data.dataset(split), []
    except UnpairedError as error:
        return data.use(split, error.pairs), error.unpaired


def inspect_split(dataset: SegmentationDataset, split: str, sample: int | None = None, workers: int = 1) -> Inspection:
    """Read images and labels of a split in worker processes, with a progress bar on a terminal.

    Args:
        dataset: the split.
        split: its name.
        sample: read so many pairs, and so many images without a label, evenly spaced in the order of the data set; None
            reads all.
        workers: number of worker processes.
    """
    total = len(dataset)
    labelled = _spread(0, dataset.labelled, sample)
    indices = [*labelled, *_spread(dataset.labelled, total, sample)]  # images without a label come last
    pixels = np.zeros(len(dataset.classes.names), dtype=np.int64)
    found = Inspection(split, total, len(indices), pixels, (len(labelled), dataset.labelled))
    loader = DataLoader(_Examiner(dataset, indices), batch_size=None, num_workers=workers, collate_fn=_unchanged)
    console = Console(stderr=True)
    bar = track(
        loader, f"Reading {split}", len(indices), transient=True, console=console, disable=not console.is_terminal
    )
    for one in bar:
        found.problems += one.problems
        if one.problems:
            found.broken.add(one.place)
        if one.size is not None:
            found.sizes[one.size] += 1
            found.digests[one.digest].append(dataset.pairs[one.place].image)
        if one.pixels is not None:
            found.pixels += one.pixels
    return found


def _spread(start: int, stop: int, sample: int | None) -> list[int]:
    """So many indices of a range, evenly spaced."""
    count = stop - start if sample is None else min(sample, stop - start)
    return sorted({round(i) for i in np.linspace(start, stop - 1, count)})


class _Examiner(Dataset[Examined]):
    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Examined:
        return examine(self.dataset, self.indices[i])


def _unchanged(sample: Any) -> Any:
    return sample


def examine(dataset: SegmentationDataset, index: int) -> Examined:
    """Read a pair as the training does, each file whatever the other is like, and check that both are intact."""
    pair = dataset.pairs[index]
    problems: list[str] = []
    image = label = size = None
    orientation = 1
    try:
        check_intact(pair.image)
        image, orientation = read_oriented(pair.image)
        size = image.shape[0], image.shape[1]
    except UserError as error:
        problems.append(str(error))
    try:
        if pair.label is not None and pair.label.suffix.lower() != ".txt":
            check_intact(pair.label)
        if pair.label is not None:
            label = dataset.label_reader.read(pair.label, size, orientation, pair.image)
    except UserError as error:
        problems.append(str(error))
    classes = len(dataset.classes.names)
    return Examined(
        index,
        problems,
        size,
        "" if image is None else hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest(),
        None if label is None else np.bincount(label.ravel(), minlength=classes)[:classes],
    )


def check_intact(path: Path) -> None:
    """Look for damage that decoding alone does not show: PNG's checksums, what libjpeg warns of and decodes anyway.

    A JPEG has no checksums: damage that leaves a valid stream cannot be told from a picture.

    Raises:
        UserError: the file is missing or damaged.
    """
    complaints = _decoder_complaints(path) if check_sums(path) in ("JPEG", "MPO") else ""
    if complaints:
        raise UserError(f"cannot read the image {path}: damaged ({complaints})")


def _decoder_complaints(path: Path) -> str:
    """What libjpeg writes to the standard error while it decodes a file; Pillow does not pass it on."""
    with tempfile.TemporaryFile() as caught:
        kept = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            cv2.imread(str(path))
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        caught.seek(0)
        lines = caught.read().decode(errors="replace").splitlines()
    return next((line for line in lines if "JPEG" in line), "")


def duplicates(inspections: Iterable[Inspection]) -> list[str]:
    """One line for each group of images with the same pixels, within a split and across splits."""
    groups: dict[str, dict[tuple[Path, str], Path]] = defaultdict(dict)
    for inspection in inspections:
        for digest, paths in inspection.digests.items():
            # resolved: a frame may be in the split with its label and among the unlabelled ones
            groups[digest].update({(path.resolve(), inspection.split): path for path in paths})
    return [
        f"the same image {len(group)} times: {', '.join(f'{path} ({split})' for (_, split), path in group.items())}"
        for group in groups.values()
        if len(group) > 1
    ]


def absent_classes(inspection: Inspection, names: Sequence[str]) -> list[str]:
    """One line for each class that no label of a split has."""
    read, there = inspection.labels
    where = f"labels of {inspection.split}" if read == there else f"{read} of {there} labels of {inspection.split}"
    return [
        f"the class {name} never occurs in the {where}"
        for name, count in zip(names, inspection.pixels.tolist(), strict=True)
        if count == 0
    ]
