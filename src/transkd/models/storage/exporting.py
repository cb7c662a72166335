"""Networks in the formats of others: each written, and opened again by the library that users open it with."""

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.models.encoders.mit import MixTransformer
from transkd.models.factory import load_segmenter
from transkd.models.heads.segformer import SegformerHead
from transkd.models.segmenter import Segmenter
from transkd.models.storage.card import CARD, describe
from transkd.models.storage.formats import rename_to_huggingface
from transkd.models.storage.lineage import describe_lineage
from transkd.models.storage.saving import save_segmenter

__all__ = ["FORMATS", "Exported", "Format", "complete_card", "plain_resize"]

Card = dict[str, Any]
RANGE = 255  # of the bytes of an image; exported graphs take RGB in [0, 1]


class Exported(NamedTuple):
    """A written network, opened by an independent reader.

    Attributes:
        run: images uint8 [B, 3, H, W] to logits [B, K, ceil(H/4), ceil(W/4)].
        parameters: how many numbers it holds; ``Format.counts`` says which.
    """

    run: Callable[[Tensor], Tensor]
    parameters: int


class Format(NamedTuple):
    """One format.

    Attributes:
        write: network in eval, card, path; a folder's format makes the folder.
        open: what was written.
        packages: what it needs beyond transkd's own.
        minimum: smallest height and width of an image.
        normalises: whether mean and standard deviation are inside what is written.
        counts: what ``Exported.parameters`` counts.
        suffix: how the file's name must end.
    """

    write: Callable[..., None]
    open: Callable[[Path], Exported]
    packages: tuple[str, ...] = ()
    minimum: int = 32
    normalises: bool = False
    counts: str = "parameters"
    suffix: str = ""


def complete_card(network: Segmenter, card: Card) -> Card:
    """What the source says of its network (classes, palette, notes), with the network's own facts over it."""
    return {**card, **describe(network)}


def plain_resize(transform: Card | None) -> tuple[int, int] | None:
    """Height and width of a serialised Albumentations transform that resizes and does nothing else, or None.

    Example:
        >>> import albumentations as A
        >>> plain_resize(A.Compose([A.Resize(180, 240)]).to_dict())
        (180, 240)
    """
    step = (transform or {}).get("transform", {})
    while len(step.get("transforms", [])) == 1:
        step = step["transforms"][0]
    is_resize = str(step.get("__class_fullname__", "")).rsplit(".", 1)[-1] == "Resize"
    return (step["height"], step["width"]) if is_resize else None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# safetensors


def _write_safetensors(network: Segmenter, card: Card, path: Path) -> None:
    own = describe(network)
    save_segmenter(network, path, **{key: value for key, value in card.items() if key not in own})


def _open_safetensors(path: Path) -> Exported:
    with _quiet("transkd"):  # which would log a file that the user never named
        network, _ = load_segmenter(path)
    network.eval()
    return Exported(lambda image: network(image, needs={"logits"}).logits, _count(network))


# torch.export and ONNX

SMALLEST_TRACED = 64
"""Below it a stage is one pixel wide, which torch.export makes a case of its own and shuts out of the program."""

OLDEST_OPSET = 18


class _Logits(nn.Module):
    """The network with one tensor in and one out."""

    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """RGB in [0, 1] to logits."""
        return self.network(image, needs={"logits"}).logits


def _trace(network: Segmenter) -> torch.export.ExportedProgram:
    """The network as a program for any batch, height and width."""
    image = torch.zeros(2, 3, 75, 133)  # sizes that no stride divides, so that none is taken for special
    with torch.no_grad(), _explained(network, "traced by torch.export"):
        side = torch.export.Dim.DYNAMIC(min=SMALLEST_TRACED)
        shapes = {"image": {0: torch.export.Dim.DYNAMIC, 2: side, 3: side}}
        return torch.export.export(_Logits(network).eval(), (image,), dynamic_shapes=shapes)


@contextmanager
def _explained(network: Segmenter, step: str) -> Iterator[None]:
    """Turn whatever an exporter raises into one line; HYDRA_FULL_ERROR=1 shows the whole."""
    try:
        with _quiet("torch", "onnxscript", "onnx_ir"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what exporters say underway nothing concerns the user
            yield
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{network.name} cannot be {step}: {reason[:300].rstrip('.')}. format=safetensors works for every network"
        ) from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Let loggers say nothing but errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_torch(network: Segmenter, card: Card, path: Path) -> None:
    buffer = io.BytesIO()
    torch.export.save(_trace(network), buffer, extra_files={"transkd.json": json.dumps(card)})
    path.write_bytes(buffer.getbuffer())


def _open_torch(path: Path) -> Exported:
    program = torch.export.load(path)
    module = program.module()
    return Exported(lambda image: module(image.float() / RANGE), sum(p.numel() for p in program.parameters()))


def _write_onnx(network: Segmenter, card: Card, path: Path, opset: int = 20) -> None:
    import onnx

    if opset < OLDEST_OPSET:
        raise UserError(f"opset={opset} is too old for torch's exporter, which writes {OLDEST_OPSET} and newer")
    program = _trace(network)
    with _explained(network, f"written as ONNX, opset {opset}"):
        converted = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, input_names=["image"], output_names=["logits"], verbose=False
        )
        assert converted is not None
        model = converted.model_proto
        _tidy_onnx(model)
        onnx.helper.set_model_props(model, {CARD: json.dumps(card)})
        onnx.checker.check_model(model, full_check=True)
        content = model.SerializeToString()
    path.write_bytes(content)


def _tidy_onnx(model: Any) -> None:
    """Name the dynamic axes, and drop what the exporter notes of the machine that it ran on."""
    axes = model.graph.input[0].type.tensor_type.shape.dim
    names = {axes[i].dim_param: name for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    symbols = re.compile(rf"\b({'|'.join(names)})\b")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = symbols.sub(lambda match: names[match[0]], axis.dim_param)
    for part in (model.graph, *model.graph.node, *model.graph.initializer):
        del part.metadata_props[:]  # stack traces with the paths of the exporting machine, among others


def _open_onnx(path: Path) -> Exported:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": (image.float() / RANGE).numpy()})[0])

    floats = [
        int(np.prod(tensor.dims))
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.endswith(("network.mean", "network.std"))
    ]
    return Exported(run, sum(size for size in floats if size > 1))  # single numbers are factors of the graph's own


# Hugging Face


def _write_huggingface(network: Segmenter, card: Card, path: Path) -> None:
    from transformers import SegformerImageProcessor

    encoder, head = network.encoder, network.head
    if not (isinstance(encoder, MixTransformer) and isinstance(head, SegformerHead) and len(encoder.channels) == 4):
        raise UserError(
            f"format=hf is for SegFormer, the one of our networks that transformers has; {network.name} is a "
            f"{type(encoder).__name__} with a {type(head).__name__}. Formats that take it: onnx, torch, safetensors"
        )
    path.mkdir()
    config = {**_huggingface_config(encoder, head, card), CARD: card}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = rename_to_huggingface(network.state_dict())
    content = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})
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


def _open_huggingface(path: Path) -> Exported:
    import transformers

    library: Any = transformers  # whose annotations are not for from_pretrained(output_loading_info=True)
    library.utils.logging.disable_progress_bar()
    network, info = library.SegformerForSemanticSegmentation.from_pretrained(path, output_loading_info=True)
    differing = {kind: names for kind, names in info.items() if names}
    if differing:
        raise UserError(f"transformers does not take {path.name} as it is: {differing}; format=safetensors works")
    processor = library.SegformerImageProcessor.from_pretrained(path)

    def run(image: Tensor) -> Tensor:
        return network(**processor(list(image), do_resize=False, return_tensors="pt")).logits

    return Exported(run, _count(network))


def _model_card(network: Segmenter, card: Card, size: tuple[int, int] | None) -> str:
    """README.md of a folder for the hub: front matter, what it is, where it comes from."""
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
    """Front matter for the licence of the weights; nothing where nobody stated one."""
    stated = [entry["license"] for entry in network.lineage if entry["part"] == "weights"]
    licenses = {license for license in stated if license not in (None, "none needed")}
    if len(licenses) != 1 or None in stated:
        return {}
    (license,) = licenses
    assert license is not None
    if re.fullmatch(r"[a-z0-9.+-]+", license):  # as the hub spells licences
        return {"license": license}
    return {"license": "other", "license_name": license}


FORMATS = {
    "onnx": Format(
        _write_onnx,
        _open_onnx,
        packages=("onnx", "onnxscript", "onnxruntime"),
        normalises=True,
        counts="numbers in the graph (parameters, BatchNorm statistics, folded constants; equal ones stored once)",
    ),
    "hf": Format(_write_huggingface, _open_huggingface, packages=("transformers",)),
    "torch": Format(_write_torch, _open_torch, minimum=SMALLEST_TRACED, normalises=True, suffix=".pt2"),
    "safetensors": Format(_write_safetensors, _open_safetensors),
}
"""Formats by their name on the command line."""
