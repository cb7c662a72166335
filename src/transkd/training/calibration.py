"""Images without labels, on which a student is solved from its teacher and a teacher's features are measured."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transkd.data import SegmentationDataModule
from transkd.data.dataset import read_image
from transkd.data.images import find_images
from transkd.errors import UserError

__all__ = ["CalibrationImages", "calibration_images"]

BATCH = 8


class CalibrationImages:
    """Batches of images uint8 [B, 3, H, W], read anew at each pass; images of one size in a row share a batch.

    Args:
        paths: image files.
        transform: an Albumentations composition that brings them to the network's size, or None.
        device: where the batches lie.
    """

    def __init__(self, paths: Sequence[Path], transform: Any = None, device: torch.device | None = None) -> None:
        self.paths, self.transform, self.device = list(paths), transform, device or torch.device("cpu")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches on the device."""
        for _, same in groupby(map(self._read, self.paths), key=lambda image: image.shape):
            images = list(same)
            for start in range(0, len(images), BATCH):
                yield torch.stack(images[start : start + BATCH]).to(self.device)

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
    """Images under the validation transform, drawn at random for a seed.

    Args:
        data: its training images are drawn from, without their labels.
        count: how many at most.
        folder: a folder, a glob or an image to draw from instead.
        seed: of the draw.
        device: where the batches lie.

    Raises:
        UserError: the folder holds no image.
    """
    if folder is None:
        paths = [pair.image for pair in data.dataset("train").pairs]
    else:
        try:
            paths = find_images(folder)[1]
        except UserError as error:
            raise UserError(str(error).replace("input=", "student.solve.folder=")) from error
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    return CalibrationImages([paths[i] for i in order[:count]], data.eval_transform, device)
