"""Output of every network, the input of the losses."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["EVERYTHING", "IGNORE", "UNLABELLED", "SegmentationOutput"]

IGNORE = 255
"""Label of pixels that losses and scores ignore."""

UNLABELLED = -255
"""Label of all pixels of an image without labels.

Terms that read labels ignore it as they do 255 and other negative values; ``mask_ignored`` leaves such pixels in.
"""

EVERYTHING = frozenset({"logits", "features", "embeddings"})
"""Kinds of output that can be requested; a term's ``needs`` is a subset."""


class SegmentationOutput(NamedTuple):
    """Output of a network for one batch.

    Attributes:
        logits: raw scores [B, K, h, w] at the network's own stride, or None if they were not requested.
        features: one map per stage, stage i [B, C_i, H_i, W_i], shallowest first.
        embeddings: one token map per stage, stage i [B, N_i, C_i] with N_i = H_i·W_i; empty for networks
            without patch embeddings.
        image: the network's own input [B, 3, H, W], after its normalisation.

    Example:
        >>> import torch
        >>> output = SegmentationOutput(None, (torch.zeros(1, 8, 4, 4),), (), torch.zeros(1, 3, 16, 16))
        >>> output.features[0].shape
        torch.Size([1, 8, 4, 4])
    """

    logits: Tensor | None
    features: tuple[Tensor, ...]
    embeddings: tuple[Tensor, ...]
    image: Tensor
