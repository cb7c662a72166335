"""Input spatial representation distillation: reconstruction of the teacher's image from a student feature."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_count, check_needs, check_stage
from transkd.losses.shared.distances import widen
from transkd.outputs import SegmentationOutput

__all__ = ["ISRDLoss"]

COLOURS = 3


class ISRDLoss(nn.Module):
    """Reconstruct the teacher's large image from a shallow feature of the student, whose input is smaller.

    ``mean | PReLU(pixel-shuffle_r(conv1x1(F))) − image^t |``, the reconstruction cropped at the bottom and right to
    the image size. The PReLU has one slope per colour channel; image^t is the teacher's input after normalisation.

    Each position of F corresponds to r×r pixels, in the last row and column possibly to fewer: F must have
    ⌈H/r⌉ × ⌈W/r⌉ positions for an image of H×W, and both networks must get the same crop. The head of the reference
    implementation derives r from the height alone and assumes square images; here both sides are used.

    Only the image of the teacher is used, which every network returns. `needs` lists features nevertheless, so that a
    teacher is required and run.

    Source: Guo et al., Pixel Distillation, arXiv 2112.09532; its other part is KD of the logits. The paper reconstructs
    from the output of the input convolution; networks here return stage features, and the shallowest is closest to it.

    Args:
        student_channels: channels of every student stage, shallowest first.
        stage: stage to reconstruct from, counted from 1.
        ratio: r, side of the teacher's image divided by that of the feature: the stride of the stage times the side of
            the teacher's image divided by that of the student's; 4 · 2 = 8 for the shallowest stage at half size.

    Shapes:
        The student's feature [B, C, h, w] and the teacher's image [B, 3, H, W], floating, to a scalar, float32 or
        float64. `target` is not used.

    Raises:
        UserError: the stage does not exist, the ratio is not a whole number of at least 1, the student has other stages
            or channels than given, or the sizes do not match the ratio.

    Example:
        >>> import torch
        >>> student = SegmentationOutput(None, (torch.rand(2, 8, 4, 6),), (), torch.rand(2, 3, 16, 24))
        >>> teacher = SegmentationOutput(None, (torch.rand(2, 12, 8, 12),), (), torch.rand(2, 3, 32, 48))
        >>> ISRDLoss(student_channels=(8,))(student, teacher).shape
        torch.Size([])
    """

    needs = frozenset({"features"})

    def __init__(self, student_channels: Sequence[int], stage: int = 1, ratio: int = 8) -> None:
        super().__init__()
        self.student_channels = tuple(student_channels)
        self.stage = check_stage(self, stage, len(self.student_channels))
        check_count(self, "ratio", ratio)
        self.ratio = ratio
        self.conv = nn.Conv2d(self.student_channels[stage - 1], COLOURS * ratio**2, 1, bias=False)
        self.prelu = nn.PReLU(COLOURS, init=0.25)

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the reconstruction with the teacher's image."""
        teacher = check_needs(self, self.needs, student, teacher)
        assert teacher is not None
        self._check_fit(student, teacher)
        image = teacher.image.detach()
        reconstruction = self.reconstruct(student.features[self.stage - 1], image.shape[-2:])
        return F.l1_loss(widen(reconstruction), widen(image))

    def reconstruct(self, feature: Tensor, size: Sequence[int]) -> Tensor:
        """Reconstruct an image [B, 3, H, W] of `size` (H, W) from a feature [B, C, ⌈H/r⌉, ⌈W/r⌉]."""
        height, width = size
        image: Tensor = self.prelu(F.pixel_shuffle(self.conv(feature), self.ratio))
        return image[..., :height, :width]

    def _check_fit(self, student: SegmentationOutput, teacher: SegmentationOutput) -> None:
        channels = tuple(maps.shape[1] for maps in student.features)
        if channels != self.student_channels:
            raise UserError(
                f"ISRDLoss was built with student_channels={self.student_channels}, but the student's features have "
                f"{channels}. Build it with student_channels={channels}."
            )
        feature, image = student.features[self.stage - 1], teacher.image
        if len(feature) != len(image):
            raise UserError(
                f"ISRDLoss got {len(feature)} images from the student and {len(image)} from the teacher. "
                "Give both networks the same images."
            )
        if tuple(feature.shape[-2:]) != _positions(image, self.ratio):
            raise UserError(self._size_error(feature, image, tuple(student.image.shape[-2:])))

    def _size_error(self, feature: Tensor, image: Tensor, student_size: tuple[int, ...]) -> str:
        expected, got, large = (
            "×".join(map(str, size)) for size in (_positions(image, self.ratio), feature.shape[-2:], image.shape[-2:])
        )
        ratio = max(-(-whole // part) for whole, part in zip(image.shape[-2:], feature.shape[-2:], strict=True))
        fits = _positions(image, ratio) == tuple(feature.shape[-2:])
        advice = f"Set ratio={ratio}" if fits else f"Use crops whose sides are multiples of {self.ratio}"
        return (
            f"ISRDLoss with ratio={self.ratio} needs a feature of {expected} to reconstruct the teacher's image of "
            f"{large}, but stage {self.stage} of the student, whose image is {student_size[0]}×{student_size[1]}, is "
            f"{got}. {advice}, or change the scale of the student's image; both networks must get the same crop."
        )


def _positions(image: Tensor, ratio: int) -> tuple[int, ...]:
    return tuple(-(-side // ratio) for side in image.shape[-2:])
