"""Cross-entropy of upsampled logits, band by band: neither they nor their gradient exist at the labels' full size."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["upsampled_cross_entropy"]

# one band is alive at a time: an 8th of the plain way's largest tensor, and still few and large kernels on a GPU
BANDS = 8
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
    learns = torch.is_grad_enabled() and logits.requires_grad
    # bands of a class lie side by side in this layout
    return _UpsampledCrossEntropy.apply(logits.contiguous(), target, weights, ignore, learns)


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weights: Tensor, ignore: int, learns: bool) -> Tensor:
        total, mass = logits.new_zeros(()), logits.new_zeros(())
        gradient = torch.zeros_like(logits) if learns else None
        for band in _bands(logits, target.shape[-2:]):
            labels = target[:, None, band.rows]
            ignored = (labels == ignore) | (labels < 0)
            labels = labels.masked_fill(ignored, 0)
            shares = weights[labels].masked_fill(ignored, 0)
            narrow = band.narrow(logits)
            if gradient is None:
                total += _cross_entropy_and_gradient(band.widened(narrow), labels, shares)
            else:
                # the way back is F.interpolate's own, on every device and under torch.compile
                scores, transposed = vjp(band.widened, narrow)
                total += _cross_entropy_and_gradient(scores, labels, shares)
                band.add_rows(transposed(scores)[0], gradient)
                del scores, transposed  # before the next band is made
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
    scores.scatter_add_(1, labels, -shares)
    return ((mass.log() - chosen) * shares).sum()


class _Band:
    """Some rows of the labels, and how logits get there: rows first, while they are narrow, then columns."""

    def __init__(self, logits: Tensor, size: torch.Size, first: int, last: int) -> None:
        self.rows, self.width = slice(first, last), size[1]
        # as F.interpolate does: y + ½ on the one grid is (y + ½) · h / H on the other
        steps = torch.arange(first, last, dtype=logits.dtype, device=logits.device) + 0.5
        centre = (steps * (logits.shape[2] / size[0]) - 0.5).clamp_min(0)
        self.above = centre.long()
        self.below = (self.above + 1).clamp_max(logits.shape[2] - 1)
        self.share = (centre - self.above)[:, None]  # of the row below

    def narrow(self, logits: Tensor) -> Tensor:
        """The band's rows at the logits' width: [B, K, rows, w]."""
        return torch.lerp(logits[:, :, self.above], logits[:, :, self.below], self.share)

    def add_rows(self, narrow: Tensor, gradient: Tensor) -> None:
        """The way back from `narrow`: add its gradient to that of the logits."""
        gradient.index_add_(2, self.above, narrow * (1 - self.share))
        gradient.index_add_(2, self.below, narrow * self.share)

    def widened(self, narrow: Tensor) -> Tensor:
        """[B, K, rows, w] to [B, K, rows, W]."""
        wide = F.interpolate(narrow.flatten(1, 2), size=self.width, mode="linear", align_corners=False)
        return wide.view(*narrow.shape[:3], -1)


def _bands(logits: Tensor, size: torch.Size) -> Iterator[_Band]:
    height = -(-size[0] // BANDS)
    for first in range(0, size[0], height):
        yield _Band(logits, size, first, min(first + height, size[0]))
