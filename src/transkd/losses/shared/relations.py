"""Relations between positions: all pairs compared, without a matrix of all pairs where there are many."""

import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.losses.shared.pieces import BUDGET, full_precision, sum_over_rows

__all__ = ["check_rows", "direct_error", "factored_error", "relation_error", "unit"]

FLOOR = 1e-12
FEW = 8
"""Up to so many rows a channel all products are computed: many GPUs are slow in float64, which the factors need."""


def unit(rows: Tensor) -> Tensor:
    """Rows [..., C] of length 1; one that is shorter than 1e-12 becomes zeros and takes no gradient.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    lengths = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.masked_fill(lengths <= FLOOR, torch.inf)


def relation_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ``(S·Sᵀ − T·Tᵀ)²`` over all pairs of rows of a group, and over the groups.

    Exact, and never with all R² numbers of a large group: they are computed piece by piece or, where there are many
    more rows than channels, left out by ``‖S·Sᵀ − T·Tᵀ‖² = ‖Sᵀ·S‖² + ‖Tᵀ·T‖² − 2‖Sᵀ·T‖²``.

    Args:
        student: G groups of R rows [G, R, C], float32 or float64.
        teacher: [G, R, C'], of other channels or the same.

    Returns:
        A scalar of the student's type.

    Raises:
        UserError: the groups or rows differ in number.

    Example:
        >>> relation_error(torch.ones(1, 2, 1), torch.zeros(1, 2, 3))
        tensor(1.)
    """
    check_rows(student, teacher)
    with full_precision(student):
        few = student.shape[1] <= FEW * max(student.shape[2], teacher.shape[2])
        return direct_error(student, teacher) if few else factored_error(student, teacher)


def check_rows(student: Tensor, teacher: Tensor) -> None:
    """Refuse rows [G, R, C] and [G', R', C'] that cannot be paired."""
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            "Relations can be compared only between the same positions of the same images; the student has [images, "
            f"positions] {list(student.shape[:2])}, the teacher {list(teacher.shape[:2])}. Give both the same images."
        )


def direct_error(student: Tensor, teacher: Tensor, budget: int = BUDGET) -> Tensor:
    """`relation_error` as it is written, with no more than `budget` of the products at a time."""
    groups, rows, _ = student.shape

    def error(own: Tensor, other: Tensor) -> Tensor:
        products = own.transpose(0, 1) @ student.mT - other.transpose(0, 1) @ teacher.mT
        return products.square().sum()

    pieces = student.transpose(0, 1), teacher.transpose(0, 1)
    return sum_over_rows(error, pieces, groups * rows, budget=budget) / (groups * rows**2)


def factored_error(student: Tensor, teacher: Tensor) -> Tensor:
    """`relation_error` from products of channels, in float64 since it subtracts large numbers; MPS has float32."""
    groups, rows, _ = student.shape
    exact = torch.float32 if student.device.type == "mps" else torch.float64
    own, other = student.to(exact), teacher.to(exact)
    pairs = ((own, own, 1), (other, other, 1), (own, other, -2))
    total = torch.stack([sign * (a.mT @ b).square().sum() for a, b, sign in pairs]).sum()
    return (total / (groups * rows**2)).to(student.dtype)
