"""The subcommand ``inference``: image to logits by ours, transformers, and ours exported to other runtimes."""

import argparse
import importlib
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.forward import TOLERANCE, build_network, build_transformers
from transkd.data.synthetic import CONDITIONS, draw_scene
from transkd.errors import UserError
from transkd.models import SegformerHead, Segmenter
from transkd.models.storage.exporting import FORMATS

CALIBRATION = 8  # drawn scenes that int8's ranges are taken from
INT8 = "-int8"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Logits = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """Cost of one alternative, and how far its logits are from ours."""

    name: str
    median: float
    minimum: float
    maximum: float
    ratio: float
    difference: float  # largest, relative to the largest logit
    same_class: float  # share of pixels whose largest logit is that of the same class
    seconds: list[float]


def inference(args: argparse.Namespace) -> None:
    """Inference from image to logits: ours, transformers, ONNX Runtime and OpenVINO, with the same weights."""
    device, _, found = measure.prepare(args)
    if args.dtype != "float32":
        raise UserError("inference compares float32 and int8 networks; leave --dtype out")
    image = draw_images(args.size, args.batch, seed=0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        alternatives = build(args, image, Path(folder), device)
        image = image.to(device)
        differences = compare(alternatives, image)
        runs = {name: lambda logits=logits: logits(image) for name, logits in alternatives.items()}
        seconds = measure.take_turns(runs, args.rounds, args.calm)
    base = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        rows.append(Row(name, middle, min(taken), max(taken), middle / base, *differences[name], taken))
    found["rows"] = [row._asdict() for row in rows]
    found["runtimes"] = {name: version(name) for name in runtimes(args.against)}
    cells = [
        [
            row.name,
            f"{row.median:.4f}",
            f"{row.minimum:.4f}–{row.maximum:.4f}",
            f"{row.ratio:.2f}",
            f"{row.difference:.0e}",
            f"{100 * row.same_class:.2f}",
        ]
        for row in rows
    ]
    header = ("inference", "median s", "min–max s", "ratio", "difference", "same class %")
    versions = ", ".join(f"{name} {number}" for name, number in found["runtimes"].items())
    about = f"{args.network}, {args.classes} classes, {args.batch}×3×{args.size[0]}×{args.size[1]}"
    measure.report(args, about + (f"; {versions}" if versions else ""), found, measure.as_markdown(header, cells))


def runtimes(against: Sequence[str]) -> list[str]:
    """Packages of the exported alternatives."""
    return sorted({name.removesuffix(INT8) for name in against} - {"transformers"})


def draw_images(size: Sequence[int], batch: int, seed: int) -> Tensor:
    """Drawn road scenes, normalised as the networks of all libraries expect it, [B, 3, H, W]."""
    scenes = [
        draw_scene(np.random.default_rng([seed, index]), *size, CONDITIONS[index % len(CONDITIONS)])[0]
        for index in range(batch)
    ]
    pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).contiguous() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def build(args: argparse.Namespace, image: Tensor, folder: Path, device: torch.device) -> dict[str, Logits]:
    """Build ours and the others by name; the ratios refer to the first."""
    if device.type != "cpu" and runtimes(args.against):
        raise UserError(f"--against {' '.join(runtimes(args.against))} runs on the CPU; use --device cpu")
    network = build_network(args.network, args.classes)
    if not isinstance(network.head, SegformerHead):
        raise UserError(f"--network {args.network} has no SegFormer head, so it has no fused form to export")
    fused = network.fuse()
    found: dict[str, Logits] = {"ours, fused": _ours(fused.to(device))}
    if args.compile:
        found["ours, fused" + measure.COMPILED] = torch.compile(_ours(fused), mode=args.compile)
    if "transformers" in args.against:
        ((name, module, logits),) = build_transformers(network)
        module.to(device)
        found[name] = logits
        if args.compile:
            found[name + measure.COMPILED] = torch.compile(logits, mode=args.compile)
    exported = [name for name in args.against if name != "transformers"]
    if exported:
        files = {"": folder / "student.onnx", INT8: folder / "student_int8.onnx"}
        FORMATS["onnx"].write(fused, {}, files[""])
        if any(name.endswith(INT8) for name in exported):
            quantise(files[""], files[INT8], args.size)
        for name in exported:
            runtime = name.removesuffix(INT8)
            found[name] = OPEN[runtime](files[name.removeprefix(runtime)], tuple(image.shape))
    return found


def _ours(network: Segmenter) -> Logits:
    return lambda image: network(image, needs={"logits"}).logits


def quantise(source: Path, target: Path, size: Sequence[int]) -> None:
    """Quantise convolutions and products to int8, weights per channel, by ranges on drawn scenes."""
    quantization = _library("onnxruntime.quantization", "onnxruntime" + INT8)

    class Scenes(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.images: Iterator[Tensor] = (draw_images(size, 1, seed=1 + index) for index in range(CALIBRATION))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image.numpy()}

    prepared = source.with_suffix(".prepared.onnx")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")
    logging.disable(logging.WARNING)  # it recommends its own preprocessing
    try:
        shapes.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared, target, Scenes(), per_channel=True, op_types_to_quantize=["Conv", "MatMul", "Gemm"]
        )
    finally:
        logging.disable(logging.NOTSET)


def open_onnxruntime(path: Path, shape: tuple[int, ...]) -> Logits:
    """Open a file in ONNX Runtime for images of one shape."""
    library = _library("onnxruntime", "onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    for name, length in zip(("batch", "height", "width"), (shape[0], *shape[2:]), strict=True):
        options.add_free_dimension_override_by_name(name, length)
    session = library.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def open_openvino(path: Path, shape: tuple[int, ...]) -> Logits:
    """Open a file in OpenVINO for images of one shape."""
    library = _library("openvino", "openvino")
    core = library.Core()
    model = core.read_model(path)
    model.reshape(list(shape))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # its own choice is bf16 where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda image: torch.from_numpy(request.infer([image.numpy()], share_inputs=True)[0])


OPEN: dict[str, Callable[[Path, tuple[int, ...]], Logits]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
}
AGAINST = ("transformers", *(runtime + suffix for runtime in OPEN for suffix in ("", INT8)))


def _library(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"--against {option} needs the package {package} ({error}): pip install {package}") from None


def compare(alternatives: Mapping[str, Logits], image: Tensor) -> dict[str, tuple[float, float]]:
    """Differences of logits and shares of equal classes, from the first alternative.

    Raises:
        UserError: float32 logits differ by more than rounding, or some are not finite.
    """
    wanted = next(iter(alternatives.values()))(image)
    found = {}
    for name, logits in alternatives.items():
        got = logits(image)
        difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
        same = (got.argmax(1) == wanted.argmax(1)).float().mean().item()
        limit = float("inf") if name.endswith(INT8) else TOLERANCE
        if not difference <= limit or not got.isfinite().all():
            raise UserError(
                f"{name} does not compute the same network: its logits are {difference:.1e} of the largest logit away "
                f"from ours, expected at most {limit:.0e}; nothing was timed"
            )
        found[name] = (difference, same)
    return found


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, inference)
    parser.add_argument("--network", default="segformer_b0", help="a network with SegFormer's head")
    measure.add_image_options(parser)
    measure.add_against_option(parser, AGAINST)
