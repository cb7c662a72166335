"""Cross-entropy with the labels, the loss of the task itself, as a term."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.layers.upsampled_cross_entropy import upsampled_cross_entropy
from transkd.losses.shared.labelled import checked_weights, labelled_logits
from transkd.outputs import SegmentationOutput

__all__ = ["TaskCrossEntropy"]


class TaskCrossEntropy(nn.Module):
    """Cross-entropy between the student's logits and the labels; the teacher is not used.

    ``Σ_x w[y_x] · −log softmax(z_x)[y_x] / Σ_x w[y_x]`` over the valid pixels x; a differentiable 0 if there are
    none (`torch.nn.functional.cross_entropy` returns NaN).

    Logits are upsampled in bands of rows and the gradient of each band is computed in the forward pass, so the logits
    are never stored at the labels' size. The value can therefore be differentiated only once.

    In the training of several processes, each value is multiplied by the process's share of the valid pixels, so that
    the mean over the processes, as `DistributedDataParallel` takes it of the gradients, is the mean over all their
    pixels; every process must then call the term. With gradient accumulation each batch still counts the same.

    Args:
        class_weights: w, one per class; None means equal weights. "auto", "median" and "sqrt" are counted by a training
            run, which gives the numbers (``transkd.data.class_weights``).
        resolution: where to compare: "labels" upsamples the logits bilinearly to the labels' size, "logits"
            resizes the labels to the logits by nearest neighbour.
        ignore_index: label that is ignored; negative labels are ignored too.

    Shapes:
        Logits [B, K, h, w], floating, and target [B, H, W], int64, to a scalar, float32 or float64.

    Raises:
        UserError: the resolution is unknown, logits or labels are missing, the labels have another shape or batch
            size, a class weight is negative or not finite, or their number is not K.

    Example:
        >>> student = SegmentationOutput(torch.zeros(1, 4, 2, 2), (), (), torch.rand(1, 3, 8, 8))
        >>> TaskCrossEntropy()(student, None, torch.zeros(1, 8, 8, dtype=torch.int64))  # log 4
        tensor(1.3863)
    """

    needs: frozenset[str] = frozenset()
    class_weights: Tensor | None

    def __init__(
        self,
        class_weights: Sequence[float] | Literal["auto", "median", "sqrt"] | None = None,
        resolution: str = "labels",
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.resolution, self.ignore_index = resolution, ignore_index
        self.register_buffer("class_weights", checked_weights(self, class_weights, resolution), persistent=False)

    def forward(
        self,
        student: SegmentationOutput,
        teacher: SegmentationOutput | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Compare the student's logits with the labels."""
        logits, target, weights = labelled_logits(self, student, target, self.class_weights, self.resolution)
        if logits.shape[-2:] == target.shape[-2:]:
            value = _mean_cross_entropy(logits, target, weights, self.ignore_index)
        else:
            value = upsampled_cross_entropy(logits, target, weights, self.ignore_index)
        if self.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            value = value * _share_of_pixels(target, weights, self.ignore_index)
        return value


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _share_of_pixels(target: Tensor, weights: Tensor, ignore: int) -> Tensor | float:
    """Weight of a process's valid pixels over the mean weight of all processes; exactly 1 for a single process."""
    if dist.get_world_size() == 1:
        return 1.0
    ignored = (target == ignore) | (target < 0)
    own = weights[target.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()
    total = own.clone()
    dist.all_reduce(total)
    return own * dist.get_world_size() / total.clamp_min(torch.finfo(total.dtype).tiny)


def _mean_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor, ignore: int) -> Tensor:
    ignored = (target == ignore) | (target < 0)
    total = F.cross_entropy(logits, target.masked_fill(ignored, -100), weights, reduction="sum")
    weight_sum = weights[target.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()
    # clamp: without a valid pixel the value is 0 / tiny = 0, with a zero gradient
    return total / weight_sum.clamp_min(torch.finfo(logits.dtype).tiny)
