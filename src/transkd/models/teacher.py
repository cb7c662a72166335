"""The frozen teacher."""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from transkd.layers.token_linear import TokenLinear
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["FrozenTeacher", "channel_statistics"]

CAST_BY_AUTOCAST = {nn.Linear, TokenLinear, nn.Conv2d}
"""Layers, but not their subclasses, that use their weights in nothing but one operation of autocast's."""
USUAL_SCALE = (1 / 3, 3.0)
"""Mean standard deviation of a stage's channels, as LayerNorm leaves them; raw maps of CNNs are at 2 to 11."""


class FrozenTeacher(nn.Module):
    """A network that teaches: no gradient, in eval for good, in no checkpoint.

    The network is held beside the module tree, not in it. So its parameters are in no ``parameters()``, no
    ``state_dict()`` and no DDP broadcast, and ``train()`` cannot reach it; devices and dtypes do reach it.
    It is public as ``teacher.network``.

    Under autocast the weights of its linear and convolutional layers are cast once, not at every step: the same output
    with fewer operations, for half of the weights' memory more.

    Args:
        network: image -> SegmentationOutput, accepting ``needs``.
        needs: what the terms read of the teacher; nothing else is computed.
        cast_once: False leaves casting to autocast, as compiled networks need it.

    Example:
        >>> from transkd.models import create_segmenter
        >>> teacher = FrozenTeacher(create_segmenter("segformer_b0", num_classes=19), needs={"features"})
        >>> output = teacher.train()(torch.zeros(1, 3, 64, 64))
        >>> output.logits is None, output.features[0].requires_grad, teacher.network.training
        (True, False, False)
    """

    network: nn.Module

    def __init__(self, network: nn.Module, needs: Collection[str] = EVERYTHING, cast_once: bool = True) -> None:
        super().__init__()
        object.__setattr__(self, "network", network.eval().requires_grad_(False))
        layers = {name: module for name, module in network.named_modules() if type(module) in CAST_BY_AUTOCAST}
        self._weights = {f"{name}.{own}": p for name, layer in layers.items() for own, p in layer.named_parameters()}
        self._cast: dict[str, Tensor] = {}
        self._cast_from: tuple[object, ...] = ()
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self.needs, self.cast_once = frozenset(needs), cast_once
        self.training = False

    def forward(self, image: Tensor, needs: Collection[str] | None = None) -> SegmentationOutput:
        """The teacher's view of a batch; ``needs`` may ask for other things at this step than at construction."""
        wanted = {"needs": self.needs if needs is None else needs}
        with torch.no_grad():  # not inference_mode: the backward pass uses what comes out
            cast = self._cast_weights(image.device.type)
            output: SegmentationOutput
            output = functional_call(self.network, cast, (image,), wanted) if cast else self.network(image, **wanted)
            return self._standardised(output)

    def standardise(self, images: Iterable[Tensor], when: bool | str = "auto") -> list[float]:
        """Show features with zero mean and unit variance per channel from now on, by statistics taken once.

        Terms on features are weighed for features as LayerNorm leaves them. The raw maps of a CNN are ten times as
        large, and a squared difference a hundred times.

        Args:
            images: batches [B, 3, H, W].
            when: "auto" does so only where a stage's channels have a mean standard deviation outside of 1/3 to 3.

        Returns:
            The mean standard deviation of each stage's channels; empty where nothing was changed.
        """
        if when is False or "features" not in self.needs:
            return []
        found = channel_statistics(self.network, images)
        scales = [deviation.mean().item() for _, deviation in found]
        low, high = USUAL_SCALE
        if when == "auto" and all(low < scale < high for scale in scales):
            return []
        self._statistics = found
        return scales

    def _standardised(self, output: SegmentationOutput) -> SegmentationOutput:
        if not self._statistics or not output.features:
            return output
        features = []
        for feature, (mean, deviation) in zip(output.features, self._statistics, strict=True):
            shift, scale = (part.to(feature)[:, None, None] for part in (mean, deviation))
            features.append((feature - shift) / scale)
        return output._replace(features=tuple(features))

    def _cast_weights(self, device: str) -> dict[str, Tensor]:
        """Under autocast, the weights that it would cast at every step, as it would cast them."""
        if not self.cast_once or not torch.is_autocast_enabled(device):
            return {}
        dtype = torch.get_autocast_dtype(device)
        state = (dtype, *((weight.data_ptr(), weight._version) for weight in self._weights.values()))
        if state != self._cast_from:  # other weights were loaded, or they have moved
            self._cast = {name: w if w.dtype == torch.float64 else w.to(dtype) for name, w in self._weights.items()}
            self._cast_from = state
        return self._cast

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: a teacher stays in eval."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # nn.Module has no public hook for .to(), .cuda(), .half() …, all of which come through here
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


@torch.no_grad()
def channel_statistics(network: nn.Module, images: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean [C] and standard deviation [C] of each stage's feature channels over images and positions.

    Args:
        network: image -> SegmentationOutput, accepting ``needs``.
        images: batches [B, 3, H, W] on the network's device.
    """
    count, sums, squares = [0], list[Tensor](), list[Tensor]()
    for image in images:
        for i, feature in enumerate(network(image, needs={"features"}).features):
            values = feature.double().transpose(0, 1).flatten(1)
            if i == len(sums):
                sums.append(torch.zeros_like(values[:, 0]))
                squares.append(torch.zeros_like(values[:, 0]))
                count.append(0)
            sums[i] += values.sum(1)
            squares[i] += values.square().sum(1)
            count[i] += values.shape[1]
    statistics = []
    for i, (total, square) in enumerate(zip(sums, squares, strict=True)):
        mean = total / count[i]
        deviation = (square / count[i] - mean.square()).clamp_min(0).sqrt()
        smallest = max(1e-6, 1e-3 * deviation.mean().item()) if math.isfinite(deviation.mean().item()) else 1e-6
        statistics.append((mean.float(), deviation.clamp_min(smallest).float()))
    return statistics
