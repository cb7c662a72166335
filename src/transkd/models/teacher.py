"""The frozen teacher."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transkd.outputs import EVERYTHING, SegmentationOutput
from transkd.token_linear import TokenLinear

__all__ = ["FrozenTeacher"]

CAST_BY_AUTOCAST = {nn.Linear, TokenLinear, nn.Conv2d}
"""Layers, but not their subclasses, that use their weights in nothing but one operation of autocast's."""


class FrozenTeacher(nn.Module):
    """A network that teaches: no gradient, in eval for good, in no checkpoint.

    The network is held beside the module tree, not in it. So its parameters are in no ``parameters()``, no
    ``state_dict()`` and no DDP broadcast, and ``train()`` cannot reach it; devices and dtypes do reach it.
    It is at ``teacher.network`` for whoever wants to look.

    Under autocast the weights of its linear and convolutional layers are cast once, not at every step: the same output
    with fewer operations, for half of the weights' memory more.

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
        self._cast: list[nn.Parameter] = []
        self._cast_from: tuple[object, ...] = ()
        self.needs = frozenset(needs)
        self.training = False

    def forward(self, image: Tensor, needs: Collection[str] | None = None) -> SegmentationOutput:
        """The teacher's view of a batch; ``needs`` may ask for other things at this step than at construction."""
        with torch.no_grad(), self._weights_cast(image.device.type):  # not inference_mode: backward uses what comes out
            output: SegmentationOutput = self.network(image, needs=self.needs if needs is None else needs)
        return output

    @contextmanager
    def _weights_cast(self, device: str) -> Iterator[None]:
        """Under autocast, put the weights that it would cast at every step in their places as it would cast them."""
        compiled = self.network._compiled_call_impl is not None  # which casts them along with other work
        if compiled or not torch.is_autocast_enabled(device):
            yield
            return
        layers = [module._parameters for module in self.network.modules() if type(module) in CAST_BY_AUTOCAST]
        places = [(layer, name, weight) for layer in layers for name, weight in layer.items() if weight is not None]
        dtype = torch.get_autocast_dtype(device)
        state = (dtype, *((weight.data_ptr(), weight._version) for *_, weight in places))
        if state != self._cast_from:  # others have been loaded, or they have moved
            self._cast = [nn.Parameter(_as_autocast_does(weight, dtype), requires_grad=False) for *_, weight in places]
            self._cast_from = state
        try:
            for (layer, name, _), cast in zip(places, self._cast, strict=True):
                layer[name] = cast
            yield
        finally:
            for layer, name, weight in places:
                layer[name] = weight

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: a teacher stays in eval."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The one door by which .to(), .cuda(), .half() … reach a module.
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _as_autocast_does(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.to(dtype)
