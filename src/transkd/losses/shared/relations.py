"""Errors between the Gram matrices of two sets of positions, computed without the full matrices if they are large."""

import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.losses.shared.pieces import BUDGET, full_precision, sum_over_rows

__all__ = ["check_rows", "direct_error", "factored_error", "relation_error", "unit"]

FLOOR = 1e-12
FEW = 8
"""Rows per channel up to which all products are computed; above it the factored form is used.

The factored form needs float64, and many GPUs compute in float64 slowly.
"""


def unit(rows: Tensor) -> Tensor:
    """Divide rows [..., C] by their norm; a row with a norm of at most 1e-12 becomes zeros and gets no gradient.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    lengths = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.masked_fill(lengths <= FLOOR, torch.inf)


def relation_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ``(S·Sᵀ − T·Tᵀ)²`` over all pairs of rows within a group, and over the groups.

    Exact, without all R² elements of a large group in memory: they are computed in chunks of rows or, with many more
    rows than channels, avoided by ``‖S·Sᵀ − T·Tᵀ‖² = ‖Sᵀ·S‖² + ‖Tᵀ·T‖² − 2‖Sᵀ·T‖²``.

    Args:
        student: G groups of R rows [G, R, C], float32 or float64.
        teacher: [G, R, C']; C' may differ from C.

    Returns:
        A scalar of the student's dtype.

    Raises:
        UserError: the numbers of groups or rows differ.

    Example:
        >>> relation_error(torch.ones(1, 2, 1), torch.zeros(1, 2, 3))
        tensor(1.)
    """
    check_rows(student, teacher)
    with full_precision(student):
        few = student.shape[1] <= FEW * max(student.shape[2], teacher.shape[2])
        return direct_error(student, teacher) if few else factored_error(student, teacher)


def check_rows(student: Tensor, teacher: Tensor) -> None:
    """Raise a `UserError` for rows [G, R, C] and [G', R', C'] that cannot be paired."""
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            "Relations can be compared only between the same positions of the same images; the student has [images, "
            f"positions] {list(student.shape[:2])}, the teacher {list(teacher.shape[:2])}. Give both the same images."
        )


def direct_error(student: Tensor, teacher: Tensor, budget: int = BUDGET) -> Tensor:
    """Compute `relation_error` from the products of rows, at most `budget` of them at a time."""
    groups, rows, _ = student.shape

    def error(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        difference = student_rows.transpose(0, 1) @ student.mT - teacher_rows.transpose(0, 1) @ teacher.mT
        return difference.square().sum()

    by_row = student.transpose(0, 1), teacher.transpose(0, 1)
    return sum_over_rows(error, by_row, groups * rows, budget=budget) / (groups * rows**2)


def factored_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute `relation_error` from products of channels, in float64 because large numbers are subtracted."""
    groups, rows, _ = student.shape
    dtype = torch.float32 if student.device.type == "mps" else torch.float64  # MPS has no float64
    s, t = student.to(dtype), teacher.to(dtype)
    summands = ((s, s, 1), (t, t, 1), (s, t, -2))
    total = torch.stack([factor * (a.mT @ b).square().sum() for a, b, factor in summands]).sum()
    return (total / (groups * rows**2)).to(student.dtype)
