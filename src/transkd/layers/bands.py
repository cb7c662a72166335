"""Logits upsampled to the labels' size in bands of rows, so that neither they nor their gradient are stored at it."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transkd.layers.upsampling import products_pay, resize_matrix

__all__ = ["gradient_for", "over_bands", "with_gradient"]

# Numbers in a band. A CPU takes one image at a time, in bands of 4 MB in float32, which stay in its cache; a GPU
# prefers few, large kernels, so its bands are of all images, as large as 400 MB in float32 allow.
AT_ONCE = 2**20
AT_ONCE_ON_GPU = 3 * 2**25
LOG2_E = 1 / math.log(2)


def over_bands(
    rule: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    ignore: int,
    gradient: Tensor | None = None,
    maps: Sequence[Tensor] = (),
) -> Tensor:
    """Apply a rule to bands of the upsampled logits (bilinear, align_corners=False), without autograd and autocast.

    Args:
        rule: ``rule(scores, labels, shares, *maps)`` with scores [b, K, r, W], which it may overwrite; labels
            [b, 1, r, W], 0 where they are ignored; shares [b, 1, r, W], the labels' weights, 0 where they are ignored.
            The scores are the upsampled logits divided by log 2: on a CPU powers of 2 take a third of the time of
            powers of e.
        logits: [B, K, h, w], float32 or float64.
        target: int64 [B, H, W].
        weights: one per class [K], in the logits' dtype.
        ignore: label to ignore; negative labels are ignored too.
        gradient: the logits' gradient to add to. The rule must leave in the scores the gradient with respect to the
            upsampled logits.
        maps: [B, H, W]; the rule gets the band's part of each, [b, 1, r, W], to read or to write.

    Returns:
        The sum of what the rule returns.
    """
    parts = []
    logits = logits.detach().contiguous()  # so that a band is one block of memory per class
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        for band in _bands(logits, target.shape[-2:]):
            labels, *others = (pixels[band.images, None, band.rows] for pixels in (target, *maps))
            ignored = (labels == ignore) | (labels < 0)
            labels = labels.masked_fill(ignored, 0)
            shares = weights.index_select(0, labels.flatten()).view(labels.shape).masked_fill_(ignored, 0)
            scores = band.upsample(logits, gradient is not None)
            parts.append(rule(scores, labels, shares, *others))
            if gradient is not None:
                band.add_gradient(scores, gradient)
            del scores  # free it before the next band
        return torch.stack(parts).sum(0)


def gradient_for(logits: Tensor) -> Tensor | None:
    """Zeros to which `over_bands` adds the gradient of the logits, or None if they need none."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    return None


def with_gradient(value: Tensor, logits: Tensor, gradient: Tensor | None) -> Tensor:
    """A scalar that has this gradient with respect to the logits, differentiable once.

    Example:
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> (3 * with_gradient(torch.tensor(5.0), logits, torch.tensor([1.0, 2.0]))).backward()
        >>> logits.grad
        tensor([3., 6.])
    """
    if gradient is None:
        return value
    result: Tensor = _WithGradient.apply(value, logits, gradient)
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream, None


class _Band:
    """Rows of one image on a CPU: columns are interpolated by PyTorch, then rows by a small matrix product."""

    def __init__(self, logits: Tensor, size: torch.Size, images: slice, rows: slice) -> None:
        self.images, self.rows, self.size = images, rows, size
        height, scale = logits.shape[2], logits.shape[2] / size[0]
        # y + ½ on the labels' grid is (y + ½) · h / H on the logits'; each row lies between two of theirs
        first, last = (
            min(max(0, math.floor((y + 0.5) * scale - 0.5)), height - 1) for y in (rows.start, rows.stop - 1)
        )
        self.near = slice(first, last + 2)
        self.matrix = resize_matrix(height, size[0], logits)[rows, self.near]

    def upsample(self, logits: Tensor, requires_grad: bool) -> Tensor:
        """The band's rows of the upsampled logits, divided by log 2: [b, K, rows, W]."""
        self.narrow = logits[self.images, :, self.near].requires_grad_(requires_grad)
        with torch.set_grad_enabled(requires_grad):
            columns = self.narrow.flatten(1, 2)
            wide = F.interpolate(columns, size=self.size[1], mode="linear", align_corners=False)
            self.wide = wide.view(*self.narrow.shape[:3], -1)
        return (LOG2_E * self.matrix) @ self.wide.detach()

    def add_gradient(self, scores: Tensor, gradient: Tensor) -> None:
        """Backpropagate the gradient of the upsampled rows and add it to that of the logits."""
        (narrow,) = torch.autograd.grad(self.wide, self.narrow, self.matrix.T @ scores)
        gradient[self.images, :, self.near] += narrow


class _BandOnGPU:
    """Rows of all images on a GPU or in compiled code: one bilinear kernel for all columns, products as gradient."""

    def __init__(self, logits: Tensor, size: torch.Size, images: slice, rows: slice) -> None:
        self.images, self.rows, self.size = images, rows, size

    def upsample(self, logits: Tensor, requires_grad: bool) -> Tensor:
        # same mapping as F.interpolate: y + ½ on the labels' grid is (y + ½) · h / H on the logits'
        steps = torch.arange(self.rows.start, self.rows.stop, dtype=logits.dtype, device=logits.device) + 0.5
        centre = (steps * (logits.shape[2] / self.size[0]) - 0.5).clamp_min(0)
        above = centre.long()
        below = (above + 1).clamp_max(logits.shape[2] - 1)
        narrow = torch.lerp(logits[:, :, above], logits[:, :, below], (centre - above)[:, None]) * LOG2_E
        # bilinear with unchanged rows: PyTorch's linear kernel uses only one thread per column
        return F.interpolate(narrow, size=(narrow.shape[2], self.size[1]), mode="bilinear", align_corners=False)

    def add_gradient(self, scores: Tensor, gradient: Tensor) -> None:
        batch, classes, height, width = gradient.shape
        columns = resize_matrix(width, self.size[1], scores)
        rows = resize_matrix(height, self.size[0], scores)[self.rows].T
        narrow = (scores.reshape(-1, self.size[1]) @ columns).view(batch * classes, -1, width)
        gradient += rows.expand(len(narrow), -1, -1).bmm(narrow).view(gradient.shape)


class _BandAsItIs:
    """Rows of logits that have the labels' size already."""

    def __init__(self, logits: Tensor, size: torch.Size, images: slice, rows: slice) -> None:
        self.images, self.rows = images, rows

    def upsample(self, logits: Tensor, requires_grad: bool) -> Tensor:
        return logits[self.images, :, self.rows] * LOG2_E

    def add_gradient(self, scores: Tensor, gradient: Tensor) -> None:
        gradient[self.images, :, self.rows] += scores


def _bands(logits: Tensor, size: torch.Size) -> Iterator[_Band | _BandOnGPU | _BandAsItIs]:
    on_gpu = products_pay(logits) or torch.compiler.is_compiling()
    kind: Any = _BandAsItIs if logits.shape[2:] == size else _BandOnGPU if on_gpu else _Band
    together = len(logits) if on_gpu else 1
    count = -(-together * logits.shape[1] * size[0] * size[1] // (AT_ONCE_ON_GPU if on_gpu else AT_ONCE))
    height = -(-size[0] // min(count, size[0]))
    for image in range(0, len(logits), together):
        for first in range(0, size[0], height):
            yield kind(logits, size, slice(image, image + together), slice(first, min(first + height, size[0])))
