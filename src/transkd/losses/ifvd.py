"""Intra-class feature variation distillation: cosine of each position with its class prototype."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.losses.shared.checks import check_choice, check_count, check_stages, require_target
from transkd.losses.shared.grids import class_members, feature_pairs, labels_on_grid, on_grid
from transkd.losses.shared.pieces import full_precision, positions_of
from transkd.outputs import SegmentationOutput

__all__ = ["IFVDLoss", "prototype_similarity"]

DENOMINATORS = ("valid", "all")


class IFVDLoss(nn.Module):
    """Compare the cosine of each position's features with the mean features of its class in the same image.

    ``Σ_stages 1 / |V| · Σ_{i ∈ V} (c_i^s − c_i^t)²``: V is the set of labelled positions in all images of the batch,
    c_i the cosine of the features at i and their mean over all positions of the same image and class.

    No parameters; the channels may differ. Maps of another size are resized bilinearly to the teacher's, labels by
    nearest neighbour. A class with one position in an image has cosine 1 in both networks.

    Source: Wang et al., Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020. The reference
    implementation divides by the number of all positions, so its value decreases with the share of ignored ones;
    `denominator` "all" reproduces it.

    Args:
        num_classes: K; a position whose label is 255, negative or at least K is excluded.
        stages: stages to compare, counted from 1; their values are summed. The paper uses the features before
            the classifier.
        denominator: "valid" is the mean over V, "all" divides by the number of all positions.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, and target [B, H, W], int64, to a scalar, float32 or float64.
        0 without a labelled position.

    Raises:
        UserError: the denominator is unknown, `num_classes` is below 1, a stage does not exist, or labels are missing.

    Example:
        >>> def output(*positions):
        ...     feature = torch.tensor(positions).T.reshape(1, 2, 1, 2)
        ...     return SegmentationOutput(None, (feature,), (), torch.rand(1, 3, 1, 2))
        >>> same, across = output([1.0, 0.0], [3.0, 0.0]), output([1.0, 0.0], [0.0, 1.0])
        >>> term, one_class = IFVDLoss(num_classes=2, stages=(1,)), torch.zeros(1, 1, 2, dtype=torch.int64)
        >>> term(same, across, one_class)  # (1 - cos 45°)² at both
        tensor(0.0858)
    """

    needs = frozenset({"features"})

    def __init__(self, num_classes: int, stages: Sequence[int] = (4,), denominator: str = "valid") -> None:
        super().__init__()
        check_count(self, "num_classes", num_classes)
        check_choice(self, "denominator", denominator, DENOMINATORS)
        self.num_classes, self.stages, self.denominator = num_classes, check_stages(self, stages), denominator

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the cosines with the class means."""
        target = require_target(self, target)
        losses = []
        for pair in feature_pairs(self, self.stages, student, teacher):
            maps, teacher_maps = on_grid(self, *pair)
            members = class_members(*labels_on_grid(target, maps.shape[-2:]), self.num_classes).to(maps.dtype)
            difference = prototype_similarity(maps, members) - prototype_similarity(teacher_maps, members)
            count = members.sum().clamp_min(1) if self.denominator == "valid" else difference.numel()
            losses.append(difference.square().sum() / count)
        return torch.stack(losses).sum()


def prototype_similarity(features: Tensor, members: Tensor) -> Tensor:
    """Cosine of each position's features and the mean of its class in the same image; 0 at positions without a class.

    Args:
        features: [B, C, h, w], at least float32.
        members: [B, K, h·w], 1 at the positions of each class, else 0.

    Returns:
        [B, h·w].

    Example:
        >>> maps = torch.tensor([[3.0, 4.0], [4.0, 3.0]]).view(1, 2, 1, 2)
        >>> prototype_similarity(maps, torch.ones(1, 1, 2)) ** 2  # half of the squared sum of (0.6, 0.8)
        tensor([[0.9800, 0.9800]])
    """
    with full_precision(features):
        positions = positions_of(features)
        prototypes = members @ positions / members.sum(2, keepdim=True).clamp_min(1)
        # compute all K cosines per position: less memory than gathering a prototype of C channels per position
        cosines = F.normalize(prototypes, dim=2, eps=1e-8) @ F.normalize(positions, dim=2, eps=1e-8).mT
    return (cosines * members).sum(1)
