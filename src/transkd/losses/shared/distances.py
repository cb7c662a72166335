"""Distances between two tensors of equal shape.

Inputs in half precision are converted to float32; float64 stays float64. The teacher's tensor is detached.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.errors import UserError

__all__ = [
    "channel_kl",
    "hierarchical_context",
    "map_criterion",
    "mean_squared_error",
    "position_mean",
    "spatial_kl",
    "widen",
]

POOLED_LEVELS = (4, 2, 1)


def widen(tensor: Tensor) -> Tensor:
    """Convert float16 and bfloat16 tensors to float32; return others unchanged."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared difference over all elements.

    Args:
        student: any shape, floating.
        teacher: the same shape; detached.

    Raises:
        UserError: the shapes differ.

    Example:
        >>> import torch
        >>> mean_squared_error(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        tensor(5.)
    """
    return F.mse_loss(*_comparable(student, teacher))


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between maps at full size and average-pooled to 4×4, 2×2 and 1×1, weighted by level.

    ``Σ_j 2^-j E_j / Σ_j 2^-j``, with E_0 the mean squared error at full size and E_1, E_2, … those of the pooled levels
    from fine to coarse. A pooled level that is not smaller than the map's shorter side is skipped; the remaining levels
    are numbered consecutively.

    Source: ReviewKD, arXiv 2104.09044, section 3.3.

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C, H, W]; detached.

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
    difference = student - teacher  # average pooling is linear: pool the difference, not both maps
    errors = [_mean_square(level) for level in (difference, *_pooled(difference))]
    weights = [0.5**j for j in range(len(errors))]
    weighted = [weight * error for weight, error in zip(weights, errors, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence between the softmax over the positions of each channel.

    ``τ² / (B·C) · Σ_b Σ_c KL(softmax_HW(teacher / τ) ‖ softmax_HW(student / τ))``.

    Source: CWD, arXiv 2011.13256, section 3.

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C, H, W]; detached.
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
    """KL divergence between the softmax over the channels at each position.

    ``τ² / (B·H·W) · Σ_b Σ_hw KL(softmax_C(teacher / τ) ‖ softmax_C(student / τ))``.

    Source: Hinton et al., arXiv 1503.02531, section 2, at each position.

    Args:
        student: [B, C, H, W], floating.
        teacher: [B, C, H, W]; detached.
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
    """Return a distance between maps by its name.

    Args:
        name: "hierarchical_context", "channel_kl" or "spatial_kl".
        temperature: τ of the two KL divergences; hierarchical context does not use it.

    Raises:
        UserError: the name is unknown, or the temperature is not positive.

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
    if student.shape != teacher.shape:  # PyTorch would broadcast some of these silently
        raise UserError(
            f"Only tensors of equal shape can be compared; the student's is {tuple(student.shape)}, "
            f"the teacher's {tuple(teacher.shape)}. Give both networks the same images."
        )
    return widen(student), widen(teacher.detach())


def _pooled(maps: Tensor) -> Iterator[Tensor]:
    """Average-pool [B, C, H, W] to each of the POOLED_LEVELS that is smaller than the shorter side."""
    height, width = maps.shape[2:]
    divisible = height % POOLED_LEVELS[0] == 0 and width % POOLED_LEVELS[0] == 0
    for size in POOLED_LEVELS:
        if size >= min(height, width):
            continue
        if divisible:  # equal windows: the mean of the previous level's windows is the mean of the whole map's
            maps = _pool_equal_windows(maps, size)
            yield maps
        else:
            yield position_mean(maps) if size == 1 else F.adaptive_avg_pool2d(maps, size)


# The functions below compute what the PyTorch expressions in their docstrings do, but their gradients have the memory
# format of the maps (channels-last in the networks). Adding gradients of different formats takes several times as long.


def position_mean(maps: Tensor) -> Tensor:
    """``maps.mean((2, 3), keepdim=True)`` of [B, C, H, W]."""
    dtype = torch.promote_types(maps.dtype, torch.float32)  # sum in float32: float16 overflows
    return (maps.sum((2, 3), keepdim=True, dtype=dtype) / maps[0, 0].numel()).to(maps.dtype)


def _mean_square(maps: Tensor) -> Tensor:
    """``maps.square().mean()`` of [B, C, H, W]."""
    return maps.permute(0, 2, 3, 1).square().sum() / maps.numel()


def _pool_equal_windows(maps: Tensor, size: int) -> Tensor:
    """``F.adaptive_avg_pool2d(maps, size)`` of [B, C, H, W] with H and W divisible by `size`."""
    batch, channels, height, width = maps.shape
    rows, columns = height // size, width // size
    windows = maps.permute(0, 2, 3, 1).reshape(batch, size, rows, size, columns, channels)
    return (windows.sum(4).sum(2) / (rows * columns)).permute(0, 3, 1, 2)


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
