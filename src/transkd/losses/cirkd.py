"""Cross-image relational distillation: the mini-batch part."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.losses.shared.checks import check_count, check_positive, check_stages
from transkd.losses.shared.grids import feature_pairs, on_grid
from transkd.losses.shared.pieces import BUDGET, full_precision, positions_of, sum_over_rows
from transkd.outputs import SegmentationOutput

__all__ = ["CIRKDMiniBatchLoss", "cross_image_kl", "pool_positions"]

AUTO_POSITIONS = 4096
"""Most positions per image with pool="auto": those of a 512×512 image at stride 8."""


class CIRKDMiniBatchLoss(nn.Module):
    """Compare the similarities of each position to the positions of all images in the batch.

    With u the features of a position divided by their norm, N positions per image, over all ordered pairs (a, b) of
    images including a = b:

        S_ab = u_a · u_bᵀ,  loss = Σ_stages 1 / (B²·N) · Σ_ab Σ_n KL(softmax(S^t_ab[n] / τ) ‖ softmax(S^s_ab[n] / τ))

    No parameters; the channels may differ. Maps of another size are resized bilinearly to the teacher's. Large
    matrices S are computed in chunks and recomputed in the backward pass. In distributed training each process pairs
    only its own images, as in the reference implementation.

    Source: Yang et al., arXiv 2204.06986, its mini-batch-based pixel-to-pixel distillation; weight 1 at τ = 0.1.

    Args:
        stages: stages to compare, counted from 1; their values are summed. The paper uses the features before
            the classifier.
        temperature: τ > 0.
        pool: size and stride of the average pooling applied first; windows at the border may be smaller. 1 keeps
            every position. "auto" is the smallest value with at most 4096 positions per image, 1 for all but large
            maps; the reference implementation uses 4 for maps of at least 256×256.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not used. Time grows
        with (B·N)².

    Raises:
        UserError: the temperature is not positive, `pool` is not a whole number of at least 1, or a stage does not
            exist.

    Example:
        >>> def output(*positions):
        ...     feature = torch.tensor(positions).T.reshape(1, 2, 1, 2)
        ...     return SegmentationOutput(None, (feature,), (), torch.rand(1, 3, 1, 2))
        >>> same, across = output([1.0, 0.0], [3.0, 0.0]), output([1.0, 0.0], [0.0, 1.0])
        >>> CIRKDMiniBatchLoss(stages=(1,), temperature=1.0)(same, across)  # KL of (0.5, 0.5) and (0.73, 0.27)
        tensor(0.1109)
    """

    needs = frozenset({"features"})

    def __init__(self, stages: Sequence[int] = (4,), temperature: float = 0.1, pool: int | str = "auto") -> None:
        super().__init__()
        check_positive(self, "temperature", temperature)
        if pool != "auto":
            check_count(self, "pool, where it is not 'auto',", pool)
        self.stages, self.temperature, self.pool = check_stages(self, stages), temperature, pool

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the similarities across the batch."""
        losses = []
        for pair in feature_pairs(self, self.stages, student, teacher):
            student_maps, teacher_maps = (pool_positions(maps, self.pool) for maps in on_grid(self, *pair))
            losses.append(cross_image_kl(student_maps, teacher_maps, self.temperature))
        return torch.stack(losses).sum()


def pool_positions(maps: Tensor, pool: int | str = "auto") -> Tensor:
    """Average-pool [B, C, h, w]; "auto" selects the smallest windows that leave at most 4096 positions.

    Example:
        >>> [tuple(pool_positions(torch.zeros(1, 3, *size)).shape[2:]) for size in ((64, 64), (128, 256), (65, 64))]
        [(64, 64), (43, 86), (33, 32)]
    """
    if isinstance(pool, str):
        height, width = maps.shape[-2:]
        pool = 1
        while -(-height // pool) * -(-width // pool) > AUTO_POSITIONS:
            pool += 1
    if pool == 1:
        return maps
    return F.avg_pool2d(maps, pool, stride=pool, ceil_mode=True, count_include_pad=False)


def cross_image_kl(student: Tensor, teacher: Tensor, temperature: float, *, budget: int = BUDGET) -> Tensor:
    """Mean KL divergence between the softmax of the cosines of a position with all positions of one image.

    Args:
        student: [B, C, h, w], at least float32.
        teacher: [B, C', h, w], at least float32; detached.
        temperature: τ > 0.
        budget: largest number of cosines in memory at a time.

    Returns:
        A scalar.

    Example:
        >>> maps = torch.rand(2, 3, 4, 4)
        >>> cross_image_kl(maps, 2 * maps, 0.1).item() < 1e-6
        True
    """
    batch = len(student)
    with full_precision(student):
        units = (F.normalize(positions_of(maps), dim=2, eps=1e-12) for maps in (student, teacher.detach()))
        student_units, teacher_units = (unit.flatten(0, 1) for unit in units)

        def log_softmax(rows: Tensor, columns: Tensor) -> Tensor:
            return (rows @ columns.T / temperature).view(len(rows), batch, -1).log_softmax(2)

        def divergence(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
            with full_precision(student_rows):
                log_p, log_q = log_softmax(teacher_rows, teacher_units), log_softmax(student_rows, student_units)
                return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

        rows = len(student_units)
        total = sum_over_rows(divergence, [student_units, teacher_units], columns=rows, budget=budget)
    return total / (batch * rows)
