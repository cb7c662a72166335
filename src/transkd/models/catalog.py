"""The networks with a name of their own: which encoder, which head."""

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["SEGMENTERS", "Recipe"]


class Recipe(NamedTuple):
    """What a named network is made of."""

    encoder: str
    head: str
    width: int
    args: Mapping[str, Any] = {}  # for the encoder


SEGMENTERS: dict[str, Recipe] = {
    "segformer_b0": Recipe("mit_b0", "segformer", 256),
    "segformer_b1": Recipe("mit_b1", "segformer", 256),
    "segformer_b2": Recipe("mit_b2", "segformer", 768),
    "segformer_b3": Recipe("mit_b3", "segformer", 768),
    "segformer_b4": Recipe("mit_b4", "segformer", 768),
    "segformer_b5": Recipe("mit_b5", "segformer", 768),
    "lvt": Recipe("lvt", "segformer", 256),
    "pvt_v2_b0": Recipe("pvt_v2_b0", "fpn", 256),
    "pvt_v2_b1": Recipe("pvt_v2_b1", "fpn", 256),
    "pvt_v2_b2": Recipe("pvt_v2_b2", "fpn", 256),
    "pvt_v2_b3": Recipe("pvt_v2_b3", "fpn", 256),
    "pvt_v2_b4": Recipe("pvt_v2_b4", "fpn", 256),
    "pvt_v2_b5": Recipe("pvt_v2_b5", "fpn", 256),
    "deeplabv3plus_resnet101": Recipe("resnet101", "deeplabv3plus", 256, {"output_stride": 16}),
}
"""Named networks; any other name is that of an encoder, which gets the SegFormer head."""
