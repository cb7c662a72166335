"""Distillation of relations between probabilities, by their correlation."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transkd.losses.shared.checks import check_choice, check_positive, check_share, require_target
from transkd.losses.shared.grids import GRIDS, labels_on_grid, logits_pair
from transkd.outputs import SegmentationOutput

__all__ = ["DISTLoss", "relations"]

EPS = 1e-8


class DISTLoss(nn.Module):
    """Compare how both networks rank the classes at a position, and the positions for a class.

    ``β·inter + γ·intra``, with p = softmax(logits / τ) and ρ Pearson's correlation, 1e-8 added to its denominator:

        inter = τ² · (1 − mean over positions of ρ(p_s, p_t) along the classes)
        intra = τ² · (1 − mean over classes of ρ(p_s, p_t) along all positions of the whole batch)

    A correlation leaves the student free to be less sure than the teacher, as long as it ranks alike. Where a
    probability is the same everywhere ρ is 0. One reimplementation, fed with maps, correlates for intra along the
    images of the batch at each position; as in the authors' code, all positions are one axis here. With several
    processes that axis holds the positions of each process's own images, so intra is not that of the joined batch.

    Source: Huang et al., arXiv 2205.10536, section 4; β, γ and τ are those of its code for segmentation.

    Args:
        beta: of inter.
        gamma: of intra.
        temperature: τ > 0; a larger one flattens the distributions. The paper's segmentation code has none.
        grid: where to compare: "teacher", "student" or "labels"; logits of another size are resized bilinearly,
            align_corners=False.
        mask_ignored: leave out the positions whose label, by nearest neighbour, is 255 or negative; not in the paper.

    Shapes:
        Logits [B, K, h, w] of both, K ≥ 2, to a scalar, float32 or float64; a target [B, H, W] where the grid is the
        labels' or the ignored positions are left out.

    Raises:
        UserError: a setting out of range, no labels where they are read, no logits, a single class, or networks with
            different classes.

    Example:
        >>> student, teacher = (
        ...     SegmentationOutput(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]) * scale, (), (), torch.rand(1, 3, 4, 8))
        ...     for scale in (2, 5)
        ... )
        >>> DISTLoss()(student, teacher).round(decimals=4).abs()  # less sure, but ranked alike
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
        ours, theirs = logits_pair(self, student, teacher, self.grid, target)
        valid = None
        if self.mask_ignored:
            _, valid = labels_on_grid(require_target(self, target), theirs.shape[-2:])
        inter, intra = relations(ours, theirs, valid, self.temperature)
        return self.beta * inter + self.gamma * intra


def relations(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Inter and intra of `DISTLoss`, both with their τ².

    Goes image by image and computes the probabilities again for the gradient, so that what is kept beside the logits
    does not grow with the batch.

    Args:
        student: logits [B, K, h, w], at least float32.
        teacher: the same shape; a constant.
        valid: bool [B, h, w]; nothing else counts; None: all do.
        temperature: τ > 0.

    Example:
        >>> scores = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> [part.round(decimals=4) for part in relations(scores, -scores)]  # all the other way round
        [tensor(2.), tensor(2.)]
    """
    teacher = teacher.detach()
    if valid is None:
        valid = student.new_ones(student[:, 0].shape, dtype=torch.bool)
    count = valid.sum()
    images = list(zip(student, teacher, valid, strict=True))
    with torch.no_grad():  # centred values sum to 0, so no gradient would pass through the means
        sums = [[(_probabilities(z, mask, temperature) * mask).sum((1, 2)) for z in pair] for *pair, mask in images]
        means = [torch.stack(column).sum(0) / count.clamp_min(1) for column in zip(*sums, strict=True)]
    parts = [
        checkpoint(_of_one_image, *image, *means, temperature, use_reentrant=False, preserve_rng_state=False)
        for image in images
    ]
    alike, products, student_norms, teacher_norms = (torch.stack(part) for part in zip(*parts, strict=True))
    inter = 1 - alike.sum() / count.clamp_min(1)
    norms = torch.linalg.vector_norm(student_norms, dim=0) * torch.linalg.vector_norm(teacher_norms, dim=0)
    intra = 1 - (products.sum(0) / (norms + EPS)).mean()
    something = temperature**2 * (count > 0)
    return something * inter, something * intra


def _of_one_image(
    student: Tensor, teacher: Tensor, valid: Tensor, student_mean: Tensor, teacher_mean: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed correlations along the classes; per class the sum of products and both norms of the centred values."""
    ours, theirs = _probabilities(student, valid, temperature), _probabilities(teacher, valid, temperature)
    a, b = ours - 1 / len(ours), theirs - 1 / len(theirs)  # probabilities sum to 1, so that is their mean
    products, norms = (a * b).sum(0), torch.linalg.vector_norm(a, dim=0) * torch.linalg.vector_norm(b, dim=0)
    alike = (products / (norms + EPS)).masked_fill(~valid, 0).sum()
    a, b = ((p - mean[:, None, None]) * valid for p, mean in ((ours, student_mean), (theirs, teacher_mean)))
    return (
        alike,
        (a * b).sum((1, 2)),
        torch.linalg.vector_norm(a, dim=(1, 2)),
        torch.linalg.vector_norm(b, dim=(1, 2)),
    )


def _probabilities(logits: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Soft-max over the classes of [K, h, w]; all alike where not valid, whatever stands there."""
    return (logits / temperature).masked_fill_(~valid, 0).softmax(0)
