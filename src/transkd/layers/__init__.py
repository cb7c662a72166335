"""Layers and operations shared by networks and terms, each with a fast path per device; imports torch alone."""

from transkd.layers.attention import attend
from transkd.layers.patch_embedding import OverlapPatchEmbedding, init_vision_weights
from transkd.layers.placement import restored
from transkd.layers.token_linear import TokenLinear, token_linear
from transkd.layers.upsampled_cross_entropy import upsampled_cross_entropy
from transkd.layers.upsampling import add_upsampled, upsampled, upsampled_argmax

__all__ = [
    "OverlapPatchEmbedding",
    "TokenLinear",
    "add_upsampled",
    "attend",
    "init_vision_weights",
    "restored",
    "token_linear",
    "upsampled",
    "upsampled_argmax",
    "upsampled_cross_entropy",
]
