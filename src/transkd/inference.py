"""Ways to run a network on an image for scores: in windows that overlap, and at several sizes."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.layers.upsampling import upsampled

__all__ = ["at_scales", "in_windows", "whole"]

Logits = Callable[[Tensor], Tensor]
"""A network: images [B, 3, H, W], uint8 or float in [0, 1], to logits [B, K, h, w]."""


def whole(network: Logits, image: Tensor) -> Tensor:
    """Logits of the whole image at once, at the network's own stride."""
    return network(image)


def in_windows(network: Logits, image: Tensor, window: int, stride: int) -> Tensor:
    """Mean of the logits of square windows where they overlap.

    The last window of a row or column ends at the image's edge.

    Args:
        network: called once for each window.
        image: [B, 3, H, W].
        window: side of a window; a side of the image that is shorter is taken whole.
        stride: distance between windows.

    Returns:
        [B, K, H, W] in float32 at least; if one window is enough, its logits at the network's own stride.

    Example:
        >>> ramp = torch.arange(6.0).expand(1, 3, 4, 6)
        >>> in_windows(lambda part: part - part.mean(), ramp, window=4, stride=2)[0, 0, 0]
        tensor([-1.5000, -0.5000, -0.5000,  0.5000,  0.5000,  1.5000])
    """
    rows, columns = (_starts(side, window, stride) for side in image.shape[-2:])
    if len(rows) == len(columns) == 1:
        return network(image)
    total, count = image.new_zeros(()), image.new_zeros(image.shape[-2:], dtype=torch.int32)
    for y in rows:
        for x in columns:
            part = image[..., y : y + window, x : x + window]
            logits = upsampled(_widened(network(part)), part.shape[-2:])
            if not total.ndim:
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[..., y : y + window, x : x + window] += logits
            count[y : y + window, x : x + window] += 1
    return total / count


def at_scales(network: Logits, image: Tensor, scales: Sequence[float], flip: bool) -> Tensor:
    """Mean of the class probabilities of the image at several sizes, and of its mirror images.

    Args:
        network: called once for each size and side.
        image: [B, 3, H, W].
        scales: factors of the image's size; images are resized bilinearly with antialiasing.
        flip: whether to add each size's mirror image.

    Returns:
        [B, K, H, W] in float32 at least; the logits at the network's own stride for the image as it is alone.
    """
    if list(scales) == [1] and not flip:
        return network(image)
    size, total = image.shape[-2:], image.new_zeros((), dtype=torch.float32)
    for scale in scales:
        view = image
        if scale != 1:
            pixels = image if image.is_floating_point() else image.float() / 255
            sides = [max(1, round(scale * side)) for side in size]
            view = F.interpolate(pixels, sides, mode="bilinear", align_corners=False, antialias=True)
        total = total + _probabilities(network(view), size)
        if flip:
            total = total + _probabilities(network(view.flip(-1)), size).flip(-1)
    return total / (len(scales) * (1 + flip))


def _probabilities(logits: Tensor, size: Sequence[int]) -> Tensor:
    return upsampled(_widened(logits), size).softmax(1)


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side."""
    last = max(0, side - window)
    return [*range(0, last, stride), last]
