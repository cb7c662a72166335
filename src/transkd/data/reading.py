"""Reading of image and label files: the pixels that a viewer shows, whatever the file stores.

Training, evaluation, prediction, solving and export read every image with `read_image` or `read_oriented`, and every
label with `read_stored`.
"""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from transkd.errors import UserError
from transkd.files import check_regular_file

__all__ = ["MOST_PIXELS", "Stored", "check_sums", "read_image", "read_oriented", "read_size", "read_stored", "turn"]

Array = npt.NDArray[Any]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of Pillow: those that start no other program
MOST_PIXELS = 178_956_970
"""Largest image, Pillow's own limit."""

ORIENTATION = 0x0112  # tag of EXIF and TIFF
SWAPPED = (5, 6, 7, 8)  # orientations that exchange height and width
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SCALED = {"L;2": 255 // 3, "L;4": 255 // 15}  # what Pillow multiplies grey values of 2 and 4 bits by
LABEL_MODES = ("1", "L", "P", "I", *SIXTEEN_BITS, "RGB", "RGBA", "LA")


def read_image(path: str | Path) -> npt.NDArray[np.uint8]:
    """Read an image as RGB uint8 [H, W, 3], upright.

    - The EXIF orientation is applied.
    - 16-bit grey values are divided by 257, so 65535 becomes 255; of 16-bit colours the upper byte is taken.
    - Transparent pixels are laid over white. Grey, palette, 1-bit and CMYK images become RGB.
    - Colour profiles are not applied; of several frames or pages the first is read.

    Raises:
        UserError: the file is missing, not readable, damaged, not an image, or has floating-point or 32-bit values.
    """
    return read_oriented(path)[0]


def read_oriented(path: str | Path) -> tuple[npt.NDArray[np.uint8], int]:
    """Read an image like `read_image`; also return the EXIF orientation it was stored in, 1 = upright."""
    with _opened(path, "image") as image:
        orientation = _orientation(image)
        return np.asarray(_rgb(_upright(image, orientation), image.format, path)), orientation


def read_size(path: str | Path) -> tuple[tuple[int, int], int]:
    """Read height and width of an upright image, and its EXIF orientation, from the file's header."""
    with _opened(path, "image") as image:
        orientation = _orientation(image)
        if image.format == "TIFF":  # versions of Pillow differ in its size before it is loaded
            width, height = _upright(image, orientation).size
            return (height, width), orientation
        width, height = image.size
        return ((width, height) if orientation in SWAPPED else (height, width)), orientation


class Stored(NamedTuple):
    """Values of a label file before they become class ids.

    Attributes:
        values: integers [H, W], or RGB colours [H, W, 3] uint8.
        palette: colours [N, 3] of the values of a palette image, None for any other.
    """

    values: Array
    palette: Array | None = None


def read_stored(path: str | Path, colours: bool = False) -> Stored:
    """Read a label file: values of a grey or palette image, RGB colours of a colour image; EXIF applied.

    Grey images of 1, 2 and 4 bits have the values that are stored, from 0 to 1, 3 and 15; their colours are those of a
    viewer. An RGB image of greys has its grey values. Fully transparent pixels of an RGBA image become black.

    Args:
        path: file of the label.
        colours: read the colours of a palette image, not its values.

    Raises:
        UserError: the file is missing, damaged, a JPEG, partly transparent, or of floating-point values or
            16-bit colours.
    """
    with _opened(path, "label") as image:
        if image.format in ("JPEG", "MPO"):
            raise UserError(f"{path} is a JPEG, which changes the values of a label; export labels as PNG")
        mode, palette, packed = image.mode, _palette(image), _packing(image)
        if mode not in LABEL_MODES:
            raise UserError(f"{path} is a {mode} image; a label must be of class ids, with a palette, or RGB")
        if ";16" in packed and mode in ("RGB", "RGBA", "LA"):
            raise UserError(
                f"{path} has 16 bits a channel in several channels, which are read as 8; save the label as an image of "
                "one channel, or as RGB of 8 bits"
            )
        label = _upright(image, _orientation(image))
        pixels = np.asarray(label.convert("RGB") if mode == "P" and colours else label)
    if mode == "1":
        pixels = pixels.astype(np.uint8) * np.uint8(255 if colours else 1)
    elif packed in SCALED and not colours:
        pixels = pixels // SCALED[packed]
    if mode in ("RGBA", "LA"):
        pixels = _without_alpha(pixels, path)
    if pixels.ndim == 3 and not colours and _is_grey(pixels):
        pixels = pixels[..., 0]
    return Stored(pixels, None if colours else palette)


def check_sums(path: str | Path) -> str | None:
    """Compare the checksums of a file, which PNG has, without decoding it; return the name of its format.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _opened(path, "image") as image:
        image.verify()
        return image.format


def turn(pixels: Array, orientation: int) -> Array:
    """Turn pixels [H, W, …] that are stored in an EXIF orientation upright."""
    if orientation in SWAPPED:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1) if orientation in (3, 4, 7, 8) else slice(None)
    columns = slice(None, None, -1) if orientation in (2, 3, 6, 7) else slice(None)
    return pixels[rows, columns]


@contextmanager
def _opened(path: str | Path, what: str) -> Iterator[Image.Image]:
    """Open a file with Pillow; errors until the end of the block are one line with the file's name."""
    try:
        if Path(path).exists():
            check_regular_file(path, what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is below
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.size[0] * image.size[1] > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more than {MOST_PIXELS // 10**6} megapixels; cut it into parts") from error
    except MemoryError as error:
        raise UserError(f"cannot read the {what} {path}: not enough memory; cut it into parts") from error
    except FileNotFoundError as error:
        raise UserError(f"{what} not found: {path}") from error
    except PermissionError as error:
        raise UserError(
            f"cannot read the {what} {path}: no permission; change it or run as the file's owner"
        ) from error
    except Exception as error:  # damaged files raise many types of exceptions
        raise UserError(f"cannot read the {what} {path}: {_reason(path, error)}") from error


def _reason(path: str | Path, error: BaseException) -> str:
    if getattr(error, "errno", None) == errno.ELOOP:
        return "the link leads back to itself; remove it or link it to a file"
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return "damaged, truncated or not an image (the file is empty, 0 bytes)"
    return f"damaged, truncated or not an image ({error})"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 … 8; anything else and damaged metadata count as 1, as viewers take it."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of many types
        return 1
    return value if value in range(1, 9) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _rgb(image: Image.Image, file_format: str | None, path: str | Path) -> Image.Image:
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and file_format == "PNG"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        kind = "floating-point (HDR)" if image.mode == "F" else "32-bit"
        raise UserError(f"{path} has {kind} values, whose range no file says; convert it to 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _packing(image: Image.Image) -> str:
    """How the pixels of a file are stored, in Pillow's words, such as "RGB;16B"; before they are loaded."""
    tiles: Any = getattr(image, "tile", None)
    packing = tiles[0][3] if tiles else ""
    return str(packing[0] if isinstance(packing, tuple) else packing)


def _palette(image: Image.Image) -> Array | None:
    values = image.getpalette("RGB") if image.mode == "P" else None
    return None if values is None else np.asarray(values, dtype=np.uint8).reshape(-1, 3)


def _without_alpha(pixels: Array, path: str | Path) -> Array:
    alpha = pixels[..., -1]
    if not np.isin(alpha, (0, 255)).all():
        raise UserError(f"{path} is partly transparent: a label's pixels must be opaque, or fully transparent = black")
    colours = pixels[..., :-1] * (alpha > 0)[..., None].astype(np.uint8)
    return colours[..., 0] if colours.shape[-1] == 1 else colours


def _is_grey(pixels: Array) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
