"""Cross-entropy of upsampled logits, band by band: neither logits nor gradient are stored at the labels' size."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transkd.layers.upsampling import products_pay, resize_matrix

__all__ = ["upsampled_cross_entropy"]

# Only one band is in memory at a time. A CPU gets 8 bands; a GPU prefers few, large kernels, so its bands are as large
# as 400 MB in float32 allow.
BANDS = 8
AT_ONCE_ON_GPU = 3 * 2**25
vjp: Any = torch.func.vjp  # untyped: the annotation includes a third result, returned only with has_aux


def upsampled_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor, ignore: int) -> Tensor:
    """Weighted mean cross-entropy of labels and logits upsampled to their size (bilinear, align_corners=False).

    Equals ``F.cross_entropy(F.interpolate(logits, …), target, weights)`` up to rounding, and 0 if no label is valid.
    The gradient is computed together with the value, band by band, and stored at the logits' size.

    Args:
        logits: [B, K, h, w], float32 or float64.
        target: int64 [B, H, W].
        weights: one per class [K], in the logits' dtype.
        ignore: label to ignore; negative labels are ignored too.

    Returns:
        A scalar, differentiable once; not supported within ``torch.autograd.graph.saved_tensors_hooks``.

    Example:
        >>> upsampled_cross_entropy(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 8).long(), torch.ones(4), 255)  # log 4
        tensor(1.3863)
    """
    requires_grad = torch.is_grad_enabled() and logits.requires_grad
    # contiguous, so that a band is one block of memory per class
    return _UpsampledCrossEntropy.apply(logits.contiguous(), target, weights, ignore, requires_grad)


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weights: Tensor, ignore: int, requires_grad: bool) -> Tensor:
        total, mass = logits.new_zeros(()), logits.new_zeros(())
        gradient = torch.zeros_like(logits) if requires_grad else None
        for band in _bands(logits, target.shape[-2:]):
            labels = target[:, None, band.rows]
            ignored = (labels == ignore) | (labels < 0)
            labels = labels.masked_fill(ignored, 0)
            shares = weights[labels].masked_fill(ignored, 0)
            scores = band.upsample(logits, requires_grad)
            total += _cross_entropy_and_gradient(scores, labels, shares)
            if gradient is not None:
                band.add_gradient(scores, gradient)
            del scores  # free it before the next band
            mass += shares.sum()
        mass.clamp_min_(torch.finfo(mass.dtype).tiny)  # 0 / tiny = 0 if no pixel is valid, also in the gradient
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(mass))
        return total / mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _cross_entropy_and_gradient(scores: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """Σ share · −log softmax(scores)[label]; overwrites scores with the gradient, share · (softmax − onehot)."""
    scores -= scores.amax(1, keepdim=True)
    chosen = scores.gather(1, labels)
    mass = scores.exp_().sum(1, keepdim=True)
    scores *= shares / mass
    if torch.compiler.is_compiling():  # Inductor fuses this with the line above, but not a scatter
        classes = torch.arange(scores.shape[1], device=scores.device)[:, None, None]
        scores -= torch.where(classes == labels, shares, 0)
    else:
        scores.scatter_add_(1, labels, -shares)
    return ((mass.log() - chosen) * shares).sum()


class _Band:
    """A band of label rows; logits are interpolated to it along the rows first, then along the columns."""

    def __init__(self, logits: Tensor, size: torch.Size, first: int, last: int) -> None:
        self.rows, self.size = slice(first, last), size
        # same mapping as F.interpolate: y + ½ on the labels' grid is (y + ½) · h / H on the logits'
        steps = torch.arange(first, last, dtype=logits.dtype, device=logits.device) + 0.5
        centre = (steps * (logits.shape[2] / size[0]) - 0.5).clamp_min(0)
        self.above = centre.long()
        self.below = (self.above + 1).clamp_max(logits.shape[2] - 1)
        self.share = (centre - self.above)[:, None]  # weight of the row below

    def upsample(self, logits: Tensor, requires_grad: bool) -> Tensor:
        """The band's rows of the upsampled logits: [B, K, rows, W]."""
        narrow = self._narrow(logits)
        if not requires_grad:
            return self._widen(narrow)
        scores: Tensor
        scores, self.transposed = vjp(self._widen, narrow)  # gradient of F.interpolate, also under torch.compile
        return scores

    def add_gradient(self, scores: Tensor, gradient: Tensor) -> None:
        """Backpropagate the gradient of the upsampled rows and add it to that of the logits."""
        (narrow,) = self.transposed(scores)
        del self.transposed  # frees the scores before the next band
        gradient.index_add_(2, self.above, narrow * (1 - self.share))
        gradient.index_add_(2, self.below, narrow * self.share)

    def _narrow(self, logits: Tensor) -> Tensor:
        """The band's rows at the logits' width: [B, K, rows, w]."""
        return torch.lerp(logits[:, :, self.above], logits[:, :, self.below], self.share)

    def _widen(self, narrow: Tensor) -> Tensor:
        """[B, K, rows, w] to [B, K, rows, W]."""
        wide = F.interpolate(narrow.flatten(1, 2), size=self.size[1], mode="linear", align_corners=False)
        return wide.view(*narrow.shape[:3], -1)


class _BandOfProducts(_Band):
    """A band on a GPU or in compiled code: one bilinear kernel for all columns, and matrix products as gradient."""

    def upsample(self, logits: Tensor, requires_grad: bool) -> Tensor:
        narrow = self._narrow(logits)
        # bilinear with unchanged rows: PyTorch's linear kernel uses only one thread per column
        return F.interpolate(narrow, size=(narrow.shape[2], self.size[1]), mode="bilinear", align_corners=False)

    def add_gradient(self, scores: Tensor, gradient: Tensor) -> None:
        batch, classes, height, width = gradient.shape
        with torch.autocast(scores.device.type, enabled=False):
            columns = resize_matrix(width, self.size[1], scores)
            rows = resize_matrix(height, self.size[0], scores)[self.rows].T
            narrow = (scores.reshape(-1, self.size[1]) @ columns).view(batch * classes, -1, width)
            gradient += rows.expand(len(narrow), -1, -1).bmm(narrow).view(gradient.shape)


def _bands(logits: Tensor, size: torch.Size) -> Iterator[_Band]:
    kind, count = _Band, BANDS
    if products_pay(logits) or torch.compiler.is_compiling():
        kind = _BandOfProducts
        count = -(-logits[:, :, 0, 0].numel() * size[0] * size[1] // AT_ONCE_ON_GPU)
    height = -(-size[0] // min(count, size[0]))
    for first in range(0, size[0], height):
        yield kind(logits, size, first, min(first + height, size[0]))
