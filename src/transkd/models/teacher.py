"""The frozen teacher."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["FrozenTeacher"]


class FrozenTeacher(nn.Module):
    """A network that teaches: no gradient, in eval for good, in no checkpoint.

    The network is held beside the module tree, not in it. So its parameters are in no ``parameters()``, no
    ``state_dict()`` and no DDP broadcast, and ``train()`` cannot reach it; devices and dtypes do reach it.
    It is at ``teacher.network`` for whoever wants to look.

    Args:
        network: image -> SegmentationOutput, accepting ``needs``.
        needs: what the terms read of the teacher; nothing else is computed.

    Example:
        >>> from transkd.models import create_segmenter
        >>> teacher = FrozenTeacher(create_segmenter("segformer_b0", num_classes=19), needs={"features"})
        >>> output = teacher.train()(torch.zeros(1, 3, 64, 64))
        >>> output.logits is None, output.features[0].requires_grad, teacher.network.training
        (True, False, False)
    """

    network: nn.Module

    def __init__(self, network: nn.Module, needs: Collection[str] = EVERYTHING) -> None:
        super().__init__()
        object.__setattr__(self, "network", network.eval().requires_grad_(False))
        self.needs = frozenset(needs)
        self.training = False

    def forward(self, image: Tensor, needs: Collection[str] | None = None) -> SegmentationOutput:
        """The teacher's view of a batch; ``needs`` may ask for other things at this step than at construction."""
        with torch.no_grad():  # not inference_mode, whose tensors no backward can use
            output: SegmentationOutput = self.network(image, needs=self.needs if needs is None else needs)
        return output

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: a teacher stays in eval."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The one door by which .to(), .cuda(), .half() … reach a module.
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
