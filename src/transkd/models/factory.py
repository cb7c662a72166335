"""Networks by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm

from transkd.errors import UserError
from transkd.models import mit  # noqa: F401  (registers MiT with timm)
from transkd.models.heads import SegformerHead
from transkd.models.segmenter import IMAGENET_MEAN, IMAGENET_STD, Segmenter

__all__ = ["SEGMENTERS", "create_segmenter"]

SEGMENTERS: dict[str, tuple[str, int]] = {
    "segformer_b0": ("mit_b0", 256),
    "segformer_b1": ("mit_b1", 256),
    "segformer_b2": ("mit_b2", 768),
    "segformer_b3": ("mit_b3", 768),
    "segformer_b4": ("mit_b4", 768),
    "segformer_b5": ("mit_b5", 768),
}
"""Name -> (timm encoder, width of the SegFormer head)."""


def create_segmenter(
    name: str,
    num_classes: int,
    weights: str | Path | None = None,
    drop_path_rate: float = 0.1,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Segmenter:
    """Build a segmentation network by name.

    Args:
        name: one of ``SEGMENTERS`` (``segformer_b0`` … ``segformer_b5``).
        num_classes: number of classes K.
        weights: file to start from (see ``transkd.models.weights.load_weights``); None starts from random weights.
        drop_path_rate: stochastic depth of the encoder's last block.
        mean: subtracted from RGB in [0, 1]; a full set of weights brings its own.
        std: divides what is left.

    Raises:
        UserError: unknown name, or weights that do not fit.

    Example:
        >>> network = create_segmenter("segformer_b0", num_classes=19)
        >>> round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
        3.72
    """
    if name not in SEGMENTERS:
        raise UserError(f"unknown network {name!r}; available: {', '.join(SEGMENTERS)}")
    encoder_name, width = SEGMENTERS[name]
    encoder: Any = timm.create_model(encoder_name, num_classes=0, drop_path_rate=drop_path_rate)
    head = SegformerHead(encoder.channels, width, num_classes)
    network = Segmenter(encoder, head, num_classes, mean, std)
    network.name = name
    if weights is not None:
        from transkd.models.weights import load_weights

        load_weights(network, weights)
    return network
