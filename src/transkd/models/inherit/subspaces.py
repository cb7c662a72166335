"""Subspaces of a wider network's activations for a narrower one, computed from second moments."""

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
    """Linear maps from the teacher's channels to the student's and back.

    Attributes:
        down: [C_t, C_s]; the student's residual stream approximates the teacher's times this matrix.
        up: [C_s, C_t]; the teacher's normalised tokens are approximately the student's times this matrix.
        identity: whether both networks have the same channels.
    """

    down: Tensor
    up: Tensor
    identity: bool = False

    def normed(self, norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
        """Target of the student's norm for tokens that the teacher's reads, [B, N, C_t] to [B, N, C_s].

        With a change of basis the target excludes the teacher's gain, which does not commute with it; the gain is
        folded into the weights of the layers that read the norm (``reader``).
        """
        if self.identity:
            return norm(tokens)
        return F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps) @ self.down

    def reader(self, norm: nn.LayerNorm) -> Tensor:
        """Matrix [C_s, C_t]; the teacher's norm outputs are about the student's times it, plus a constant."""
        return self.up if self.identity else self.up * norm.weight


def identity_basis(like: Tensor) -> Basis:
    """Basis of a student as wide as its teacher; ``like`` [C, …] determines width, dtype and device."""
    eye = torch.eye(len(like), device=like.device, dtype=like.dtype)
    return Basis(eye, eye, identity=True)


def principal_basis(moment: Tensor, width: int, generator: torch.Generator) -> Basis:
    """Principal directions of normalised tokens, in a basis with which LayerNorm commutes.

    LayerNorm subtracts the mean over channels and divides by the norm of the rest. Both commute with an orthogonal
    change of basis of the vectors of mean 0 (SliceGPT, arXiv 2401.15024, section 3, folds the mean into the weights
    instead). So ``width - 1`` principal directions of mean 0 are mapped to the mean-0 vectors of the student's
    channels, by a random rotation that equalises the variance of the channels: LayerNorm then loses none of them.

    Args:
        moment: second moment E[x xᵀ] [C_t, C_t] of tokens with mean 0 over the channels.
        width: channels of the student.
        generator: random numbers for the rotation.
    """
    size = len(moment)
    moment = moment - moment.mean(0) - moment.mean(1, keepdim=True) + moment.mean()
    directions = torch.linalg.eigh(moment).eigenvectors[:, -(width - 1) :].flip(1)
    turn = torch.randn(width, width, generator=generator, dtype=moment.dtype).to(moment.device)
    turn[:, 0] = 1
    turn = torch.linalg.qr(turn).Q[:, 1:]  # orthonormal, each column of mean 0
    scale = (width / size) ** 0.5  # preserves the variance per channel
    down = scale * directions @ turn.T
    return Basis(down.float(), (down.T / scale**2).float())


class Moments:
    """Second moment and mean of rows, accumulated in float64."""

    def __init__(self) -> None:
        self.count: float = 0
        self.total: Any = 0.0
        self.products: Any = 0.0

    def add(self, x: Tensor, times: float = 1) -> None:
        """Add rows [..., C], each ``times`` times."""
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
    """Maps [d, rank] of a head's queries and keys that minimise the mean squared error of the scores q·k.

    With second moments Q and K, q·k = q'ᵀ (Q^½ K^½) k' for whitened q' and k'; the best approximation of lower rank is
    the truncated SVD.
    """
    (q_root, q_inverse), (k_root, k_inverse) = root(queries), root(keys)
    left, sizes, right = torch.linalg.svd(q_root @ k_root)
    share = sizes[:rank].sqrt()
    return q_inverse @ left[:, :rank] * share, k_inverse @ right[:rank].T * share


def value_factors(values: Tensor, readout: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [d, rank] and back of a head's outputs that best preserve ``readout`` [C, d], and the singular values."""
    v_root, v_inverse = root(values)
    _, sizes, right = torch.linalg.svd(readout @ v_root, full_matrices=False)
    return v_inverse @ right[:rank].T, right[:rank] @ v_root, sizes[:rank]


def reconstructing_units(units: Tensor, outputs: Tensor, count: int) -> Tensor:
    """Select hidden units greedily that explain the outputs best by linear regression.

    Orthogonal least squares (Chen, Billings & Luo, 1989): each step selects the unit that reduces the squared error
    most, given those selected; the covariances are deflated by one Cholesky column per step.

    Args:
        units: covariance of the units' activations [H, H].
        outputs: covariance of units and outputs [H, C].
        count: number of units to select.

    Returns:
        Indices in ascending order.
    """
    left = units.diagonal().clone()
    floor = 1e-9 * left.amax()
    outputs = outputs.clone()
    shared = outputs.square().sum(1)
    columns = torch.zeros(len(units), count, dtype=units.dtype, device=units.device)
    taken = torch.zeros(len(units), dtype=torch.bool, device=units.device)
    for k in range(count):
        gain = torch.where(left > floor, shared / left.clamp_min(floor), 0.0)
        j = int(gain.masked_fill(taken, -1.0).argmax())
        taken[j] = True
        size = left[j].clamp_min(floor).sqrt()
        column = (units[:, j] - columns[:, :k] @ columns[j, :k]) / size
        explained = outputs[j] / size
        # update the squared residuals without recomputing them from the outputs
        shared = shared - 2 * column * (outputs @ explained) + column.square() * explained.square().sum()
        outputs.addr_(column, explained, alpha=-1)
        left = (left - column.square()).clamp_min(0)
        columns[:, k] = column
    return taken.nonzero().flatten()
