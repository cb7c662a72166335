"""Structured knowledge distillation, pair-wise part: similarities between the positions of an image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_count, check_stages
from transkd.losses.shared.grids import feature_pairs, on_grid
from transkd.losses.shared.pieces import positions_of
from transkd.losses.shared.relations import relation_error
from transkd.outputs import SegmentationOutput

__all__ = ["SKDPairwiseLoss", "pairwise_error", "pool_nodes"]


class SKDPairwiseLoss(nn.Module):
    """Compare the cosines between all nodes (pooled positions) of an image in both networks' features.

    Nodes are max-pooled windows of the map, M per image; u are the features of a node divided by their norm:

        S[m, n] = u_m · u_n,  loss = Σ_stages 1 / (B·M²) · Σ_b Σ_mn (S_s[m, n] − S_t[m, n])²

    No parameters; the channels may differ. Maps of another size are resized bilinearly to the teacher's. With many more
    nodes than channels the same value is computed without S.

    Source: Liu et al., arXiv 1903.04197, its pair-wise distillation. The authors' code pools to 2×2 nodes
    (`pool_fraction` 0.5, weight 1) and detaches the norms (`stop_norm_gradient`). CIRKD pools by 2 (weight 10) and does
    not detach them, as here by default.

    Args:
        stages: stages to compare, counted from 1; their values are summed.
        pool: size and stride of the windows; windows at the border may be smaller. 1 keeps every position.
        pool_fraction: side of the windows as a fraction of the map's, instead of `pool`; 0.5 gives 2×2 nodes, 3 along
            an odd side.
        stop_norm_gradient: whether the norms are detached, with 1e-8 added to them.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: `pool` is not a whole number of at least 1, `pool_fraction` is outside (0, 1], or a stage does not
            exist.

    Example:
        >>> def output(*nodes):
        ...     feature = torch.tensor(nodes).T.reshape(1, 2, 1, 2)
        ...     return SegmentationOutput(None, (feature,), (), torch.rand(1, 3, 4, 4))
        >>> same, across = output([1.0, 0.0], [3.0, 0.0]), output([1.0, 0.0], [0.0, 1.0])
        >>> SKDPairwiseLoss(stages=(1,), pool=1)(same, across)  # two of four cosines differ by 1
        tensor(0.5000)
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        stages: Sequence[int] = (4,),
        pool: int = 2,
        pool_fraction: float | None = None,
        stop_norm_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.stages = check_stages(self, stages)
        check_count(self, "pool", pool)
        if pool_fraction is not None and not 0 < pool_fraction <= 1:
            raise UserError(
                f"SKDPairwiseLoss: pool_fraction must be greater than 0 and at most 1, or None; got {pool_fraction}."
            )
        self.pool, self.pool_fraction, self.stop_norm_gradient = pool, pool_fraction, stop_norm_gradient

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the cosines within each image."""
        losses = []
        for pair in feature_pairs(self, self.stages, student, teacher):
            nodes, teacher_nodes = (pool_nodes(maps, self.pool, self.pool_fraction) for maps in on_grid(self, *pair))
            losses.append(pairwise_error(nodes, teacher_nodes, self.stop_norm_gradient))
        return torch.stack(losses).sum()


def pool_nodes(maps: Tensor, pool: int = 2, pool_fraction: float | None = None) -> Tensor:
    """Max-pool [B, C, h, w] with windows of side `pool`, or of `pool_fraction` of the map's sides if given.

    Example:
        >>> [tuple(pool_nodes(torch.zeros(1, 3, 7, 12), 2, fraction).shape[2:]) for fraction in (None, 0.5)]
        [(4, 6), (3, 2)]
    """
    window = (pool, pool)
    if pool_fraction is not None:
        window = (max(1, int(maps.shape[2] * pool_fraction)), max(1, int(maps.shape[3] * pool_fraction)))
    return F.max_pool2d(maps, window, stride=window, ceil_mode=True)


def pairwise_error(student: Tensor, teacher: Tensor, stop_norm_gradient: bool = False) -> Tensor:
    """Mean squared difference between the cosines of all pairs of positions of an image.

    Args:
        student: [B, C, h, w], at least float32.
        teacher: [B, C', h, w], at least float32; detached.
        stop_norm_gradient: whether the norms are detached.

    Returns:
        A scalar.

    Example:
        >>> maps = torch.rand(2, 3, 4, 4)
        >>> abs(pairwise_error(maps, 2 * maps).item()) < 1e-12
        True
    """
    nodes, teacher_nodes = (_unit_nodes(positions_of(m), stop_norm_gradient) for m in (student, teacher.detach()))
    return relation_error(nodes, teacher_nodes)


def _unit_nodes(nodes: Tensor, stop_norm_gradient: bool) -> Tensor:
    if stop_norm_gradient:
        return nodes / (nodes.detach().norm(dim=-1, keepdim=True) + 1e-8)
    return F.normalize(nodes, dim=-1, eps=1e-12)
