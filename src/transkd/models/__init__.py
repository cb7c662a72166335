"""Networks: encoders, heads, the Segmenter, the frozen teacher, and weights in and out."""

from transkd.models.factory import SEGMENTERS, create_segmenter
from transkd.models.heads import SegformerHead
from transkd.models.mit import MixTransformer
from transkd.models.segmenter import Segmenter
from transkd.models.teacher import FrozenTeacher
from transkd.models.weights import load_segmenter, load_weights, save_segmenter

__all__ = [
    "SEGMENTERS",
    "FrozenTeacher",
    "MixTransformer",
    "SegformerHead",
    "Segmenter",
    "create_segmenter",
    "load_segmenter",
    "load_weights",
    "save_segmenter",
]
