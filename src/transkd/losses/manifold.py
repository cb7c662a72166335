"""Manifold distillation: relations between patches within an image, across images and in a random sample."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_count, check_share, check_stages
from transkd.losses.shared.grids import feature_pairs, on_grid
from transkd.losses.shared.pieces import positions_of
from transkd.losses.shared.relations import check_rows, relation_error, unit
from transkd.outputs import SegmentationOutput

__all__ = ["ManifoldLoss", "inter_error", "intra_error", "random_error"]


class ManifoldLoss(nn.Module):
    """Compare the cosines between patches within an image, across images, and in a random sample.

    With u [B, N, C] the features of student and teacher divided by their norm and A the Gram matrix of a set of them,
    the parts are mean squared differences of:

        intra    A between the N positions of an image, for each image
        inter    A between the B images at a position, for each position
        random   A between R positions sampled from all B·N without replacement at each call

    ``4·intra + 0.1·inter + 0.2·random``, averaged over the stages. No parameters; channels may differ. With a batch of
    one, inter is 0. Positions are sampled with torch's global generator; all are used if there are at most R. In
    distributed training each process relates only its own images, so inter and random differ from those of one process
    with the joined batch.

    The paper pairs blocks of two plain transformers. For an encoder with stages these are the last blocks of the
    stages, whose output is the stage feature. The N×N matrices are compared exactly without being stored, so the
    paper's patch merging, which saves memory, is not needed. Networks here return no class tokens; the reference
    implementation compares wrong positions if the teacher has more class tokens than the student.

    Source: Hao et al., arXiv 2107.01378; the weights and R are those of the recipe in its code, which also uses KD
    of the logits with weight 1 and no task loss.

    Args:
        stages: stages to compare, counted from 1.
        intra_weight: weight of intra; a weight of 0 disables the part.
        inter_weight: weight of inter.
        random_weight: weight of random.
        samples: R, sampled positions.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. The student's maps are resized
        bilinearly to the teacher's where sizes differ. `target` is not used.

    Raises:
        UserError: a weight is negative or all are 0, `samples` is below 1, or a stage does not exist.

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
            check_share(self, f"{name}_weight", weight)
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
        for pair in feature_pairs(self, self.stages, student, teacher):
            tokens, teacher_tokens = (positions_of(maps) for maps in on_grid(self, *pair))
            losses += [weight * self._part(name, tokens, teacher_tokens) for name, weight in self.weights.items()]
        return torch.stack(losses).sum() / len(self.stages)

    def _part(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        if name == "random":
            return random_error(student, teacher, samples=self.samples)
        return (intra_error if name == "intra" else inter_error)(student, teacher)


def intra_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between the positions of each image.

    Args:
        student: [B, N, C], at least float32.
        teacher: [B, N, C'], the same positions; detached.

    Raises:
        UserError: the numbers of images or positions differ.

    Example:
        >>> alike, orthogonal = torch.ones(1, 2, 2), torch.eye(2)[None]
        >>> intra_error(alike, orthogonal)  # 2 of the 4 pairs differ by 1
        tensor(0.5000)
    """
    return relation_error(unit(student), unit(teacher.detach()))


def inter_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between the images of a batch at each position, see `intra_error`.

    Example:
        >>> alike, orthogonal = torch.ones(2, 1, 2), torch.eye(2)[:, None]
        >>> inter_error(alike, orthogonal)
        tensor(0.5000)
    """
    check_rows(student, teacher)
    return relation_error(unit(student).transpose(0, 1), unit(teacher.detach()).transpose(0, 1))


def random_error(student: Tensor, teacher: Tensor, samples: int = 192, *, index: Tensor | None = None) -> Tensor:
    """Mean squared difference of the cosines between random positions of the batch, see `intra_error`.

    Args:
        student: [B, N, C], at least float32.
        teacher: [B, N, C'], the same positions; detached.
        samples: number of the B·N positions to sample without replacement; all if there are fewer.
        index: positions to use instead, as indices into the B·N positions, image by image.

    Example:
        >>> alike, orthogonal = torch.ones(1, 2, 2), torch.eye(2)[None]
        >>> random_error(alike, orthogonal)
        tensor(0.5000)
    """
    check_rows(student, teacher)
    rows, teacher_rows = student.flatten(0, 1), teacher.detach().flatten(0, 1)
    if index is None and samples < len(rows):
        index = torch.randperm(len(rows), device=rows.device)[:samples]
    if index is not None:
        rows, teacher_rows = rows[index], teacher_rows[index]
    return relation_error(unit(rows)[None], unit(teacher_rows)[None])
