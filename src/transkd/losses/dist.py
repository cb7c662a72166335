"""Distillation of inter-class and intra-class relations by Pearson correlation."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transkd.losses.shared.checks import check_choice, check_positive, check_share
from transkd.losses.shared.grids import GRIDS, logits_pair, valid_on_grid
from transkd.outputs import SegmentationOutput

__all__ = ["DISTLoss", "relations"]

EPS = 1e-8


class DISTLoss(nn.Module):
    """Pearson correlation between both networks' class probabilities, along classes and along positions.

    ``β·inter + γ·intra``, with p = softmax(logits / τ) and ρ Pearson's correlation, 1e-8 added to its denominator:

        inter = τ² · (1 − mean over positions of ρ(p_s, p_t) along the classes)
        intra = τ² · (1 − mean over classes of ρ(p_s, p_t) along all positions of the whole batch)

    A correlation is invariant to scale: the student may be less confident than the teacher. For constant probabilities
    ρ is 0. One reimplementation computes intra along the images of the batch at each position; here, as in the authors'
    code, all positions form one axis. In distributed training that axis holds the positions of each process's own
    images, so intra differs from that of one process with the joined batch.

    Source: Huang et al., arXiv 2205.10536, section 4; β, γ and τ are those of its code for segmentation.

    Args:
        beta: weight of inter.
        gamma: weight of intra.
        temperature: τ > 0; larger values flatten the distributions. The paper's segmentation code does not use it (1).
        grid: size at which to compare: "teacher", "student" or "labels"; logits of another size are resized bilinearly,
            align_corners=False.
        mask_ignored: exclude positions whose label, by nearest neighbour, is ignored; not in the paper.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, to a scalar, float32 or float64; a target [B, H, W] for grid "labels" or
        `mask_ignored`.

    Raises:
        UserError: a setting is out of range, required labels or logits are missing, or the networks have different
            numbers of classes or a single class.

    Example:
        >>> student, teacher = (
        ...     SegmentationOutput(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]) * scale, (), (), torch.rand(1, 3, 4, 8))
        ...     for scale in (2, 5)
        ... )
        >>> DISTLoss()(student, teacher).round(decimals=4).abs()  # less confident, same ranking
        tensor(0.)
    """

    needs = frozenset({"logits"})

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        grid: str = "teacher",
        mask_ignored: bool = False,
    ) -> None:
        super().__init__()
        check_share(self, "beta", beta)
        check_share(self, "gamma", gamma)
        check_positive(self, "temperature", temperature)
        check_choice(self, "grid", grid, GRIDS)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature
        self.grid, self.mask_ignored = grid, mask_ignored

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the logits."""
        logits, teacher_logits = logits_pair(self, student, teacher, self.grid, target)
        valid = valid_on_grid(self, target, logits) if self.mask_ignored else None
        inter, intra = relations(logits, teacher_logits, valid, self.temperature)
        return self.beta * inter + self.gamma * intra


def relations(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Inter and intra of `DISTLoss`, both multiplied by τ².

    Images are processed one by one and activations are checkpointed (recomputed in the backward pass), so the memory
    beyond the logits does not grow with the batch size.

    Args:
        student: logits [B, K, h, w], at least float32.
        teacher: the same shape; detached.
        valid: bool [B, h, w], positions to include; None includes all.
        temperature: τ > 0.

    Example:
        >>> scores = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> [part.round(decimals=4) for part in relations(scores, -scores)]  # opposite ranking
        [tensor(2.), tensor(2.)]
    """
    teacher = teacher.detach()
    if valid is None:
        valid = student.new_ones(student[:, 0].shape, dtype=torch.bool)
    count = valid.sum()
    images = list(zip(student, teacher, valid, strict=True))
    with torch.no_grad():  # the gradient through the means is 0: centred values sum to 0
        sums = [[(_probabilities(z, mask, temperature) * mask).sum((1, 2)) for z in pair] for *pair, mask in images]
        means = [torch.stack(column).sum(0) / count.clamp_min(1) for column in zip(*sums, strict=True)]
    parts = [
        checkpoint(_of_one_image, *image, *means, temperature, use_reentrant=False, preserve_rng_state=False)
        for image in images
    ]
    correlations, products, student_norms, teacher_norms = (torch.stack(part) for part in zip(*parts, strict=True))
    inter = 1 - correlations.sum() / count.clamp_min(1)
    norms = torch.linalg.vector_norm(student_norms, dim=0) * torch.linalg.vector_norm(teacher_norms, dim=0)
    intra = 1 - (products.sum(0) / (norms + EPS)).mean()
    scale = temperature**2 * (count > 0)  # 0 without a valid position
    return scale * inter, scale * intra


def _of_one_image(
    student: Tensor, teacher: Tensor, valid: Tensor, student_mean: Tensor, teacher_mean: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of correlations along the classes, and per class Σ(a·b), ‖a‖ and ‖b‖ of the centred values."""
    p_student, p_teacher = (_probabilities(logits, valid, temperature) for logits in (student, teacher))
    a, b = p_student - 1 / len(p_student), p_teacher - 1 / len(p_teacher)  # K probabilities have the mean 1 / K
    products, norms = (a * b).sum(0), torch.linalg.vector_norm(a, dim=0) * torch.linalg.vector_norm(b, dim=0)
    correlations = (products / (norms + EPS)).masked_fill(~valid, 0).sum()
    a, b = ((p - mean[:, None, None]) * valid for p, mean in ((p_student, student_mean), (p_teacher, teacher_mean)))
    return (
        correlations,
        (a * b).sum((1, 2)),
        torch.linalg.vector_norm(a, dim=(1, 2)),
        torch.linalg.vector_norm(b, dim=(1, 2)),
    )


def _probabilities(logits: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Softmax over the classes of [K, h, w]; uniform at invalid positions, even if their logits are not finite."""
    return (logits / temperature).masked_fill_(~valid, 0).softmax(0)
