"""Export formats: each writes a network, and opens it again with the library that users load it with."""

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.models.factory import load_segmenter
from transkd.models.segmenter import Segmenter
from transkd.models.storage.card import CARD, describe
from transkd.models.storage.exported import Card, Exported, Format, count_parameters
from transkd.models.storage.huggingface import open_huggingface, write_huggingface
from transkd.models.storage.resizing import plain_resize
from transkd.models.storage.saving import save_segmenter

__all__ = ["FORMATS", "Exported", "Format", "complete_card", "plain_resize", "smallest"]

RANGE = 255  # largest uint8 value; exported graphs expect RGB in [0, 1]


def complete_card(network: Segmenter, card: Card) -> Card:
    """Merge the card of the source (classes, palette, notes) with the network's description, which takes precedence."""
    return {**card, **describe(network)}


def smallest(network: Segmenter, side: int) -> int:
    """Smallest side of an image that a network which shrinks images first sees as at least ``side``."""
    return math.ceil(side / min(1.0, network.scale))


# safetensors


def _write_safetensors(network: Segmenter, card: Card, path: Path) -> None:
    own = describe(network)
    save_segmenter(network, path, **{key: value for key, value in card.items() if key not in own})


def _open_safetensors(path: Path) -> Exported:
    with _quiet("transkd"):  # hide log lines about the temporary file
        network, _ = load_segmenter(path)
    network.eval()
    return Exported(lambda image: network(image, needs={"logits"}).logits, count_parameters(network))


# torch.export and ONNX

SMALLEST_TRACED = 64
"""Smallest traced side: below it a stage is one pixel wide, and torch.export specialises on size 1."""

OLDEST_OPSET = 18


class _Logits(nn.Module):
    """Wrapper of a network with one input and one output tensor."""

    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits from RGB in [0, 1]."""
        return self.network(image, needs={"logits"}).logits


def _trace(network: Segmenter) -> torch.export.ExportedProgram:
    """Trace the network with dynamic batch size, height and width."""
    # not multiples of any stride: torch.export adds no divisibility constraints
    image = torch.zeros(2, 3, smallest(network, 75), smallest(network, 133))
    with torch.no_grad(), _explained(network, "traced by torch.export"):
        side = torch.export.Dim.DYNAMIC(min=smallest(network, SMALLEST_TRACED))
        shapes = {"image": {0: torch.export.Dim.DYNAMIC, 2: side, 3: side}}
        return torch.export.export(_Logits(network).eval(), (image,), dynamic_shapes=shapes)


@contextmanager
def _explained(network: Segmenter, step: str) -> Iterator[None]:
    """Convert exceptions of exporters to a one-line UserError; HYDRA_FULL_ERROR=1 shows the traceback."""
    try:
        with _quiet("torch", "onnxscript", "onnx_ir"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # silence the exporters' warnings
            yield
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{network.name} cannot be {step}: {reason[:300].rstrip('.')}. format=safetensors works for every network"
        ) from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Set loggers to the level ERROR within the context."""
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
    buffer, program = io.BytesIO(), _trace(network)
    with _explained(network, "saved by torch.export"):
        torch.export.save(program, buffer, extra_files={"transkd.json": json.dumps(card)})
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
    """Name the dynamic axes and remove the exporter's metadata about the exporting machine."""
    axes = model.graph.input[0].type.tensor_type.shape.dim
    names = {axes[i].dim_param: name for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    symbols = re.compile(rf"\b({'|'.join(names)})\b")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = symbols.sub(lambda match: names[match[0]], axis.dim_param)
    for part in (model.graph, *model.graph.node, *model.graph.initializer):
        del part.metadata_props[:]  # includes stack traces with local paths


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
    return Exported(run, sum(size for size in floats if size > 1))  # scalars are constants of the graph, not parameters


FORMATS = {
    "onnx": Format(
        _write_onnx,
        _open_onnx,
        packages=("onnx", "onnxscript", "onnxruntime"),
        normalises=True,
        counts="numbers in the graph (parameters, BatchNorm statistics, folded constants; equal ones stored once)",
    ),
    "hf": Format(write_huggingface, open_huggingface, packages=("transformers",)),
    "torch": Format(_write_torch, _open_torch, minimum=SMALLEST_TRACED, normalises=True, suffix=".pt2"),
    "safetensors": Format(_write_safetensors, _open_safetensors),
}
"""Formats by name."""
