"""Networks: encoders, heads, the Segmenter, the frozen teacher, loading and saving of weights."""

from transkd.models.catalog import SEGMENTERS, Recipe
from transkd.models.class_map import MappedClasses
from transkd.models.encoders.lvt import LiteVisionTransformer
from transkd.models.encoders.mit import MixTransformer
from transkd.models.encoders.timm_encoder import TimmEncoder
from transkd.models.factory import ENCODERS, HEADS, create_segmenter, load_segmenter
from transkd.models.heads.deeplab import DeepLabV3PlusHead
from transkd.models.heads.fpn import SemanticFPNHead
from transkd.models.heads.segformer import SegformerHead
from transkd.models.inherit import InheritReport, inherit, start_from_teacher
from transkd.models.lora import add_lora, merge_lora
from transkd.models.network import Network
from transkd.models.segmenter import Segmenter
from transkd.models.storage.loading import load_weights
from transkd.models.storage.saving import save_segmenter
from transkd.models.tapped import Tapped
from transkd.models.teacher import FrozenTeacher

__all__ = [
    "ENCODERS",
    "HEADS",
    "SEGMENTERS",
    "DeepLabV3PlusHead",
    "FrozenTeacher",
    "InheritReport",
    "LiteVisionTransformer",
    "MappedClasses",
    "MixTransformer",
    "Network",
    "Recipe",
    "SegformerHead",
    "Segmenter",
    "SemanticFPNHead",
    "Tapped",
    "TimmEncoder",
    "add_lora",
    "create_segmenter",
    "inherit",
    "load_segmenter",
    "load_weights",
    "merge_lora",
    "save_segmenter",
    "start_from_teacher",
]
