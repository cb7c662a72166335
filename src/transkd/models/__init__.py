"""Networks: encoders, heads, the Segmenter, the frozen teacher, and weights in and out."""

from transkd.models.deeplab import DeepLabV3PlusHead
from transkd.models.factory import HEADS, SEGMENTERS, create_segmenter
from transkd.models.fpn import SemanticFPNHead
from transkd.models.heads import SegformerHead
from transkd.models.initialise import start_from_teacher
from transkd.models.lora import add_lora, merge_lora
from transkd.models.lvt import LiteVisionTransformer
from transkd.models.mit import MixTransformer
from transkd.models.network import Network
from transkd.models.segmenter import Segmenter
from transkd.models.tapped import Tapped
from transkd.models.teacher import FrozenTeacher
from transkd.models.timm_encoder import TimmEncoder
from transkd.models.weights import load_segmenter, load_weights, save_segmenter

__all__ = [
    "HEADS",
    "SEGMENTERS",
    "DeepLabV3PlusHead",
    "FrozenTeacher",
    "LiteVisionTransformer",
    "MixTransformer",
    "Network",
    "SegformerHead",
    "Segmenter",
    "SemanticFPNHead",
    "Tapped",
    "TimmEncoder",
    "add_lora",
    "create_segmenter",
    "load_segmenter",
    "load_weights",
    "merge_lora",
    "save_segmenter",
    "start_from_teacher",
]
