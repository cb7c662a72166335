"""Shared by all measurements: timing in turns, FLOPs, memory, machine, tables, command-line options."""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import shlex
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from transkd.errors import UserError
from transkd.training.cpu_choices import choose_layers
from transkd.training.memory import keep_freed_memory

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

COMPILED = ", compiled"  # suffix of the name of an alternative that runs under torch.compile

CALM = 0.1  # cores that other processes may use under --calm
STAT = Path("/proc/stat")

Run = Callable[[], Any]


def take_turns(
    runs: Mapping[str, Run], rounds: int, calm: bool = False, warmup: int = 2, settled: bool = True
) -> dict[str, list[float]]:
    """Measure the seconds of every run by name: after a warm-up, each runs once per round, in the given order.

    With ``settled`` each runs twice and the second time counts. In practice a run follows one of its kind, not another
    alternative that left different caches and a differently fragmented heap.

    With ``calm`` a round waits until other processes are idle, and is repeated if they were not until its end. Only
    their processor time decides which rounds are discarded, never our timings.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    while min(map(len, seconds.values())) < rounds:
        if calm:
            wait_for_calm()
        others, start = others_seconds() if calm else 0, time.perf_counter()
        once = {name: _seconds_of(run, settled) for name, run in runs.items()}
        if calm and others_seconds() - others > CALM * (time.perf_counter() - start):
            continue
        for name, taken in once.items():
            seconds[name].append(taken)
    return seconds


def _seconds_of(run: Run, settled: bool) -> float:
    if settled:
        run()
    start = now()
    run()
    return now() - start


def now() -> float:
    """Read the clock after synchronising with the device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def wait_for_calm() -> None:
    """Wait until other processes have used less than ``CALM`` cores for one second."""
    while True:
        before = others_seconds()
        time.sleep(1)
        if others_seconds() - before < CALM:
            return


def others_seconds() -> float:
    """Processor time used by other processes since boot, and on a shared host by other guests (steal time)."""
    try:
        user, nice, system, _, _, *interrupts_and_steal = map(int, STAT.read_text().split()[1:9])
    except OSError:
        raise UserError(f"--calm reads {STAT}, which this system does not have; leave it out") from None
    own = os.times()
    busy = (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system


def count_gflop(run: Run) -> float:
    """Count GFLOPs of matrix products, convolutions and attention; 2 per multiply-add."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flop}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops() / 1e9


def _convolution_backward_flop(
    grad: Sequence[int], image: Sequence[int], weight: Sequence[int], *settings: Any, **_: Any
) -> int:
    """FLOPs of a convolution's gradients, each equal to the forward; PyTorch's formula ignores groups in one."""
    transposed, mask = settings[4], settings[7]
    return sum(map(bool, mask[:2])) * conv_flop_count(image, weight, grad, transposed)


def matmul_gflop_per_s(device: torch.device, dtype: torch.dtype, calm: bool = False, size: int = 2048) -> float:
    """Rate of a product of two square matrices on this machine, as a reference for the other rates."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = take_turns({"matmul": lambda: a @ b}, 5, calm)["matmul"]
    return 2 * size**3 / statistics.median(seconds) / 1e9


def peak_memory_mb(run: Run, device: torch.device) -> float | None:
    """Peak memory of a run in MB beyond what was allocated before it; None if the system does not report it.

    On a CPU it is the growth of the process, the smaller of two runs: heap fragmentation adds to the first.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    growths = [_growth(run), _growth(run)]
    return None if None in growths else min(filter(None, growths), default=0.0)


def _growth(run: Run) -> float | None:
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # return freed memory to the system
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak to the current resident size
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e6


def peak_allocated_mb(run: Run, device: torch.device) -> float:
    """Peak memory by PyTorch's own allocations, also on a CPU: exact for small tensors, excludes other allocations."""
    if device.type == "cuda":
        return peak_memory_mb(run, device) or 0.0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    level = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak / 1e6


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith(field))


class Cost(NamedTuple):
    """Cost of one alternative; times in seconds per run."""

    name: str
    median: float
    minimum: float
    maximum: float
    ratio: float  # median divided by that of the reference
    gflop: float
    gflop_per_s: float
    peak_memory_mb: float | None  # beyond what was allocated before the run
    seconds: list[float]


COSTS = ("median s", "min–max s", "ratio", "peak MB", "GFLOP", "GFLOP/s")


def cost_cells(cost: Cost) -> list[str]:
    """Cells of a row for the columns ``COSTS``."""
    digits = 3 if cost.minimum >= 0.1 else 4
    return [
        f"{cost.median:.{digits}f}",
        f"{cost.minimum:.{digits}f}–{cost.maximum:.{digits}f}",
        f"{cost.ratio:.2f}",
        "–" if cost.peak_memory_mb is None else f"{cost.peak_memory_mb:.0f}",
        f"{cost.gflop:.1f}",
        f"{cost.gflop_per_s:.0f}",
    ]


def measure_costs(
    runs: Mapping[str, Run],
    args: argparse.Namespace,
    reference: str | None = None,
    arithmetic: Mapping[str, Run] | None = None,
    memory: Callable[[Run, torch.device], float | None] = peak_memory_mb,
    settled: bool = True,
) -> list[Cost]:
    """Measure time, FLOPs and memory of every alternative.

    Args:
        runs: the alternatives by name.
        args: the command line's rounds, calm and device.
        reference: alternative that ratios refer to; by default the first.
        arithmetic: runs for counting FLOPs instead of those of the same name. Compiled code hides its FLOPs, so for a
            name that ends with ``COMPILED`` the run without that suffix is counted.
        memory: function that measures peak memory.
        settled: see ``take_turns``.
    """
    seconds = take_turns(runs, args.rounds, args.calm, settled=settled)
    base = statistics.median(seconds[reference or next(iter(runs))])
    counted = {name: runs.get(name.removesuffix(COMPILED), run) for name, run in runs.items()} | dict(arithmetic or {})
    costs = []
    for name, run in runs.items():
        median, gflop = statistics.median(seconds[name]), count_gflop(counted[name])
        times = (median, min(seconds[name]), max(seconds[name]), median / base)
        costs.append(Cost(name, *times, gflop, gflop / median, memory(run, torch.device(args.device)), seconds[name]))
    return costs


def operator_shares(run: Run, device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Share of a run's time by operator, largest first; depth-wise convolutions are listed separately."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(2):  # discard the first: it includes page faults of new memory
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


def largest(shares: Mapping[str, float], count: int = 8) -> list[list[str]]:
    """Rows of the largest shares in percent, and one row for all others."""
    rows = [[name, f"{100 * share:.1f}"] for name, share in list(shares.items())[:count]]
    others = sum(list(shares.values())[count:])
    return [*rows, ["all others", f"{100 * others:.1f}"]] if others else rows


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, versions, and load average before the measurement."""
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
    """Describe the machine in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    cpu = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    return f"{device}{cpu}, load {machine['load']} at the start; Python {machine['python']}, {versions}"


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with padded columns; the first is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (header, rules, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Command line and report


def options(rounds: int = 10) -> argparse.ArgumentParser:
    """Options of every subcommand."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds")
    parser.add_argument("--calm", action="store_true", help="measure only while other processes are idle (Linux)")
    parser.add_argument("--threads", type=int, help="number of CPU threads of PyTorch; default: its own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        metavar="MODE",
        help="also measure ours under torch.compile, such as reduce-overhead (CUDA graphs)",
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="keep freed memory in the process, as transkd.train does (Linux)"
    )
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    return parser


def add_command(
    subparsers: Any, function: Callable[[argparse.Namespace], None], rounds: int = 10
) -> argparse.ArgumentParser:
    """Add a subcommand with the name and description of its function."""
    about = (function.__doc__ or "").splitlines()[0]
    parser: argparse.ArgumentParser = subparsers.add_parser(
        function.__name__, help=about, description=about, parents=[options(rounds)]
    )
    parser.set_defaults(measure=function)
    return parser


def add_image_options(parser: argparse.ArgumentParser, size: tuple[int, int] = (512, 1024), batch: int = 1) -> None:
    """Add options for image size, batch and number of classes."""
    parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--classes", type=int, default=19)


def add_against_option(parser: argparse.ArgumentParser, choices: Iterable[str]) -> None:
    """Add the option that names the alternatives."""
    parser.add_argument(
        "--against",
        nargs="*",
        default=[],
        choices=choices,
        help="implementations to compare with; drawn-out is the reference implementation",
    )


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype, dict[str, Any]]:
    """Set threads and seed; return device, dtype and the description of the machine for the report."""
    if args.rounds < 1:
        raise UserError(f"--rounds must be at least 1; got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory and not keep_freed_memory():
        raise UserError("--keep-memory requires glibc (Linux); leave it out")
    torch.manual_seed(0)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; use --device cpu")
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    if device.type == "cpu":
        choose_layers()  # as the commands do
    found = {"machine": describe_machine(device), "matmul_gflop_per_s": matmul_gflop_per_s(device, dtype, args.calm)}
    return device, dtype, found


def report(args: argparse.Namespace, title: str, found: Mapping[str, Any], *parts: str) -> None:
    """Print the measurement, and write it to the file of ``--json``."""
    rounds = f"{args.rounds} rounds" + (" while other processes were idle" if args.calm else "")
    print(f"{title}, {args.dtype}, {rounds}")
    print(say_machine(found["machine"]))
    print(f"{args.dtype} product of two 2048×2048 matrices: {found['matmul_gflop_per_s']:.0f} GFLOP/s")
    for part in parts:
        print(f"\n{part}")
    if args.json:
        write_json(args.json, args, found)


def write_json(path: Path, args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Write a measurement with its command line."""
    settings = {name: value for name, value in vars(args).items() if name not in ("measure", "json", "command_line")}
    command = shlex.join(["python", "scripts/benchmark.py", *args.command_line])
    head = {"command": command, "date": str(datetime.date.today())}
    text = json.dumps({**head, "settings": settings, **content}, indent=2, default=str)
    path.write_text(text + "\n", encoding="utf-8")
