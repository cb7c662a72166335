"""Distances between two tensors of equal shape: the math that the terms share.

Half-precision inputs are compared in float32; float64 stays float64. The teacher's tensor is a constant.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.errors import UserError

__all__ = ["channel_kl", "hierarchical_context", "map_criterion", "mean_squared_error", "spatial_kl", "widen"]

POOLED_LEVELS = (4, 2, 1)


def widen(tensor: Tensor) -> Tensor:
    """Give half and bfloat16 tensors as float32, others as they are."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared difference over all elements.

    Args:
        student: any shape, floating.
        teacher: the same shape; a constant.

    Raises:
        UserError: the shapes differ.

    Example:
        >>> import torch
        >>> mean_squared_error(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        tensor(5.)
    """
    return F.mse_loss(*_comparable(student, teacher))


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare maps at full size and average-pooled to 4×4, 2×2 and 1×1.

    ``Σ_j 2^-j E_j / Σ_j 2^-j``, with E_0 the mean squared error at full size and E_1, E_2, … those of the
    pooled levels from fine to coarse. A level that is not smaller than the map's shorter side is left out,
    and the weights of the others start again from 1/2.

    Source: ReviewKD, arXiv 2104.09044, section 3.3.

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C, H, W]; a constant.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: the shapes differ.

    Example:
        >>> import torch
        >>> hierarchical_context(torch.full((1, 2, 8, 8), 3.0), torch.zeros(1, 2, 8, 8))
        tensor(9.)
    """
    student, teacher = _comparable(student, teacher)
    # Pooling is linear, so pooling the difference once is enough. Channels come last, and sums are divided where
    # they are small, so that gradients are laid out as the networks' maps are: adding up others is slow.
    difference = (student - teacher).permute(0, 2, 3, 1)
    maps = [difference, *_pooled(difference)]
    weights = [0.5**level for level in range(len(maps))]
    errors = [weight * each.square().sum() / each.numel() for weight, each in zip(weights, maps, strict=True)]
    return torch.stack(errors).sum() / sum(weights)


def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compare where each channel looks: KL between soft-maxes over the positions.

    ``τ² / (B·C) · Σ_b Σ_c KL(softmax_HW(teacher / τ) ‖ softmax_HW(student / τ))``.

    Source: CWD, arXiv 2011.13256, section 3.

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C, H, W]; a constant.
        temperature: τ > 0; a larger one flattens the distributions.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> channel_kl(torch.tensor([[[[0.0, 1000.0]]]]), torch.tensor([[[[0.0, 0.0]]]]))  # 500 - log 2
        tensor(499.3068)
    """
    student, teacher = _comparable(student, teacher)
    batch, channels = student.shape[:2]
    return _kl_sum(student.flatten(2), teacher.flatten(2), 2, temperature) / (batch * channels)


def spatial_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compare which channels win at each position: KL between soft-maxes over the channels.

    ``τ² / (B·H·W) · Σ_b Σ_hw KL(softmax_C(teacher / τ) ‖ softmax_C(student / τ))``.

    Source: Hinton et al., arXiv 1503.02531, section 2, at each position.

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C, H, W]; a constant.
        temperature: τ > 0; a larger one flattens the distributions.

    Returns:
        A scalar, float32 or float64.

    Raises:
        UserError: the shapes differ, or the temperature is not positive.

    Example:
        >>> import torch
        >>> spatial_kl(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), temperature=4.0)
        tensor(0.)
    """
    student, teacher = _comparable(student, teacher)
    positions = student[:, 0].numel()
    return _kl_sum(student, teacher, 1, temperature) / positions


def map_criterion(name: str, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Find a distance between maps by its name.

    Args:
        name: "hierarchical_context", "channel_kl" or "spatial_kl".
        temperature: τ of the two KLs; hierarchical context has none.

    Raises:
        UserError: there is no such distance, or the temperature is not positive.

    Example:
        >>> map_criterion("hierarchical_context").__name__
        'hierarchical_context'
    """
    _check_temperature(temperature)
    known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "hierarchical_context": hierarchical_context,
        "channel_kl": partial(channel_kl, temperature=temperature),
        "spatial_kl": partial(spatial_kl, temperature=temperature),
    }
    if name not in known:
        raise UserError(f"There is no criterion {name!r} between maps; choose one of: {', '.join(known)}.")
    return known[name]


def _comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:  # torch would broadcast some of these and say nothing
        raise UserError(
            f"Only tensors of equal shape can be compared; the student's is {tuple(student.shape)}, "
            f"the teacher's {tuple(teacher.shape)}. Give both networks the same images."
        )
    return widen(student), widen(teacher.detach())


def _pooled(maps: Tensor) -> Iterator[Tensor]:
    """Averages of [B, H, W, C] over 4×4, 2×2 and 1×1 windows, as far as they are fewer than the shorter side."""
    sides = maps.shape[1:3]
    even = not any(side % POOLED_LEVELS[0] for side in sides)
    for level in POOLED_LEVELS:
        if level < min(sides):
            if even:  # windows that do not overlap: a coarser level is the average of the finer one
                batch, height, width, channels = maps.shape
                windows = maps.reshape(batch, level, height // level, level, width // level, channels)
                maps = windows.sum(4).sum(2) / (height // level * (width // level))
                yield maps
            else:
                yield F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), level)


def _kl_sum(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    _check_temperature(temperature)
    log_student = F.log_softmax(student / temperature, dim)
    log_teacher = F.log_softmax(teacher / temperature, dim)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise UserError(
            f"The temperature of a distance between maps must be a number greater than 0; got {temperature}."
        )
