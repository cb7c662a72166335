"""Input spatial representation distillation: what the teacher was shown, from what the student sees."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_needs, check_stages
from transkd.losses.shared.distances import widen
from transkd.outputs import SegmentationOutput

__all__ = ["ISRDLoss"]

COLOURS = 3


class ISRDLoss(nn.Module):
    """Reconstruct the teacher's large image from a shallow feature of the student, who sees a smaller one.

    ``mean | PReLU(pixel-shuffle_r(conv1x1(F))) − image^t |``, the reconstruction cropped to the image from the top
    left; the PReLU has one slope per colour, and the image is as the teacher was fed, after its normalisation.

    Each position of F stands for r×r pixels, in the last row and column possibly for fewer: F must have ⌈H/r⌉ × ⌈W/r⌉
    positions for an image of H×W, and both networks must see the same crop. The published head reads r off the
    height alone and takes images for squares; here both sides count.

    Of the teacher only its image is read, which every network shows. `needs` names features all the same, the least
    there is to ask for, so that there is a teacher and it is run.

    Source: Guo et al., Pixel Distillation, arXiv 2112.09532, whose other part is KD of the logits. The paper reads the
    output of the input convolution; networks here show stages, and the shallowest is the nearest to it.

    Args:
        student_channels: channels of each of the student's stages, shallowest first; all of them.
        stage: which stage to reconstruct from, counted from 1.
        ratio: r, the size of the teacher's image over that of the feature: the stage's stride in the student's image
            times how much larger the teacher's image is, 4 · 2 = 8 for the shallowest stage.

    Shapes:
        The student's feature [B, C, h, w] and the teacher's image [B, 3, H, W], floating, to a scalar, float32 or
        float64. `target` is not read.

    Raises:
        UserError: a stage that does not exist, a ratio that is no whole number from 1 on, a student with stages or
            channels other than those given, or sizes that the ratio does not fit.

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
        (self.stage,) = check_stages(self, [stage])
        if stage > len(self.student_channels):
            raise UserError(
                f"ISRDLoss: stage must be from 1 to {len(self.student_channels)}, for which there are "
                f"student_channels; got {stage}."
            )
        if not isinstance(ratio, int) or ratio < 1:
            raise UserError(f"ISRDLoss: ratio must be a whole number from 1 on; got {ratio!r}.")
        self.ratio = ratio
        self.conv = nn.Conv2d(self.student_channels[stage - 1], COLOURS * ratio**2, 1, bias=False)
        self.prelu = nn.PReLU(COLOURS, init=0.25)

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the reconstruction with the teacher's image."""
        shown = check_needs(self, self.needs, student, teacher)
        assert shown is not None
        self._check_fit(student, shown)
        image = shown.image.detach()
        reconstruction = self.reconstruct(student.features[self.stage - 1], image.shape[-2:])
        return F.l1_loss(widen(reconstruction), widen(image))

    def reconstruct(self, feature: Tensor, size: Sequence[int]) -> Tensor:
        """Give the image [B, 3, H, W] of a size (H, W) from a feature [B, C, ⌈H/r⌉, ⌈W/r⌉]."""
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
            raise UserError(self._misfit(feature, image, tuple(student.image.shape[-2:])))

    def _misfit(self, feature: Tensor, image: Tensor, seen: tuple[int, ...]) -> str:
        wanted, got, large = (
            "×".join(map(str, size)) for size in (_positions(image, self.ratio), feature.shape[-2:], image.shape[-2:])
        )
        fitting = max(-(-whole // part) for whole, part in zip(image.shape[-2:], feature.shape[-2:], strict=True))
        fits = _positions(image, fitting) == tuple(feature.shape[-2:])
        advice = f"Set ratio={fitting}" if fits else f"Use crops whose sides are multiples of {self.ratio}"
        return (
            f"ISRDLoss with ratio={self.ratio} reconstructs the teacher's image of {large} from a feature of {wanted}, "
            f"but stage {self.stage} of the student, who sees {seen[0]}×{seen[1]}, is {got}. {advice}, or change how "
            "much smaller the student's image is; both must show the same crop."
        )


def _positions(image: Tensor, ratio: int) -> tuple[int, ...]:
    return tuple(-(-side // ratio) for side in image.shape[-2:])
