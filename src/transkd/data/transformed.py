"""What a transform may make of images and labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transkd.errors import UserError

__all__ = ["check_image", "check_label", "transforming"]


@contextmanager
def transforming(path: Path, image: Any) -> Iterator[None]:
    """Say on which image, an array [H, W, 3], a transform fails; Albumentations has no exception of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data.train_transform or data.eval_transform fails on {path}, "
            f"{image.shape[0]}×{image.shape[1]} pixels: {error}"
        ) from error


def check_image(pixels: Any) -> None:
    """Check that a transform left an image of bytes: networks normalise images, loaders make tensors of them.

    Raises:
        UserError: it is no array of uint8 [H, W, 3].
    """
    _check("image", pixels, "[H, W, 3]")


def check_label(pixels: Any) -> None:
    """Check that a transform left a label of bytes.

    Raises:
        UserError: it is no array of uint8 [H, W].
    """
    _check("label", pixels, "[H, W]")


def _check(what: str, pixels: Any, shape: str) -> None:
    if not isinstance(pixels, np.ndarray):
        wrong = f"a {type(pixels).__module__.split('.')[0]} {type(pixels).__name__}"
    elif pixels.dtype != np.uint8:
        wrong = f"values of type {pixels.dtype}"
    elif pixels.ndim != len(shape.split(",")) or (what == "image" and pixels.shape[2] != 3):
        wrong = f"the shape {list(pixels.shape)}"
    else:
        return
    raise UserError(
        f"a transform (data.train_transform, data.eval_transform) gives the {what} {wrong}: expected a uint8 array of "
        f"shape {shape}; leave out Normalize, ToFloat and ToTensorV2, since the networks normalise images themselves"
    )
