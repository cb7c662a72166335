"""Fit one layer by linear least squares on activations, accumulated as sums of constant size."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.models.inherit.activations import Batch, Rule

__all__ = ["Gram", "Solving", "fit_linear", "fit_norm", "patches", "rows", "some", "write"]

Layer = nn.Linear | nn.Conv2d


def rows(x: Tensor) -> Tensor:
    """Tokens [..., C] or a map [B, C, H, W] of one batch as rows [N, C] in float64."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).reshape(-1, x.shape[1 if x.ndim == 4 else -1]).double()


def some(positions: int, wanted: float, generator: torch.Generator) -> Tensor:
    """Indices of ``wanted`` random positions, at most all."""
    return torch.randperm(positions, generator=generator)[: max(1, math.ceil(wanted))]


class Gram:
    """Least squares ``y ≈ W x + b`` from sums over rows: XᵀX, XᵀY and the means, all in float64.

    The ridge penalty pulls W towards a prior, by default zero; its strength is ``ridge`` times the mean variance of the
    inputs times the number of rows. The bias is not penalised.

    Example:
        >>> gram = Gram()
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> gram.add(x, 3 * x + 1)
        >>> weight, bias = gram.solve(ridge=0.0)
        >>> round(weight.item(), 6), round(bias.item(), 6)
        (3.0, 1.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mass: Any = 0.0
        self.x: Any = 0.0
        self.y: Any = 0.0
        self.xx: Any = 0.0
        self.xy: Any = 0.0
        self.yy: Any = 0.0

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: inputs [N, in], targets [N, out] and weights of the rows [N]."""
        x, y = rows(x), rows(y)
        heavy = x if weight is None else x * weight.reshape(-1, 1).double()
        heavy_y = y if weight is None else y * weight.reshape(-1, 1).double()
        self.count += len(x)
        self.mass = self.mass + (float(len(x)) if weight is None else weight.double().sum())
        self.x, self.y = self.x + heavy.sum(0), self.y + heavy_y.sum(0)
        self.xx, self.xy = self.xx + heavy.T @ x, self.xy + heavy.T @ y
        self.yy = self.yy + (heavy_y * y).sum(0)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances of the inputs [in, in], of inputs and targets [in, out], and variances of the targets [out]."""
        x, y = self.x / self.mass, self.y / self.mass
        return (
            self.xx / self.mass - torch.outer(x, x),
            self.xy / self.mass - torch.outer(x, y),
            (self.yy / self.mass - y.square()).clamp_min(0),
        )

    def solve(self, ridge: float, prior: Tensor | None = None, bias: bool = True) -> tuple[Tensor, Tensor]:
        """Solve for the weight [out, in] and the bias [out]; without ``bias`` it is 0."""
        xx, xy = self.centred()[:2] if bias else (self.xx / self.mass, self.xy / self.mass)
        # keep the matrix regular where an input never varies
        penalty = ridge * xx.diagonal().mean() + torch.finfo(xx.dtype).eps * xx.diagonal().amax() + 1e-30
        if prior is not None:
            xy = xy + penalty * prior.T.to(xy)
        weight = torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy).T
        shift = (self.y - weight @ self.x) / self.mass
        return weight, shift if bias else torch.zeros_like(shift)


@dataclass
class Solving:
    """Settings and state shared by all fits of a run.

    Attributes:
        ridge: strength of the priors, see ``Gram``.
        generator: source of all random numbers.
        advance: advances the progress bar.
        names: names of the student's modules, for messages.
        shortages: layers with fewer image positions than unknowns: name, positions, unknowns.
        notes: whatever else there is to warn of.
    """

    ridge: float = 1e-3
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    advance: Callable[[], None] = lambda: None
    names: Mapping[nn.Module, str] = field(default_factory=dict)
    shortages: list[tuple[str, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, gram: Gram, layer: nn.Module) -> None:
        """Record a fit with too few positions; raise an error if its sums are not finite."""
        name = self.names.get(layer, type(layer).__name__)
        if not bool(torch.isfinite(gram.x).all() and torch.isfinite(gram.y).all()):
            raise UserError(
                f"solve: the activations around {name} hold NaN or infinity, expected finite ones. Look at the "
                "images, and whether the teacher predicts anything on them"
            )
        unknowns = len(gram.xx) + 1
        if gram.count < unknowns:
            self.shortages.append((name, gram.count, unknowns))

    def warnings(self, images: int) -> list[str]:
        """The notes, and the layer that lacks positions most; so many images were given."""
        if not self.shortages:
            return self.notes
        name, positions, unknowns = max(self.shortages, key=lambda shortage: shortage[2] / shortage[1])
        return [
            *self.notes,
            f"{name} is solved from {positions} image positions for {unknowns} unknowns, {len(self.shortages)} layers "
            "in all from too few; the ridge keeps them near the teacher's weights. Better give "
            f"{math.ceil(images * unknowns / positions)} images than {images}",
        ]


def fit_linear(
    batches: Iterable[Batch],
    layer: Layer,
    inputs: Rule,
    targets: Rule,
    solving: Solving,
    prior: Tensor | None = None,
    weight: Rule | None = None,
) -> None:
    """Fit a linear layer or a convolution to the targets.

    Args:
        batches: batches of activations, read once.
        layer: ``nn.Linear`` or ``nn.Conv2d`` (one group), changed in place.
        inputs: tokens [B, N, in] or a map [B, in, H, W] that the layer reads.
        targets: tokens [B, N', out] or a map [B, out, H', W'] to fit.
        solving: strength of the prior; records fits with too few positions.
        prior: weight towards which the ridge penalty pulls, in the layer's shape.
        weight: weights of the output positions [B, N'].
    """
    gram = Gram()
    for batch in batches:
        x = inputs(batch)
        x = patches(x, layer) if isinstance(layer, nn.Conv2d) else x
        gram.add(x, targets(batch), None if weight is None else weight(batch))
    solving.check(gram, layer)
    solution, bias = gram.solve(solving.ridge, None if prior is None else prior.flatten(1), layer.bias is not None)
    write(layer, solution, bias)


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Patches of a map [B, C, H, W] that a convolution reads at its N' output positions: [B, N', C·k·k]."""
    unfolded = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    return unfolded.transpose(1, 2)


def fit_norm(batches: Iterable[Batch], norm: nn.LayerNorm, inputs: Rule, targets: Rule) -> None:
    """Fit a LayerNorm's gain and bias by one univariate regression per channel.

    A constant channel keeps its gain, and its bias is fitted to the mean.
    """
    count, sums = 0, torch.zeros(())
    for batch in batches:
        x = rows(F.layer_norm(inputs(batch), norm.normalized_shape, eps=norm.eps))
        y = rows(targets(batch))
        count += len(x)
        sums = sums + torch.stack([part.sum(0) for part in (x, y, x * x, x * y)])
    x, y, xx, xy = sums / count
    variance = xx - x * x
    gain = torch.where(variance > 1e-12, (xy - x * y) / variance.clamp_min(1e-12), norm.weight.double())
    write(norm, gain, y - gain * x)


def write(layer: Layer | nn.LayerNorm, weight: Tensor, bias: Tensor) -> None:
    """Copy solved parameters into a layer."""
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(bias)
