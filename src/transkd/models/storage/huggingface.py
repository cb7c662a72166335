"""Export of SegFormer to Hugging Face's transformers."""

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from transkd.errors import UserError
from transkd.models.encoders.mit import MixTransformer
from transkd.models.heads.segformer import SegformerHead
from transkd.models.segmenter import Segmenter
from transkd.models.storage.card import CARD, HASH, describe, fingerprint
from transkd.models.storage.exported import Card, Exported, count_parameters
from transkd.models.storage.formats import rename_to_huggingface
from transkd.models.storage.lineage import describe_lineage
from transkd.models.storage.resizing import plain_resize

__all__ = ["open_huggingface", "write_huggingface"]


def write_huggingface(network: Segmenter, card: Card, path: Path) -> None:
    """Write a SegFormer as a folder for transformers, with preprocessor configuration and model card."""
    from transformers import SegformerImageProcessor

    encoder, head = network.encoder, network.head
    if not (isinstance(encoder, MixTransformer) and isinstance(head, SegformerHead) and len(encoder.channels) == 4):
        raise UserError(
            f"format=hf is only for SegFormer, which transformers implements; {network.name} is a "
            f"{type(encoder).__name__} with a {type(head).__name__}. Other formats: onnx, torch, safetensors"
        )
    if network.scale != 1:
        raise UserError(
            f"format=hf: {network.name} resizes images by {network.scale:g} first, which a SegFormer of transformers "
            "does not. Other formats: onnx, torch, safetensors"
        )
    path.mkdir()
    config = {**_huggingface_config(encoder, head, card), CARD: card}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = rename_to_huggingface(network.state_dict())
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", f"{CARD}_{HASH}": fingerprint(tensors, {})}
    content = safetensors.torch.save(tensors, metadata=metadata)
    (path / "model.safetensors").write_bytes(content)
    size = plain_resize(card.get("eval_transform"))
    processing: dict[str, Any] = {"image_mean": card["mean"], "image_std": card["std"], "do_resize": size is not None}
    if size is not None:
        processing["size"] = {"height": size[0], "width": size[1]}
    SegformerImageProcessor(**processing).save_pretrained(path)
    (path / "README.md").write_text(_model_card(network, card, size), encoding="utf-8")


def _huggingface_config(encoder: MixTransformer, head: SegformerHead, card: Card) -> dict[str, Any]:
    from transformers import SegformerConfig

    stages: list[Any] = [encoder.get_submodule(f"block{i}") for i in range(1, 5)]
    embeddings: list[Any] = [encoder.get_submodule(f"patch_embed{i}").proj for i in range(1, 5)]
    names = card.get("class_names") or [f"class {i}" for i in range(card["num_classes"])]
    config = SegformerConfig(
        depths=[len(blocks) for blocks in stages],
        sr_ratios=[blocks[0].attn.reduction for blocks in stages],
        hidden_sizes=list(encoder.channels),
        patch_sizes=[embedding.kernel_size[0] for embedding in embeddings],
        strides=[embedding.stride[0] for embedding in embeddings],
        num_attention_heads=[blocks[0].attn.heads for blocks in stages],
        mlp_ratios=[blocks[0].mlp.fc1.out_features // blocks[0].mlp.fc1.in_features for blocks in stages],
        decoder_hidden_size=head.linear_fuse.conv.out_channels,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    config.architectures = ["SegformerForSemanticSegmentation"]
    return config.to_dict()


def open_huggingface(path: Path) -> Exported:
    """Open the folder with transformers."""
    import transformers

    library: Any = transformers  # Any: its annotations lack from_pretrained(output_loading_info=True)
    library.utils.logging.disable_progress_bar()
    network, info = library.SegformerForSemanticSegmentation.from_pretrained(path, output_loading_info=True)
    differing = {kind: names for kind, names in info.items() if names}
    if differing:
        raise UserError(f"transformers loads {path.name} with differences: {differing}; format=safetensors works")
    processor = library.SegformerImageProcessor.from_pretrained(path)

    def run(image: Tensor) -> Tensor:
        return network(**processor(list(image), do_resize=False, return_tensors="pt")).logits

    return Exported(run, count_parameters(network))


def _model_card(network: Segmenter, card: Card, size: tuple[int, int] | None) -> str:
    """Model card (README.md) for the Hugging Face hub: front matter, usage, lineage, training notes."""
    from huggingface_hub import ModelCardData

    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "segformer", "knowledge-distillation", "transkd"],
        **_license(network),
    )
    notes = {
        key: value
        for key, value in card.items()
        if isinstance(value, str | int | float) and key not in describe(network) and key != "license"
    }
    if "mIoU" in notes and "protocol" not in notes:
        notes["protocol"] = "not stated; scores of different protocols cannot be compared"
    resize = f"resized to {size[0]}×{size[1]}, then " if size else ""
    lines = [
        "---",
        about.to_yaml(),
        "---",
        "",
        f"# {network.name}, {network.num_classes} classes",
        "",
        f"A semantic-segmentation network exported by transkd {card['transkd_version']}. Images are RGB, {resize}"
        "divided by 255 and normalised as in preprocessor_config.json; logits have stride 4.",
        "",
        "```python",
        "from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor",
        "",
        'network = SegformerForSemanticSegmentation.from_pretrained("<this folder>")',
        'processor = SegformerImageProcessor.from_pretrained("<this folder>")',
        "```",
        "",
        *([f"Classes: {', '.join(card['class_names'])}.", ""] if card.get("class_names") else []),
        "## Lineage",
        "",
        *[f"- {describe_lineage([entry])}" for entry in network.lineage],
        "",
        *(["## Training", "", *[f"- {key}: {value}" for key, value in notes.items()], ""] if notes else []),
    ]
    return "\n".join(lines)


def _license(network: Segmenter) -> dict[str, Any]:
    """Front matter for the licence of the weights; empty if it is not known or not unique."""
    stated = [entry["license"] for entry in network.lineage if entry["part"] == "weights"]
    licenses = {license for license in stated if license not in (None, "none needed")}
    if len(licenses) != 1 or None in stated:
        return {}
    (license,) = licenses
    assert license is not None
    if re.fullmatch(r"[a-z0-9.+-]+", license):  # identifiers of the hub
        return {"license": license}
    return {"license": "other", "license_name": license}
