"""Cross-entropy and other losses of log p of the label, from logits upsampled in bands."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from transkd.layers.bands import gradient_for, over_bands, with_gradient

__all__ = ["softmax_", "subtract_at_labels", "upsampled_cross_entropy"]


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    ignore: int,
    loss: Callable[[Tensor], tuple[Tensor, Tensor | float]] | None = None,
) -> Tensor:
    """Weighted mean cross-entropy of labels and logits upsampled to their size (bilinear, align_corners=False).

    Equals ``F.cross_entropy(F.interpolate(logits, …), target, weights)`` up to rounding, and 0 if no label is valid.
    The gradient is computed together with the value, band by band, and stored at the logits' size.

    Args:
        logits: [B, K, h, w], float32 or float64.
        target: int64 [B, H, W].
        weights: one per class [K], in the logits' dtype.
        ignore: label to ignore; negative labels are ignored too.
        loss: another loss of each pixel, from log p of its label to the loss and to minus its derivative by log p.

    Returns:
        A scalar, differentiable once.

    Example:
        >>> upsampled_cross_entropy(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 8).long(), torch.ones(4), 255)  # log 4
        tensor(1.3863)
    """

    def rule(scores: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        log_p, mass = softmax_(scores, labels)
        log_p.masked_fill_(shares == 0, 0)  # 0 · ∞ is NaN
        losses, slopes = (-log_p, 1.0) if loss is None else loss(log_p)
        if gradient is not None:  # of log p by the scores it is onehot − softmax
            slopes = slopes * shares
            scores *= slopes / mass
            subtract_at_labels(scores, labels, slopes)
        return torch.stack([(losses * shares).sum(), shares.sum()])

    gradient = gradient_for(logits)
    total, mass = over_bands(rule, logits, target, weights, ignore, gradient)
    mass = mass.clamp_min(torch.finfo(mass.dtype).tiny)  # 0 / tiny = 0 if no pixel is valid, also in the gradient
    return with_gradient(total / mass, logits, None if gradient is None else gradient.div_(mass))


def softmax_(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite the scores of a band with those of the softmax up to a factor.

    Returns:
        log p of the labels, and the sum over the classes, by which p is the scores, both [b, 1, r, W].
    """
    scores -= scores.amax(1, keepdim=True)
    chosen = scores.gather(1, labels)
    mass = scores.exp2_().sum(1, keepdim=True)
    return (chosen - mass.log2()) * math.log(2), mass


def subtract_at_labels(scores: Tensor, labels: Tensor, values: Tensor) -> None:
    """Subtract values [b, 1, r, W] from the scores [b, K, r, W] of the labels, in place."""
    if torch.compiler.is_compiling():  # Inductor fuses this with what comes before, but not a scatter
        classes = torch.arange(scores.shape[1], device=scores.device)[:, None, None]
        scores -= torch.where(classes == labels, values, 0)
    else:
        scores.scatter_add_(1, labels, -values)
