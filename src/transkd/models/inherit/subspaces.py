"""What a narrower network keeps of a wider one's activations, from their second moments alone."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError

__all__ = [
    "Basis",
    "Moments",
    "identity_basis",
    "principal_basis",
    "reconstructing_units",
    "score_factors",
    "value_factors",
]


@dataclass(frozen=True)
class Basis:
    """Teacher's channels to student's and back.

    Attributes:
        down: [C_t, C_s]; the student's stream stands for the teacher's times this.
        up: [C_s, C_t]; the teacher's normalised tokens are about the student's times this.
        identity: the student's channels are the teacher's.
    """

    down: Tensor
    up: Tensor
    identity: bool = False

    def normed(self, norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
        """What the student's norm should give where the teacher's reads these tokens, [B, N, C_t] to [B, N, C_s].

        In a basis of its own the student's norm does without the teacher's gain, which would not commute with the
        change of basis; the layers that read it have the gain in their weights (``reader``).
        """
        if self.identity:
            return norm(tokens)
        return F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps) @ self.down

    def reader(self, norm: nn.LayerNorm) -> Tensor:
        """[C_s, C_t]: the teacher's normed tokens are about the student's times this, plus a constant."""
        return self.up if self.identity else self.up * norm.weight


def identity_basis(like: Tensor) -> Basis:
    """The basis of a student as wide as its teacher; ``like`` [C, …] says how wide, and of which type."""
    eye = torch.eye(len(like), device=like.device, dtype=like.dtype)
    return Basis(eye, eye, identity=True)


def principal_basis(moment: Tensor, width: int, generator: torch.Generator) -> Basis:
    """The principal directions of normalised tokens, laid so that LayerNorm treats them as the teacher's does.

    LayerNorm subtracts the mean over channels and divides by the length of the rest. Both commute with a change of
    basis within the vectors of mean 0 (SliceGPT, arXiv 2401.15024, section 3, folds the mean into the weights
    instead). So ``width - 1`` directions of mean 0 are taken, and turned at random, that the channels have like
    variance, into the vectors of mean 0 of the student's channels: LayerNorm loses nothing of what is kept.

    Args:
        moment: second moment E[x xᵀ] [C_t, C_t] of tokens whose channels have mean 0.
        width: channels of the student.
        generator: of the turn.
    """
    size = len(moment)
    moment = moment - moment.mean(0) - moment.mean(1, keepdim=True) + moment.mean()
    directions = torch.linalg.eigh(moment).eigenvectors[:, -(width - 1) :].flip(1)
    turn = torch.randn(width, width, generator=generator, dtype=moment.dtype).to(moment.device)
    turn[:, 0] = 1
    turn = torch.linalg.qr(turn).Q[:, 1:]  # orthonormal, and each of mean 0
    scale = (width / size) ** 0.5  # keeps the variance of a channel
    down = scale * directions @ turn.T
    return Basis(down.float(), (down.T / scale**2).float())


class Moments:
    """Second moment of rows and their mean, summed in float64."""

    def __init__(self) -> None:
        self.count: float = 0
        self.total: Any = 0.0
        self.products: Any = 0.0

    def add(self, x: Tensor, times: float = 1) -> None:
        """Add rows [..., C], each counted so many times."""
        x = x.reshape(-1, x.shape[-1]).double()
        self.count += times * len(x)
        self.total = self.total + times * x.sum(0)
        self.products = self.products + times * (x.T @ x)

    def second(self) -> Tensor:
        """E[x xᵀ]."""
        if not bool(torch.isfinite(self.products).all()):
            raise UserError(
                "solve: the teacher's activations hold NaN or infinity on these images, expected finite ones. Look at "
                "the images, and whether the teacher predicts anything on them"
            )
        return self.products / self.count

    def covariance(self) -> Tensor:
        """E[x xᵀ] − E[x] E[x]ᵀ."""
        mean = self.total / self.count
        return self.second() - torch.outer(mean, mean)


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive semi-definite matrix, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    size = values.sqrt()
    kept = values > 1e-10 * values[-1]
    inverse = torch.where(kept, size.clamp_min(1e-150).reciprocal(), 0.0)
    return vectors * size @ vectors.T, vectors * inverse @ vectors.T


def score_factors(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Maps [d, rank] of a head's queries and keys that keep the scores q·k best, in the mean over both.

    With Q and K the second moments, q·k = q'ᵀ (Q^½ K^½) k' for white q' and k'; the best product of lower rank is
    that of the largest singular values.
    """
    (q_root, q_inverse), (k_root, k_inverse) = root(queries), root(keys)
    left, sizes, right = torch.linalg.svd(q_root @ k_root)
    share = sizes[:rank].sqrt()
    return q_inverse @ left[:, :rank] * share, k_inverse @ right[:rank].T * share


def value_factors(values: Tensor, readout: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [d, rank] and back [rank, d] of what a head gives that keep ``readout`` [C, d] of it best, and the sizes."""
    v_root, v_inverse = root(values)
    _, sizes, right = torch.linalg.svd(readout @ v_root, full_matrices=False)
    return v_inverse @ right[:rank].T, right[:rank] @ v_root, sizes[:rank]


def reconstructing_units(units: Tensor, outputs: Tensor, count: int) -> Tensor:
    """Which hidden units explain the outputs best by linear regression, chosen one after the other.

    Orthogonal least squares (Chen, Billings & Luo, 1989): each step takes the unit that lowers the squared error most
    given those that are there; the covariances are deflated by a Cholesky column a step.

    Args:
        units: covariance of the units' activations [H, H].
        outputs: covariance of units and outputs [H, C].
        count: how many to choose.

    Returns:
        Indices in ascending order.
    """
    left = units.diagonal().clone()
    floor = 1e-9 * left.amax()
    outputs = outputs.clone()
    columns = torch.zeros(len(units), count, dtype=units.dtype, device=units.device)
    taken = torch.zeros(len(units), dtype=torch.bool, device=units.device)
    for k in range(count):
        gain = torch.where(left > floor, outputs.square().sum(1) / left.clamp_min(floor), 0.0)
        j = int(gain.masked_fill(taken, -1.0).argmax())
        taken[j] = True
        column = units[:, j] - columns[:, :k] @ columns[j, :k]
        column = column / left[j].clamp_min(floor).sqrt()
        outputs -= torch.outer(column, outputs[j] / left[j].clamp_min(floor).sqrt())
        left = (left - column.square()).clamp_min(0)
        columns[:, k] = column
    return taken.nonzero().flatten()
