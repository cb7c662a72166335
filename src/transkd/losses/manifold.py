"""Distillation of the manifold on which patches lie, by the relations between them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_count, check_stages
from transkd.losses.shared.grids import feature_pairs, on_grid
from transkd.losses.shared.pieces import positions_of
from transkd.losses.shared.relations import check_rows, relation_error, unit
from transkd.outputs import SegmentationOutput

__all__ = ["ManifoldLoss", "inter_error", "intra_error", "random_error"]


class ManifoldLoss(nn.Module):
    """Compare how similar patches are to each other: within an image, across images, and in a random sample.

    On tokens u [B, N, C] of length 1, of student and teacher, A the matrix of their products, mean squared
    differences of:

        intra    A between the N positions of an image, for each image
        inter    A between the B images at a position, for each position
        random   A between R positions drawn from all B·N without replacement, anew at each call

    ``4·intra + 0.1·inter + 0.2·random``, and the mean of that over the stages. No parameters; channels may differ.
    With a batch of one, inter is 0. The draw is from torch's global generator; up to R positions, all are taken.
    Each of several processes relates its own images alone and draws R positions of them, so inter and random are not
    those of the joined batch.

    The publication pairs blocks of two plain transformers; of an encoder with stages it is the last block of each,
    which is what the stage's features are. The N×N matrices are compared exactly without being built, so that its
    device against memory, merging patches, is not needed. Networks show no class tokens here; in the published code
    a teacher that has more of them than the student is compared at wrong positions.

    Source: Hao et al., arXiv 2107.01378; the weights and R are those of its code's recipe, which has a
    weight of 1 for the KD of logits beside it and none for the task.

    Args:
        stages: which stages to compare, counted from 1.
        intra_weight: of intra; 0 leaves a part out.
        inter_weight: of inter.
        random_weight: of random.
        samples: R.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. The student's maps are resized
        bilinearly to the teacher's where sizes differ. `target` is not read.

    Raises:
        UserError: weights that are negative or all 0, less than one sample, or networks without these stages.

    Example:
        >>> def output(width):
        ...     return SegmentationOutput(None, (torch.rand(2, width, 4, 6),), (), torch.rand(2, 3, 16, 24))
        >>> ManifoldLoss(stages=(1,))(output(8), output(12)).shape
        torch.Size([])
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        stages: Sequence[int] = (1, 2, 3, 4),
        intra_weight: float = 4.0,
        inter_weight: float = 0.1,
        random_weight: float = 0.2,
        samples: int = 192,
    ) -> None:
        super().__init__()
        self.stages = check_stages(self, stages)
        weights = {"intra": intra_weight, "inter": inter_weight, "random": random_weight}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"ManifoldLoss: {name}_weight must be a number from 0 on; got {weight}.")
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if not self.weights:
            raise UserError("ManifoldLoss has no part to compute: give one of its weights a value above 0.")
        check_count(self, "samples", samples)
        self.samples = samples

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the relations."""
        losses = []
        for feature, other in feature_pairs(self, self.stages, student, teacher):
            tokens, other_tokens = (positions_of(maps) for maps in on_grid(self, feature, other))
            losses += [weight * self._part(name, tokens, other_tokens) for name, weight in self.weights.items()]
        return torch.stack(losses).sum() / len(self.stages)

    def _part(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        if name == "random":
            return random_error(student, teacher, samples=self.samples)
        return (intra_error if name == "intra" else inter_error)(student, teacher)


def intra_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the similarities between the positions of each image.

    Args:
        student: [B, N, C], at least float32.
        teacher: [B, N, C'], the same positions; a constant.

    Raises:
        UserError: images or positions differ in number.

    Example:
        >>> alike, orthogonal = torch.ones(1, 2, 2), torch.eye(2)[None]
        >>> intra_error(alike, orthogonal)  # 2 of the 4 pairs differ by 1
        tensor(0.5000)
    """
    return relation_error(unit(student), unit(teacher.detach()))


def inter_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the similarities between the images of a batch at each position, see `intra_error`.

    Example:
        >>> alike, orthogonal = torch.ones(2, 1, 2), torch.eye(2)[:, None]
        >>> inter_error(alike, orthogonal)
        tensor(0.5000)
    """
    check_rows(student, teacher)
    return relation_error(unit(student).transpose(0, 1), unit(teacher.detach()).transpose(0, 1))


def random_error(student: Tensor, teacher: Tensor, samples: int = 192, *, index: Tensor | None = None) -> Tensor:
    """Mean squared difference of the similarities between random positions of the batch, see `intra_error`.

    Args:
        student: [B, N, C], at least float32.
        teacher: [B, N, C'], the same positions; a constant.
        samples: how many of the B·N positions to draw, without replacement; all where there are no more.
        index: these positions instead, counted image by image.

    Example:
        >>> alike, orthogonal = torch.ones(1, 2, 2), torch.eye(2)[None]
        >>> random_error(alike, orthogonal)
        tensor(0.5000)
    """
    check_rows(student, teacher)
    rows, other_rows = student.flatten(0, 1), teacher.detach().flatten(0, 1)
    if index is None and samples < len(rows):
        index = torch.randperm(len(rows), device=rows.device)[:samples]
    if index is not None:
        rows, other_rows = rows[index], other_rows[index]
    return relation_error(unit(rows)[None], unit(other_rows)[None])
