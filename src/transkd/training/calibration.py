"""Unlabelled images to solve a student from its teacher and to measure the teacher's features on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transkd.data import SegmentationDataModule
from transkd.data.dataset import read_image
from transkd.data.images import find_images
from transkd.errors import UserError
from transkd.models.inherit.checks import batched

__all__ = ["CalibrationImages", "calibration_images"]


class CalibrationImages:
    """Batches of images uint8 [B, 3, H, W], read again at each pass; consecutive images of equal size form a batch.

    Args:
        paths: image files.
        transform: an Albumentations composition that resizes them for the network, or None.
        device: device of the batches.
    """

    def __init__(self, paths: Sequence[Path], transform: Any = None, device: torch.device | None = None) -> None:
        self.paths, self.transform, self.device = list(paths), transform, device or torch.device("cpu")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches on the device."""
        for batch in batched(map(self._read, self.paths)):
            yield batch.to(self.device)

    def _read(self, path: Path) -> Tensor:
        image = read_image(path)
        if self.transform is not None:
            image = self.transform(image=image)["image"]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def calibration_images(
    data: SegmentationDataModule,
    count: int,
    folder: str | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> CalibrationImages:
    """Select random images and apply the validation transform.

    Args:
        data: source of the images: its training set, without labels.
        count: maximum number of images.
        folder: a folder, glob or image file to select from instead.
        seed: seed of the selection.
        device: device of the batches.

    Raises:
        UserError: the folder contains no image.
    """
    if folder is None:
        paths = [pair.image for pair in data.dataset("train").pairs]
    else:
        try:
            paths = find_images(folder).images
        except UserError as error:
            raise UserError(str(error).replace("input=", "student.solve.folder=")) from error
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    return CalibrationImages([paths[i] for i in order[:count]], data.eval_transform, device)
