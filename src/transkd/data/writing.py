"""Writing of images and label maps."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from transkd.files import write_atomically

__all__ = ["as_png", "save_png"]


def as_png(pixels: npt.NDArray[Any], compress_level: int = 6) -> memoryview:
    """Content of a PNG file of an image [H, W, 3] or a map of class ids [H, W]."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, format="PNG", compress_level=compress_level)
    return content.getbuffer()


def save_png(pixels: npt.NDArray[Any], path: Path, compress_level: int = 6) -> None:
    """Save an image or a map of class ids as PNG, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_atomically(path, as_png(pixels, compress_level), sync=False)
