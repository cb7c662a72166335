"""Checks of the values that are loaded into a network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from transkd.errors import UserError

__all__ = ["check_values"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_values(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Check the tensors of a file against a network's of the same names and shapes.

    Raises:
        UserError: a tensor has another kind of type, or values that no training leaves: NaN, infinite, also after
            conversion to the network's type, or a negative variance; names the first one.

    Example:
        >>> check_values({"bias": torch.tensor([0.0, torch.nan])}, {"bias": torch.zeros(2)}, "student.pth")
        Traceback (most recent call last):
        transkd.errors.UserError: student.pth cannot be used: bias has 1 of 2 values that are NaN or infinite. ...
    """
    for name, tensor in tensors.items():
        problem = None if tensor is expected[name] else _problem(name, tensor, expected[name])
        if problem is not None:
            raise UserError(
                f"{source} cannot be used: {name} {problem}. The file is damaged or of a training that failed: copy or "
                "download it again, or take an earlier one"
            )


def _problem(name: str, tensor: Tensor, like: Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return "is sparse, quantised or without values"
    if not like.is_floating_point():  # the batch counters of BatchNorm
        counts = not (tensor.is_complex() or tensor.dtype == torch.bool) and bool((tensor >= 0).all())
        return None if counts else "has values that are no counts"
    if tensor.dtype not in FLOATS:
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}, expected floating point"
    values = tensor.to(like.dtype)
    broken = int((~values.isfinite()).sum())
    if broken:
        return f"has {broken} of {values.numel()} values that are NaN or infinite"
    if name.endswith("running_var") and bool((values < 0).any()):
        return "has negative variances"
    return None
