"""Measure this package beside others that do the same work: one process, the same weights, one after the other in turn.

python scripts/benchmark.py forward --network segformer_b0 --size 512 1024 --against transformers smp drawn-out

Every measurement takes the alternatives in turn (A B C A B C …) after warming each up, so that whatever else the
machine does meets all of them, and compares medians. ``--json FILE`` keeps every single time: the file holds
``command``, ``date``, ``settings``, ``machine``, ``matmul_gflop_per_s`` and ``rows``, one for each alternative with the
fields of ``Row``; under ``--profile`` also ``operators``.
"""

import argparse
import ctypes
import datetime
import importlib
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from transkd.errors import UserError
from transkd.models import SEGMENTERS, SegformerHead, Segmenter, create_segmenter
from transkd.models.formats import SMP, rename_to_huggingface
from transkd.models.mit import VARIANTS

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-3  # between the alternatives' logits in float32, relative to the largest logit

CALM = 0.1  # cores that other processes may take under --calm
STAT = Path("/proc/stat")

Run = Callable[[], Any]

# What every measurement needs: turns, arithmetic, memory, the machine.


def take_turns(runs: Mapping[str, Run], rounds: int, calm: bool = False, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every run, by name: after the warm-up each runs once a round, in the order given.

    With ``calm`` a round waits until other processes leave the machine alone, and is repeated where they did not until
    its end. What is thrown away is decided by their processor time, never by ours.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    while min(map(len, seconds.values())) < rounds:
        if calm:
            wait_for_calm()
        others, start = others_seconds() if calm else 0, time.perf_counter()
        once = {name: _seconds_of(run) for name, run in runs.items()}
        if calm and others_seconds() - others > CALM * (time.perf_counter() - start):
            continue
        for name, taken in once.items():
            seconds[name].append(taken)
    return seconds


def _seconds_of(run: Run) -> float:
    _wait_for_device()
    start = time.perf_counter()
    run()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def wait_for_calm() -> None:
    """Return once other processes have taken less than ``CALM`` of a core for a second."""
    while True:
        before = others_seconds()
        time.sleep(1)
        if others_seconds() - before < CALM:
            return


def others_seconds() -> float:
    """Processor time since the start that this process did not get: other processes' and, on a shared host, theirs."""
    try:
        user, nice, system, _, _, *interrupts_and_steal = map(int, STAT.read_text().split()[1:9])
    except OSError:
        raise UserError(f"--calm reads {STAT}, which this system does not have; leave it out") from None
    own = os.times()
    busy = (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system


def count_gflop(run: Run) -> float:
    """Billions of floating-point operations in matrix products, convolutions and attention; 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def matmul_gflop_per_s(device: torch.device, dtype: torch.dtype, calm: bool = False, size: int = 2048) -> float:
    """What the machine reaches in a plain product of two square matrices: a mark to read the other rates by."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = take_turns({"matmul": lambda: a @ b}, 5, calm)["matmul"]
    return 2 * size**3 / statistics.median(seconds) / 1e9


def peak_memory_mb(run: Run, device: torch.device) -> float | None:
    """Megabytes that a run takes at its peak on top of what is held before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
    except OSError:
        return None
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # what earlier runs freed is not resident any more
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e6


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith(field))


def operator_shares(run: Run, device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Share of a run's time by operator, largest first; depth-wise convolutions stand apart from the others."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(rounds):
            run()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        shapes = event.input_shapes
        weight = shapes[1] if "conv" in event.key and len(shapes) > 1 else []
        name = event.key.removeprefix("aten::") + (" (depth-wise)" if len(weight) == 4 and weight[1] == 1 else "")
        spent[name] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(spent.values())
    return {name: time / total for name, time in sorted(spent.items(), key=lambda item: -item[1]) if time > 0}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, versions, and how busy the machine was before the measurement."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    versions = {}
    for package in ("torch", "timm", "transformers", "segmentation_models_pytorch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def say_machine(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    cpu = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    return f"{device}{cpu}, load {machine['load']} at the start; Python {machine['python']}, {versions}"


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text too; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (header, rules, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Keep a measurement with the command line that made it."""
    settings = {name: value for name, value in vars(args).items() if name not in ("measure", "json", "command_line")}
    command = shlex.join(["python", "scripts/benchmark.py", *args.command_line])
    head = {"command": command, "date": str(datetime.date.today())}
    path.write_text(json.dumps({**head, "settings": settings, **content}, indent=2) + "\n", encoding="utf-8")


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Threads, seed, device and number format of a measurement."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; take --device cpu")
    return torch.device(args.device), DTYPES[args.dtype]


# The alternatives of a forward.


class Alternative(NamedTuple):
    """One way to get the logits of the same network from a normalised image."""

    name: str
    module: nn.Module
    logits: Callable[[Tensor], Tensor]


def build_network(name: str, classes: int, head: str | None = None) -> Segmenter:
    """One of our networks at random weights, in eval, for images that are normalised already.

    The other libraries want such images, so ours is given the mean 0 and the deviation 1; it still subtracts and
    divides. Biases, norms and statistics of the head do not stay at their 0 and 1: a misplaced one would go unseen.
    """
    network = create_segmenter(name, classes, head=head, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        for module in network.head.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network


def build_ours(network: Segmenter) -> list[Alternative]:
    """The network as it trains, and fused for inference where its head can be."""
    found = [Alternative("ours", network, lambda image: _logits(network, image))]
    if isinstance(network.head, SegformerHead):
        fused = network.fuse()
        found.append(Alternative("fused", fused, lambda image: _logits(fused, image)))
    return found


def best_of_ours(names: Container[str]) -> str:
    """The one that the others are compared with."""
    return "fused" if "fused" in names else "ours"


def _logits(network: Segmenter, image: Tensor) -> Tensor:
    return network(image, needs={"logits"}).logits


def build_drawn_out(network: Segmenter) -> list[Alternative]:
    """Our encoder and the SegFormer head as its paper draws it."""
    if not isinstance(network.head, SegformerHead):
        raise UserError(f"--against drawn-out: {network.name} has no SegFormer head")
    head = network.head

    def logits(image: Tensor) -> Tensor:
        features, _ = network.encoder.forward_stages(network.normalise(image))
        return draw_out(head, features)

    return [Alternative("drawn-out", network, logits)]


def draw_out(head: SegformerHead, features: Sequence[Tensor]) -> Tensor:
    """SegFormer's decode head computed step by step: linear, upsample, concatenate deepest first, fuse, classify."""
    maps = []
    for name, feature in zip(head.linears, features, strict=True):
        tokens = head.get_submodule(name).proj(feature.flatten(2).transpose(1, 2))
        drawn = tokens.transpose(1, 2).unflatten(2, feature.shape[-2:])
        maps.append(F.interpolate(drawn, size=features[0].shape[-2:], mode="bilinear", align_corners=False))
    fused = head.linear_fuse.conv(torch.cat(maps[::-1], dim=1))
    return head.linear_pred(head.dropout(F.relu(head.linear_fuse.bn(fused))))


def build_transformers(network: Segmenter) -> list[Alternative]:
    """The same SegFormer in Hugging Face's transformers."""
    library = _library("transformers", "transformers")
    encoder = _segformer_encoder(network, "transformers")
    config = library.SegformerConfig(
        hidden_sizes=list(network.channels),
        depths=list(VARIANTS[encoder]["depths"]),
        decoder_hidden_size=_width(network),
        num_labels=network.num_classes,
    )
    library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tensors = {name: tensor.contiguous() for name, tensor in rename_to_huggingface(network.state_dict()).items()}
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        model = library.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    return [Alternative("transformers", model, lambda image: model(image).logits)]


def build_smp(network: Segmenter) -> list[Alternative]:
    """The same SegFormer in segmentation_models.pytorch, as it is and without its last upsampling."""
    library = _library("segmentation_models_pytorch", "smp")
    encoder = _segformer_encoder(network, "smp")
    model = library.Segformer(
        encoder, encoder_weights=None, decoder_segmentation_channels=_width(network), classes=network.num_classes
    ).eval()
    prefixes = {ours: theirs for theirs, ours in SMP.items()}
    renamed = {}
    for name, tensor in network.state_dict().items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    model.load_state_dict(renamed)
    return [
        Alternative("smp", model, model),
        Alternative(
            "smp, stride 4", model, lambda image: model.segmentation_head[0](model.decoder(model.encoder(image)))
        ),
    ]


def _library(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--against {option} needs the package {module} ({error}): pip install {module}") from None


def _segformer_encoder(network: Segmenter, option: str) -> str:
    recipe = SEGMENTERS.get(network.name)
    if recipe is None or recipe.encoder not in VARIANTS or not isinstance(network.head, SegformerHead):
        raise UserError(f"--against {option}: that library has no {network.name}; it has segformer_b0 to segformer_b5")
    return recipe.encoder


def _width(network: Segmenter) -> int:
    return network.head.linear_pred.in_channels


AGAINST: dict[str, Callable[[Segmenter], list[Alternative]]] = {
    "drawn-out": build_drawn_out,
    "transformers": build_transformers,
    "smp": build_smp,
}


def build_alternatives(network: Segmenter, against: Sequence[str]) -> list[Alternative]:
    """Ours first, then the others, all with the network's own weights."""
    return [*build_ours(network), *(alternative for name in against for alternative in AGAINST[name](network))]


def compare_logits(alternatives: Sequence[Alternative], image: Tensor) -> dict[str, float]:
    """Largest distance of each from the first, relative to the largest logit.

    Raises:
        UserError: one is further away than rounding explains, so that its time would mean nothing.
    """
    reference = alternatives[0].logits(image)
    distances = {}
    for name, _, logits in alternatives:
        got = logits(image)
        wanted = reference
        if got.shape != wanted.shape:  # smp brings its logits to the image's size, corner to corner
            wanted = F.interpolate(reference, size=got.shape[-2:], mode="bilinear", align_corners=True)
        distances[name] = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not distances[name] <= TOLERANCE:
            raise UserError(
                f"{name} does not compute the same network: its logits are {distances[name]:.1e} of the largest logit "
                f"away from ours, expected at most {TOLERANCE:.0e}; nothing was timed"
            )
    return distances


# forward


class Row(NamedTuple):
    """What is reported of one alternative; times in seconds of one forward of the whole batch."""

    name: str
    median: float
    minimum: float
    maximum: float
    ratio: float  # its median over that of our fused network (of ours, where there is no fused one)
    gflop: float  # of the whole batch
    gflop_per_s: float
    parameters: int
    peak_memory_mb: float | None  # beyond weights and image
    difference: float  # of the logits from ours in float32, relative to the largest logit
    seconds: list[float]


def make_rows(
    alternatives: Sequence[Alternative],
    image: Tensor,
    rounds: int,
    calm: bool,
    device: torch.device,
    distances: Mapping[str, float],
) -> list[Row]:
    """Time, arithmetic and memory of every alternative."""
    runs = {name: lambda logits=logits: logits(image) for name, _, logits in alternatives}
    seconds = take_turns(runs, rounds, calm)
    ours = statistics.median(seconds[best_of_ours(seconds)])
    rows = []
    for name, module, _ in alternatives:
        median, gflop = statistics.median(seconds[name]), count_gflop(runs[name])
        rows.append(
            Row(
                name,
                median,
                min(seconds[name]),
                max(seconds[name]),
                median / ours,
                gflop,
                gflop / median,
                sum(parameter.numel() for parameter in module.parameters()),
                peak_memory_mb(runs[name], device),
                distances[name],
                seconds[name],
            )
        )
    return rows


HEADER = ("forward", "median s", "min–max s", "ratio", "GFLOP", "GFLOP/s", "parameters M", "peak MB", "difference")


def as_text(row: Row) -> list[str]:
    """The cells of a row."""
    return [
        row.name,
        f"{row.median:.3f}",
        f"{row.minimum:.3f}–{row.maximum:.3f}",
        f"{row.ratio:.2f}",
        f"{row.gflop:.1f}",
        f"{row.gflop_per_s:.0f}",
        f"{row.parameters / 1e6:.2f}",
        "–" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
        f"{row.difference:.0e}",
    ]


def forward(args: argparse.Namespace) -> None:
    """Image to logits, beside other ways to compute the same logits."""
    device, dtype = prepare(args)
    machine = describe_machine(device)
    alternatives = build_alternatives(build_network(args.network, args.classes), args.against)
    image = torch.randn(args.batch, 3, *args.size)
    found: dict[str, Any] = {"machine": machine}
    with torch.inference_mode():
        distances = compare_logits(alternatives, image)
        for alternative in alternatives:
            alternative.module.to(device, dtype)
        image = image.to(device, dtype)
        found["matmul_gflop_per_s"] = matmul_gflop_per_s(device, dtype, args.calm)
        rows = make_rows(alternatives, image, args.rounds, args.calm, device, distances)
        found["rows"] = [row._asdict() for row in rows]
        if args.profile:
            if args.calm:
                wait_for_calm()
            best = next(alternative for alternative in alternatives if alternative.name == best_of_ours(distances))
            found["operators"] = operator_shares(lambda: best.logits(image), device)

    shape = "×".join(map(str, image.shape))
    rounds = f"{args.rounds} rounds" + (" while nothing else ran" if args.calm else "")
    print(f"{args.network}, {args.classes} classes, {shape}, {args.dtype}, {rounds}")
    print(say_machine(machine))
    print(f"{args.dtype} product of two 2048×2048 matrices: {found['matmul_gflop_per_s']:.0f} GFLOP/s\n")
    print(as_markdown(HEADER, [as_text(row) for row in rows]))
    if args.profile:
        print(f"\n{as_markdown((f'operator of {best.name}', 'share %'), _largest(found['operators']))}")
    if args.json:
        write_json(args.json, args, found)


def _largest(shares: Mapping[str, float], count: int = 8) -> list[list[str]]:
    rows = [[name, f"{100 * share:.1f}"] for name, share in list(shares.items())[:count]]
    return [*rows, ["all others", f"{100 * sum(list(shares.values())[count:]):.1f}"]]


def add_forward(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """The subcommand's own arguments."""
    parser = subparsers.add_parser("forward", help=forward.__doc__, description=forward.__doc__, parents=[common])
    parser.add_argument("--network", default="segformer_b0", help="any name that create_segmenter takes")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--against", nargs="*", default=[], choices=AGAINST, help="beside ours and ours fused")
    parser.add_argument("--profile", action="store_true", help="also show where the fused forward spends its time")
    parser.set_defaults(measure=forward)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, report."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=int, default=10, help="timed turns of each alternative")
    common.add_argument("--calm", action="store_true", help="measure only while other processes are idle (Linux)")
    common.add_argument("--threads", type=int, help="of PyTorch on the CPU; default: its own choice")
    common.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    common.add_argument("--dtype", choices=DTYPES, default="float32")
    common.add_argument("--json", type=Path, help="write everything there too")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    subparsers = parser.add_subparsers(required=True, metavar="WHAT")
    add_forward(subparsers, common)
    args = parser.parse_args(arguments)
    args.command_line = arguments
    try:
        args.measure(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
