"""Cross-entropy of upsampled logits, band by band: neither they nor their gradient exist at the labels' full size."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transkd.layers.upsampling import products_pay, resize_matrix

__all__ = ["upsampled_cross_entropy"]

# One band is alive at a time: on a CPU an 8th of the plain way's largest tensor; on a GPU, which few and large
# kernels keep busy, as few bands as make 400 MB each in float32.
BANDS = 8
AT_ONCE_ON_GPU = 3 * 2**25
vjp: Any = torch.func.vjp  # its annotation has a third result, which is there on request alone


def upsampled_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor, ignore: int) -> Tensor:
    """Weighted mean cross-entropy of labels and logits upsampled to their size (bilinear, align_corners=False).

    ``F.cross_entropy(F.interpolate(logits, …), target, weights)`` up to rounding, and 0 where no label is valid. The
    gradient is computed along with the value, while a band is there, and kept at the logits' size.

    Args:
        logits: [B, K, h, w], float32 or float64.
        target: int64 [B, H, W].
        weights: one per class [K], of the logits' type.
        ignore: the label that counts nowhere; nor do negative ones.

    Returns:
        A scalar that can be differentiated once, and not within ``torch.autograd.graph.saved_tensors_hooks``.

    Example:
        >>> upsampled_cross_entropy(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 8).long(), torch.ones(4), 255)  # log 4
        tensor(1.3863)
    """
    requires_grad = torch.is_grad_enabled() and logits.requires_grad
    # bands of a class lie side by side in this layout
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
            del scores  # before the next band is made
            mass += shares.sum()
        mass.clamp_min_(torch.finfo(mass.dtype).tiny)  # without a valid pixel 0 / tiny is 0, and so is the gradient
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(mass))
        return total / mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _cross_entropy_and_gradient(scores: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """Σ share · −log softmax(scores)[label]; its gradient, share · (softmax − onehot), takes the place of scores."""
    scores -= scores.amax(1, keepdim=True)
    chosen = scores.gather(1, labels)
    mass = scores.exp_().sum(1, keepdim=True)
    scores *= shares / mass
    if torch.compiler.is_compiling():  # fused with the line above; a scatter is not
        classes = torch.arange(scores.shape[1], device=scores.device)[:, None, None]
        scores -= torch.where(classes == labels, shares, 0)
    else:
        scores.scatter_add_(1, labels, -shares)
    return ((mass.log() - chosen) * shares).sum()


class _Band:
    """Some rows of the labels, and how logits get there: rows first, while they are narrow, then columns."""

    def __init__(self, logits: Tensor, size: torch.Size, first: int, last: int) -> None:
        self.rows, self.size = slice(first, last), size
        # as F.interpolate does: y + ½ on the one grid is (y + ½) · h / H on the other
        steps = torch.arange(first, last, dtype=logits.dtype, device=logits.device) + 0.5
        centre = (steps * (logits.shape[2] / size[0]) - 0.5).clamp_min(0)
        self.above = centre.long()
        self.below = (self.above + 1).clamp_max(logits.shape[2] - 1)
        self.share = (centre - self.above)[:, None]  # of the row below

    def upsample(self, logits: Tensor, requires_grad: bool) -> Tensor:
        """The band's rows of the upsampled logits: [B, K, rows, W]."""
        narrow = self._narrow(logits)
        if not requires_grad:
            return self._widen(narrow)
        scores: Tensor
        scores, self.transposed = vjp(self._widen, narrow)  # F.interpolate's own way back, under torch.compile too
        return scores

    def add_gradient(self, scores: Tensor, gradient: Tensor) -> None:
        """Add what the gradient of the upsampled rows gives to that of the logits."""
        (narrow,) = self.transposed(scores)
        del self.transposed  # and the scores with it, before the next band is made
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
    """The same for a GPU and compiled code: one kernel for all columns, and a gradient of matrix products."""

    def upsample(self, logits: Tensor, requires_grad: bool) -> Tensor:
        narrow = self._narrow(logits)
        # the rows stay as they are; PyTorch's kernel of linear interpolation uses a thread per column alone
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
