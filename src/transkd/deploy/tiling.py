"""Prediction of large images in overlapping tiles, in memory that depends on the tile."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.errors import UserError
from transkd.models import Segmenter
from transkd.pictures import Pixels

__all__ = ["finite_logits", "segment_in_tiles"]

ALIGN = 32
"""Tiles start at multiples of the deepest stage's stride, so that all stages have the grid of the whole image."""

MOST_PARTS = 8  # a network's scale is taken as a fraction with a denominator up to this
AT_ONCE = 2**22  # pixels of one class that are upsampled at a time


class Span(NamedTuple):
    """A tile along one axis: what the network sees, and the part of it that is kept; in pixels of the image."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """Split an axis into tiles that overlap by twice the margin; the margin of each is not kept, except at the ends.

    Example:
        >>> [tuple(span) for span in spans(300, tile=128, margin=32)]
        [(0, 128, 0, 96), (64, 192, 96, 160), (128, 256, 160, 224), (192, 300, 224, 300)]
    """
    step = tile - 2 * margin
    found = []
    for start in range(0, length, step):
        last = start + tile >= length
        found.append(
            Span(
                start,
                length if last else start + tile,
                start + margin if start else 0,
                length if last else start + tile - margin,
            )
        )
        if last:
            break
    return found


@torch.no_grad()
def finite_logits(network: Segmenter, pixels: Pixels) -> Tensor:
    """Logits [1, K, h, w] of an image or a tile [H, W, 3].

    Raises:
        UserError: the network has none, or some are NaN or infinite.
    """
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(network.mean.device)
    logits = network(image, needs={"logits"}).logits
    if logits is None:
        raise UserError(f"{network.name} has no logits, so it cannot predict classes")
    if not logits.isfinite().all():
        raise UserError("the network's logits are not finite: its weights are damaged, or its training failed")
    return logits


@torch.no_grad()
def segment_in_tiles(network: Segmenter, image: Pixels, size: tuple[int, int], tile: int) -> Pixels:
    """Predict class ids [H, W] of ``size`` for an image [h, w, 3] that is larger than a tile.

    The tiles' logits are joined to those of the whole image, band by band, and upsampled by the whole image's factors.
    Where the network sees no farther than the margin, an eighth of the tile, they are those of the whole image;
    attention and pooling over the whole image see the tile instead.

    Args:
        network: in eval mode.
        image: RGB uint8.
        size: height and width of the result.
        tile: side of a tile, at least 128; rounded down to the grid of the deepest stage.
    """
    cell = Fraction(4) / Fraction(network.scale).limit_denominator(MOST_PARTS)  # pixels per logit
    align = ALIGN * (cell / 4).numerator
    margin = max(align, tile // 8 // align * align)
    tile = max(tile // align * align, 3 * margin)
    # bands lie across the longer axis, so that a band is as short as it can be
    across = image.shape[1] > image.shape[0]
    bands, tiles = (spans(image.shape[axis], tile, margin) for axis in ((1, 0) if across else (0, 1)))
    ids = np.empty(size, dtype=np.uint8)
    out = ids.T if across else ids
    total = math.ceil(bands[-1].stop / cell)
    carry, first, row = None, 0, 0  # logits from row `first` on; the next row of the result
    for band in bands:
        parts = []
        for part in tiles:
            one, other = (part, band) if across else (band, part)
            logits = finite_logits(network, image[one.start : one.stop, other.start : other.stop])[0].float()
            logits = logits.transpose(-1, -2) if across else logits
            parts.append(_kept(_kept(logits, band, cell, 1), part, cell, 2))
        joined = torch.cat(parts, 2)
        rows = joined if carry is None else torch.cat([carry, joined], 1)
        for values in _upsampled(rows, first, total, row, out.shape):
            out[row : row + len(values)] = values
            row += len(values)
        first += rows.shape[1] - 1
        carry = rows[:, -1:]
    return ids


def _kept(logits: Tensor, span: Span, cell: Fraction, axis: int) -> Tensor:
    """The part of a tile's logits that is kept, along one axis."""
    if logits.shape[axis] != math.ceil((span.stop - span.start) / cell):
        raise UserError(f"the network's logits are not at stride {cell}, so it cannot predict in tiles: set tile=null")
    start = int((span.keep_from - span.start) / cell)
    return logits.narrow(axis, start, math.ceil((span.keep_to - span.start) / cell) - start)


def _upsampled(rows: Tensor, first: int, total: int, start: int, size: tuple[int, ...]) -> Iterator[Pixels]:
    """Class ids of the result's rows from ``start`` on, as far as the logits reach.

    Bilinear with align_corners=False: row y of the result lies at (y + ½)·total/height − ½ in the logits.

    Args:
        rows: logits [K, n, w] of the rows ``first`` to ``first + n``.
        first: the first of these rows.
        total: rows of the whole image's logits.
        start: first row of the result to compute.
        size: (height, width) of the result.
    """
    height, width = size
    centre = ((torch.arange(start, height, dtype=torch.float64) + 0.5) * total / height - 0.5).clamp_min(0)
    above = centre.floor().long()
    below = (above + 1).clamp_max(total - 1)
    ready = int((below < first + rows.shape[1]).sum())
    share = (centre - above).to(rows)[:, None]
    at_once = max(1, AT_ONCE // width)
    for chunk in range(0, ready, at_once):
        part = slice(chunk, min(chunk + at_once, ready))
        upper, lower = (index[part].to(rows.device) - first for index in (above, below))
        best, winner = None, None
        for k, scores in enumerate(rows):
            mixed = scores[upper] * (1 - share[part]) + scores[lower] * share[part]
            scores = F.interpolate(mixed[None, None], (len(mixed), width), mode="bilinear", align_corners=False)[0, 0]
            if best is None or winner is None:
                best, winner = scores, torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
            else:
                winner[scores > best] = k
                best = torch.maximum(best, scores)
        assert winner is not None
        yield winner.cpu().numpy()
