"""Cross-image relational distillation: the memory-bank part."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.adapters import as_weights
from transkd.losses.shared.checks import (
    check_count,
    check_positive,
    check_stage,
    paired_channels,
    require_target,
    stage_pairs,
)
from transkd.losses.shared.distances import widen
from transkd.losses.shared.grids import labels_on_grid, on_grid
from transkd.losses.shared.memory import ClassQueue, gather_rows, pixel_keys, region_keys
from transkd.losses.shared.pieces import BUDGET, full_precision, sum_over_rows
from transkd.outputs import SegmentationOutput

__all__ = ["CIRKDMemoryLoss", "contrast_kl"]


class CIRKDMemoryLoss(nn.Module):
    """Compare the similarities of each position to a memory bank of positions and regions of the data set.

    For each class the memory bank holds unit vectors of the teacher's features: of single positions, and of regions
    (means over all positions of a class in an image). Each call samples some slots of each class. With X their vectors
    as rows, t̂ the unit vectors of the teacher's features, ŝ those of the student's features after a projection head,
    and V the positions with a label:

        L(X) = T² / |V| · Σ_{i ∈ V} KL(softmax(X · t̂_i / (τT)) ‖ softmax(X · ŝ_i / (τT)))
        loss = pixel_weight · L(X_pixel) + region_weight · L(X_region)

    The head is conv1x1, batch normalisation, ReLU, conv1x1, to the teacher's channels. It is not part of the trained
    student; `trainer.sync_batchnorm=true` synchronises its statistics. In training mode each call first overwrites the
    oldest slots with the teacher's vectors of its batch, gathered from all processes, so that every process has the
    same memory bank. The bank is initialised with random unit vectors and saved in checkpoints: K · (pixel_memory +
    region_memory) · C_t numbers. Slots and positions are sampled with torch's global generator. Maps of another size
    are resized bilinearly to the teacher's, before the head. In distributed training each process samples its own
    slots, averages over its own V and, unless synchronised, normalises with the statistics of its own images, so the
    value differs from that of one process with the joined batch.

    Source: Yang et al., arXiv 2204.06986, its memory-based distillation, pixel-to-pixel and pixel-to-region, with
    weight 0.1 each; 20000 positions per class in its memory, 2000 for SegFormers. The reference implementation fills
    the memory of positions with the first positions of the image regardless of class, overwrites wrong slots at the end
    of the memory, and returns NaN without a labelled position.

    Args:
        num_classes: K; a position whose label is 255, negative or at least K is excluded.
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stage: the stage to compare, counted from 1. The paper uses the features before the classifier.
        pixel_weight: weight of the comparison with positions; 0 disables it.
        region_weight: weight of the comparison with regions; 0 disables it.
        temperature: τ > 0 of the similarities.
        kd_temperature: T > 0 of the distillation.
        pixel_memory: slots for positions per class.
        region_memory: slots for regions per class.
        pixel_contrast: approximate number of positions to compare with: ⌊pixel_contrast / K⌋ + 1 per class, at most
            all.
        region_contrast: approximate number of regions to compare with, likewise.
        pixels_per_image: most positions of a class that are written per image.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, and target [B, H, W], int64, to a scalar, float32 or float64.
        0 without a labelled position.

    Raises:
        UserError: the stage does not exist, a weight is negative or both are 0, a temperature or number is not
            positive, the outputs have other stages or channels than given, there are no labels, or a batch of one has a
            1×1 map in training mode.

    Example:
        >>> def output(widths):
        ...     maps = tuple(torch.rand(2, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(widths))
        ...     return SegmentationOutput(None, maps, (), torch.rand(2, 3, 32, 32))
        >>> term = CIRKDMemoryLoss(3, student_channels=(8, 16), teacher_channels=(12, 24), stage=2, pixel_memory=20)
        >>> term(output((8, 16)), output((12, 24)), torch.randint(3, (2, 32, 32))).shape
        torch.Size([])
        >>> term.queues["pixel"].vectors.shape
        torch.Size([3, 20, 24])
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        num_classes: int,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stage: int = 4,
        pixel_weight: float = 1.0,
        region_weight: float = 1.0,
        temperature: float = 0.1,
        kd_temperature: float = 1.0,
        pixel_memory: int = 2000,
        region_memory: int = 2000,
        pixel_contrast: int = 4096,
        region_contrast: int = 1024,
        pixels_per_image: int = 16,
    ) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        check_stage(self, stage, len(self.student_channels))
        check_positive(self, "temperature", temperature)
        check_positive(self, "kd_temperature", kd_temperature)
        counts = {
            "num_classes": num_classes,
            "pixel_memory": pixel_memory,
            "region_memory": region_memory,
            "pixel_contrast": pixel_contrast,
            "region_contrast": region_contrast,
            "pixels_per_image": pixels_per_image,
        }
        for setting, value in counts.items():
            check_count(self, setting, value)
        self.num_classes, self.stage, self.pixels_per_image = num_classes, stage, pixels_per_image
        self.temperature, self.kd_temperature = temperature, kd_temperature
        self.weights = self._checked_weights(pixel_weight, region_weight)
        channels = self.student_channels[stage - 1], self.teacher_channels[stage - 1]
        slots = {"pixel": pixel_memory, "region": region_memory}
        contrast = {"pixel": pixel_contrast, "region": region_contrast}
        self.head = _head(*channels)
        self.queues = nn.ModuleDict({kind: ClassQueue(num_classes, slots[kind], channels[1]) for kind in self.weights})
        self.drawn = {kind: contrast[kind] // num_classes + 1 for kind in self.weights}

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Write the teacher's features to the memory bank, then compare both networks with it."""
        target = require_target(self, target)
        features, teacher_features = on_grid(self, *stage_pairs(self, "features", student, teacher)[self.stage - 1])
        labels, valid = labels_on_grid(target, teacher_features.shape[-2:])
        valid = valid & (labels < self.num_classes)
        keys = F.normalize(teacher_features, dim=1, eps=1e-12)
        if self.training:
            self.remember(keys, labels, valid)
        return self.compare(self.project(features), keys, valid)

    def project(self, features: Tensor) -> Tensor:
        """Apply the head and normalise: [B, C_s, h, w] to unit vectors [B, C_t, h, w]."""
        if self.training and features[:, 0].numel() == 1:
            raise UserError(
                "CIRKDMemoryLoss cannot normalise a batch of one whose map is 1 x 1: it has one value per channel. "
                "Use larger images or a larger batch, or a shallower stage."
            )
        return F.normalize(widen(self.head(as_weights(self.head, features))), dim=1, eps=1e-12)

    @torch.no_grad()
    def remember(self, keys: Tensor, labels: Tensor, valid: Tensor, *, priority: Tensor | None = None) -> None:
        """Write the batch of every process to the memory bank.

        Args:
            keys: the teacher's unit vectors [B, C_t, h, w].
            labels: [B, h, w], below K.
            valid: bool [B, h, w].
            priority: [B, h, w], positions of a class with small values are written first; None samples it.
        """
        for kind, queue in self._queues():
            if kind == "pixel":
                chosen = pixel_keys(keys, labels, valid, self.num_classes, self.pixels_per_image, priority=priority)
            else:
                chosen = region_keys(keys, labels, valid, self.num_classes)
            queue.write(*gather_rows(*chosen))

    def compare(
        self, student: Tensor, teacher: Tensor, valid: Tensor, *, slots: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Compare the unit vectors [B, C_t, h, w] of both networks at the valid positions with the memory bank.

        Args:
            student: receives the gradient.
            teacher: detached.
            valid: bool [B, h, w].
            slots: numbers of the slots to compare with, by kind ("pixel", "region"); None samples them.
        """
        student_rows, teacher_rows = (maps.permute(0, 2, 3, 1)[valid] for maps in (student, teacher))
        losses = []
        for kind, queue in self._queues():
            chosen = queue.draw(self.drawn[kind]) if slots is None else slots[kind]
            anchors = queue.vectors[:, chosen].flatten(0, 1)
            value = contrast_kl(student_rows, teacher_rows, anchors, self.temperature, self.kd_temperature)
            losses.append(self.weights[kind] * value)
        return torch.stack(losses).sum()

    def _queues(self) -> list[tuple[str, ClassQueue]]:
        return [(kind, cast(ClassQueue, queue)) for kind, queue in self.queues.items()]

    @staticmethod
    def _checked_weights(pixel: float, region: float) -> dict[str, float]:
        weights = {"pixel": pixel, "region": region}
        if not (all(0 <= weight < float("inf") for weight in weights.values()) and any(weights.values())):
            raise UserError(
                "CIRKDMemoryLoss: pixel_weight and region_weight must be at least 0 and one of them greater; "
                f"got {pixel} and {region}."
            )
        return {kind: weight for kind, weight in weights.items() if weight > 0}


def contrast_kl(
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    temperature: float,
    kd_temperature: float = 1.0,
    *,
    budget: int = BUDGET,
) -> Tensor:
    """KL divergence between the softmax of the similarities with common anchors, mean over positions, times T².

    Args:
        student: [n, C], at least float32.
        teacher: [n, C]; detached.
        anchors: [m, C]; detached.
        temperature: τ > 0.
        kd_temperature: T > 0.
        budget: largest number of similarities in memory at a time.

    Returns:
        A scalar; 0 if there are no positions.

    Example:
        >>> anchors = torch.eye(2)
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
        >>> contrast_kl(student, teacher, anchors, temperature=1.0)  # KL of (0.5, 0.5) and (0.73, 0.27)
        tensor(0.1201)
    """
    scale, columns = temperature * kd_temperature, anchors.detach().to(student).T

    def divergence(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with full_precision(student_rows):
            log_q, log_p = ((units @ columns / scale).log_softmax(1) for units in (student_rows, teacher_rows))
            return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    total = sum_over_rows(divergence, [student, teacher.detach()], columns=len(anchors), budget=budget)
    return kd_temperature**2 * total / max(len(student), 1)


def _head(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            norm=nn.BatchNorm2d(out_channels),
            relu=nn.ReLU(),
            conv2=nn.Conv2d(out_channels, out_channels, 1, bias=False),
        )
    )
