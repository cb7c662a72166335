"""Colour transforms on the device, rounded as OpenCV and Albumentations round 8-bit images on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from transkd.data.feeding.planning import Jitter

__all__ = ["jitter", "look_up"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
FIXED = 4096  # one, in the fixed point of OpenCV's conversion to HSV


def look_up(image: Tensor, tables: Tensor) -> Tensor:
    """Replace values by those of each image's table.

    Args:
        image: whole numbers from 0 to 255, [B, 3, H, W].
        tables: [B, 256].
    """
    indices = image.flatten(1).long()
    return tables.to(image.dtype).gather(1, indices).view_as(image)


def jitter(image: Tensor, factors: list[Jitter]) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image in its own order.

    Args:
        image: whole numbers from 0 to 255, [B, 3, H, W].
        factors: order and factors of each image.
    """
    jittered = []
    for one, order_and_factors in zip(image, factors, strict=True):
        if order_and_factors:
            order, values = order_and_factors
            for step in order:
                one = STEPS[step](one, values[step])
        jittered.append(one)
    return torch.stack(jittered)


def _brightness(image: Tensor, factor: float) -> Tensor:
    return (image * factor).clamp(0, 255).floor()


def _contrast(image: Tensor, factor: float) -> Tensor:
    return (image * factor + _gray(image).mean() * (1 - factor)).clamp(0, 255).floor()


def _saturation(image: Tensor, factor: float) -> Tensor:
    return torch.lerp(_gray(image).expand_as(image), image, factor).round().clamp(0, 255)


def _gray(image: Tensor) -> Tensor:
    """Luma [1, H, W]."""
    red, green, blue = image.unbind()
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).round()[None]


def _hue(image: Tensor, factor: float) -> Tensor:
    """Shift the hue by a share of the circle, through 8-bit HSV: hue in steps of 2°, saturation of 1/255."""
    red, green, blue = image.unbind()
    value, low = image.amax(0), image.amin(0)
    spread = value - low
    sextant = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = _divide(sextant, 30, spread)
    saturation = _divide(spread, 255, value) / 255
    hue = (hue + 180 * factor).remainder(180).floor() / 30
    distance = torch.stack([(hue + offset).remainder(6) for offset in (5, 3, 1)])
    share = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return (value * (1 - saturation * share)).floor()


def _divide(numerator: Tensor, factor: int, denominator: Tensor) -> Tensor:
    """Multiply by ``factor / denominator`` in OpenCV's fixed point of 12 bits, to whole numbers; 0 for 0 / 0."""
    inverse = (factor * FIXED / denominator.clamp(min=1)).round()
    return ((numerator * inverse + FIXED // 2) / FIXED).floor()


STEPS: tuple[Callable[[Tensor, float], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)
"""In the order of Albumentations' ``ColorJitter``."""
