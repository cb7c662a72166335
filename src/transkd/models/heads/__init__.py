"""Decode heads: from stage features to logits."""

from transkd.models.heads.deeplab import DeepLabV3PlusHead
from transkd.models.heads.fpn import SemanticFPNHead
from transkd.models.heads.segformer import SegformerHead

__all__ = ["DeepLabV3PlusHead", "SegformerHead", "SemanticFPNHead"]
