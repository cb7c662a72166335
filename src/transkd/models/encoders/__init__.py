"""Encoders: from an image to stage features and patch embeddings."""

from transkd.models.encoders.lvt import LiteVisionTransformer
from transkd.models.encoders.mit import MixTransformer
from transkd.models.encoders.timm_encoder import TimmEncoder

__all__ = ["LiteVisionTransformer", "MixTransformer", "TimmEncoder"]
