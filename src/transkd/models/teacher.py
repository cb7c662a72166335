"""The frozen teacher."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transkd.layers.token_linear import TokenLinear
from transkd.outputs import EVERYTHING, SegmentationOutput

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
        layers = [module for module in network.modules() if type(module) in CAST_BY_AUTOCAST]
        self._places = [(layer, name) for layer in layers for name, _ in layer.named_parameters(recurse=False)]
        self._cast: list[Tensor] = []
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
        # compiled code casts them along with other work
        compiled = any(module._compiled_call_impl is not None for module in self.network.modules())
        if compiled or not torch.is_autocast_enabled(device):
            yield
            return
        weights: list[Any] = [layer._parameters[name] for layer, name in self._places]
        dtype = torch.get_autocast_dtype(device)
        state = (dtype, *((weight.data_ptr(), weight._version) for weight in weights))
        if state != self._cast_from:  # others have been loaded, or they have moved
            self._cast = [weight if weight.dtype == torch.float64 else weight.to(dtype) for weight in weights]
            self._cast_from = state
        try:
            self._put(self._cast)
            yield
        finally:
            self._put(weights)

    def _put(self, weights: Sequence[Tensor]) -> None:
        """In the places of the layers' weights, past the check that each is a Parameter."""
        for (layer, name), weight in zip(self._places, weights, strict=True):
            layer._parameters[name] = weight  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: a teacher stays in eval."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The one door by which .to(), .cuda(), .half() … reach a module.
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
