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
"""Layers, without subclasses, whose weights are used only in an operation that autocast casts."""


class FrozenTeacher(nn.Module):
    """Teacher network: no gradients, always in eval mode, not part of checkpoints.

    The network is not registered as a submodule, so its parameters are not in ``parameters()``, ``state_dict()`` or the
    DDP broadcast, and ``train()`` does not change its mode. Moves to another device or dtype do apply to it. It is
    accessible as ``teacher.network``.

    Under autocast the weights of its linear and convolutional layers are cast once instead of at every step: the output
    is the same, at the cost of a copy of the weights in half precision.

    Args:
        network: module from an image to a SegmentationOutput, with an argument ``needs``.
        needs: outputs that the terms read; others are not computed.

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
        self._parameters_to_cast = [
            (layer, name) for layer in layers for name, _ in layer.named_parameters(recurse=False)
        ]
        self._cast: list[Tensor] = []
        self._cast_from: tuple[object, ...] = ()
        self.needs = frozenset(needs)
        self.training = False

    def forward(self, image: Tensor, needs: Collection[str] | None = None) -> SegmentationOutput:
        """Run the teacher; ``needs`` overrides that of the constructor for this call."""
        with torch.no_grad(), self._weights_cast(image.device.type):  # not inference_mode: autograd saves the outputs
            output: SegmentationOutput = self.network(image, needs=self.needs if needs is None else needs)
        return output

    @contextmanager
    def _weights_cast(self, device: str) -> Iterator[None]:
        """Under autocast, replace the layers' weights by cached casts to the autocast dtype."""
        compiled = self.network._compiled_call_impl is not None  # compiled code fuses the casts
        if compiled or not torch.is_autocast_enabled(device):
            yield
            return
        weights: list[Any] = [layer._parameters[name] for layer, name in self._parameters_to_cast]
        dtype = torch.get_autocast_dtype(device)
        state = (dtype, *((weight.data_ptr(), weight._version) for weight in weights))
        if state != self._cast_from:  # weights were loaded or moved
            self._cast = [weight if weight.dtype == torch.float64 else weight.to(dtype) for weight in weights]
            self._cast_from = state
        try:
            self._assign(self._cast)
            yield
        finally:
            self._assign(weights)

    def _assign(self, weights: Sequence[Tensor]) -> None:
        """Assign tensors to the layers' weights; writing to _parameters avoids the check for nn.Parameter."""
        for (layer, name), weight in zip(self._parameters_to_cast, weights, strict=True):
            layer._parameters[name] = weight  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: the teacher stays in eval mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(), .cuda(), .half() and others call this method.
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
