"""Cross-entropy with the labels of the hardest pixels, as a term."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.layers.bands import over_bands
from transkd.layers.upsampled_cross_entropy import softmax_, upsampled_cross_entropy
from transkd.losses.shared.labelled import checked_weights, labelled_logits
from transkd.outputs import IGNORE, SegmentationOutput

__all__ = ["TaskOHEM"]


class TaskOHEM(nn.Module):
    """Cross-entropy of the hardest pixels (online hard example mining); the teacher is not used.

    ``Σ_x w[y_x] · −log p_x / Σ_x w[y_x]`` over the valid pixels x of the batch whose label has a probability p_x below
    ``threshold``, and at least over the ``min_share`` of them with the lowest; 0 if no pixel is valid. With
    ``min_share`` 1 it is the cross-entropy (`TaskCrossEntropy`). The pixels are chosen within a batch, so several
    processes differ from one with the joined batch. Logits are upsampled in bands, twice: for the choice, then for the
    cross-entropy of what is chosen. The value can be differentiated only once.

    Source: Shrivastava et al., arXiv 1604.03540; threshold and share for segmentation as in BiSeNet, arXiv 1808.00897.

    Args:
        threshold: probability below which a pixel is hard, in (0, 1).
        min_share: share of the valid pixels that count at least, in (0, 1].
        class_weights: w, one per class; None means equal weights.
        resolution: where to compare: "labels" upsamples the logits bilinearly to the labels' size, "logits"
            resizes the labels to the logits by nearest neighbour.

    Shapes:
        Logits [B, K, h, w], floating, and target [B, H, W], int64, to a scalar, float32 or float64.

    Raises:
        UserError: a setting is wrong, or logits or labels are missing or do not fit.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # the second pixel is hard
        >>> student = SegmentationOutput(logits, (), (), torch.rand(1, 3, 4, 8))
        >>> TaskOHEM()(student, None, torch.zeros(1, 1, 2, dtype=torch.int64))  # log 2
        tensor(0.6931)
    """

    needs: frozenset[str] = frozenset()
    class_weights: Tensor | None

    def __init__(
        self,
        threshold: float = 0.7,
        min_share: float = 0.0625,
        class_weights: Sequence[float] | Literal["auto", "median", "sqrt"] | None = None,
        resolution: str = "labels",
    ) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise UserError(f"TaskOHEM: threshold must be a probability between 0 and 1; got {threshold}.")
        if not 0 < min_share <= 1:
            raise UserError(f"TaskOHEM: min_share must be above 0 and at most 1; got {min_share}.")
        self.threshold, self.min_share, self.resolution = float(threshold), float(min_share), resolution
        self.register_buffer("class_weights", checked_weights(self, class_weights, resolution), persistent=False)

    def forward(
        self,
        student: SegmentationOutput,
        teacher: SegmentationOutput | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Compare the student's logits with the labels of the hardest pixels."""
        logits, target, weights = labelled_logits(self, student, target, self.class_weights, self.resolution)
        losses = logits.new_empty(target.shape)  # −1 where labels are ignored: below every other
        over_bands(_keep_losses, logits, target, torch.ones_like(weights), IGNORE, maps=[losses])
        limit = losses.new_full((1,), -math.log(self.threshold))
        most = max(1, math.ceil(self.min_share * losses.numel()))
        # clamp: the product is in float32, and its ceiling may be one too many
        count = (self.min_share * (losses >= 0).sum()).ceil().long().clamp(1, most)
        # only a CPU looks whether that is enough: a GPU would have to wait, so no size depends on values
        on_cpu = losses.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (on_cpu and (losses >= limit).sum() >= count):
            hardest = losses.flatten().topk(most).values
            limit = hardest.gather(0, count[None] - 1).minimum(limit)
        return upsampled_cross_entropy(logits, target.masked_fill(losses < limit, IGNORE), weights, IGNORE)


def _keep_losses(scores: Tensor, labels: Tensor, valid: Tensor, losses: Tensor) -> Tensor:
    losses.copy_((-softmax_(scores, labels)[0]).masked_fill_(valid == 0, -1))
    return scores.new_zeros(())
