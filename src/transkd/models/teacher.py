"""The frozen teacher."""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from transkd.layers.token_linear import TokenLinear
from transkd.layers.token_norm import TokenNorm
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["FrozenTeacher", "channel_statistics"]

CAST_BY_AUTOCAST = {nn.Linear, TokenLinear, nn.Conv2d}
"""Layers, without subclasses, whose weights only an operation reads that autocast casts; on a GPU also TokenNorm."""
USUAL_SCALE = (1 / 3, 3.0)
"""Range of the mean standard deviation of a stage's channels after a LayerNorm; raw maps of CNNs have 2 to 11."""


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
        cast_once: False leaves the casts to autocast, as required for compiled networks.

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
        self._weights = {
            f"{name}.{own}": (parameter, type(layer))
            for name, layer in network.named_modules()
            if type(layer) in {*CAST_BY_AUTOCAST, TokenNorm}
            for own, parameter in layer.named_parameters()
        }
        self._cast: dict[str, Tensor] = {}
        self._cast_from: tuple[object, ...] = ()
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self.needs, self.cast_once = frozenset(needs), cast_once
        self.training = False

    def forward(self, image: Tensor, needs: Collection[str] | None = None) -> SegmentationOutput:
        """Run the teacher; ``needs`` overrides that of the constructor for this call."""
        options = {"needs": self.needs if needs is None else needs}
        with torch.no_grad():  # not inference_mode: autograd saves the outputs
            cast = self._cast_weights(image.device.type)
            output: SegmentationOutput
            output = functional_call(self.network, cast, (image,), options) if cast else self.network(image, **options)
            return self._standardised(output)

    def standardise(self, images: Iterable[Tensor], when: bool | str = "auto") -> list[float]:
        """Standardise features to zero mean and unit variance per channel from now on, with statistics of these images.

        The default weights of terms on features assume features after a LayerNorm. Raw maps of a CNN are ten times as
        large, squared differences a hundred times.

        Args:
            images: batches [B, 3, H, W].
            when: "auto" does so only if the mean standard deviation of some stage's channels is outside 1/3 to 3.

        Returns:
            The mean standard deviation of each stage's channels; empty if features are not standardised.
        """
        if when is False or "features" not in self.needs:
            return []
        statistics = channel_statistics(self.network, images)
        scales = [deviation.mean().item() for _, deviation in statistics]
        low, high = USUAL_SCALE
        if when == "auto" and all(low < scale < high for scale in scales):
            return []
        self._statistics = statistics
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
        """Under autocast, return cached casts of the weights to the autocast dtype."""
        if not self.cast_once or not torch.is_autocast_enabled(device):
            return {}
        dtype = torch.get_autocast_dtype(device)
        kinds = CAST_BY_AUTOCAST | ({TokenNorm} if device == "cuda" and dtype == torch.bfloat16 else set())
        weights = {name: weight for name, (weight, kind) in self._weights.items() if kind in kinds}
        # the version counter is the only trace of a write in place; it has no public name
        state = (dtype, *((weight.data_ptr(), weight._version) for weight in weights.values()))
        if state != self._cast_from:  # weights were loaded or moved
            self._cast = {name: w if w.dtype == torch.float64 else w.to(dtype) for name, w in weights.items()}
            self._cast_from = state
        return self._cast

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Do nothing: the teacher stays in eval mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(), .cuda(), .half() and others call this method; nn.Module has no public hook for them
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


@torch.no_grad()
def channel_statistics(network: nn.Module, images: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Compute mean [C] and standard deviation [C] of each stage's channels over images and positions.

    Args:
        network: module from an image to a SegmentationOutput, with an argument ``needs``.
        images: batches [B, 3, H, W] on the network's device.
    """
    count, sums, squares = list[int](), list[Tensor](), list[Tensor]()
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
