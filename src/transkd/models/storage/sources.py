"""Reading of weights from files, folders and hubs: tensors, normalisation, classes, licence."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transkd.errors import UserError
from transkd.files import read_tensor_file, tensors_in
from transkd.models.lora import fold_lora
from transkd.models.storage.card import CARD, HASH, fingerprint, read_card
from transkd.models.storage.folders import read_folder, read_hub, read_timm_hub
from transkd.models.storage.lineage import CODE
from transkd.models.storage.recognition import NVIDIA, NVIDIA_NAMING, Weights, origin, recognise

__all__ = ["CARD", "NVIDIA", "NVIDIA_NAMING", "Weights", "read_weights"]


def read_weights(source: str | Path) -> Weights:
    """Read weights from a file, folder or hub; the format is detected from the content.

    Args:
        source: a file (ours, a checkpoint of a run, MiT or SegFormer in the published naming, the TransKD authors',
            segmentation_models.pytorch's, timm's, or any state dict), a folder as ``save_pretrained`` writes it
            (transformers, segmentation_models.pytorch, timm, our export), ``hf://<repository>`` on the Hugging Face
            hub, or ``timm://<model>``. Pickles are read with ``weights_only=True``: no code in them is executed. What
            a file says of itself is checked (``read_card``) and leads to no other file.

    Raises:
        UserError: the source does not exist, is damaged or not readable, or the hub cannot be reached.
    """
    source = str(source)
    if source.startswith("timm://"):
        return read_timm_hub(source, source.removeprefix("timm://"))
    if source.startswith("hf://"):
        return read_hub(source, source.removeprefix("hf://"))
    if os.path.isdir(source):
        if not os.path.lexists(Path(source) / "student.safetensors"):
            return read_folder(source, Path(source))
        source = str(Path(source) / "student.safetensors")  # folder of a run
    if source.endswith((".onnx", ".pt2")):
        raise UserError(
            f"{source} is an exported graph, which other programs run; give the weights that it was exported from"
        )
    content, metadata = read_tensor_file(source)
    tensors = tensors_in(content, source)
    card = _card_of(content, metadata, tensors, source)
    if not card:
        return recognise(source, tensors)
    if isinstance(content, Mapping) and "state_dict" in content:  # a run's checkpoint: select the student
        tensors = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
    tensors = fold_lora(tensors)  # checkpoints store low-rank terms separately, to resume training
    return Weights(source, "transkd", tensors, tensors, card, card.get("lineage", [CODE, origin(source)]))


def _card_of(content: Any, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the description in one of our files; empty for other files.

    Raises:
        UserError: it is malformed, or its hash shows that the file was damaged.
    """
    raw = metadata.get(CARD) if metadata else content.get(CARD)
    if metadata and raw is None:  # a damaged key must not make the file one of another library
        raw = next((text for text in metadata.values() if '"transkd_version"' in text), None)
    if raw is None or isinstance(raw, Tensor):
        return {}
    card = read_card(raw, source)
    stated = json.loads(raw) if isinstance(raw, str) else {}
    if HASH in stated and stated[HASH] != fingerprint(tensors, stated):
        raise UserError(
            f"{source} is damaged: it differs from the hash that was written with it; copy or download it again"
        )
    return card
