"""Measure correctness and speed on a GPU in a few minutes: each part in its own process, results written at once.

python scripts/gpu_check.py --out FOLDER [--parts NAME …] [--limit SECONDS] [--camvid FOLDER --teacher FILE] [--tiny]

``FOLDER/results.jsonl`` gets a line per measurement, ``FOLDER/NAME.log`` the output of a part. A part that hangs is
stopped at its time limit; the others still run. They run in an order by which the first 8 minutes hold what matters
most. ``--tiny``: small sizes, for a trial on a CPU.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OUT: Path
CAMVID: Path | None = None
TEACHER: Path | None = None
TINY = False


def say(part: str, name: str, **values: Any) -> None:
    """Write one measurement to disk at once."""
    line = json.dumps({"part": part, "name": name, **values}, default=str)
    with (OUT / "results.jsonl").open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line, flush=True)


def wait() -> None:
    """Synchronise with the device."""
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], rounds: int = 10, warmup: int = 3) -> dict[str, float]:
    """Median, minimum and maximum of single runs, in milliseconds."""
    for _ in range(warmup):
        run()
    taken = []
    for _ in range(rounds if CUDA else 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(1e3 * (time.perf_counter() - start))
    return {"ms": round(statistics.median(taken), 3), "min": round(min(taken), 3), "max": round(max(taken), 3)}


def throughput(run: Callable[[], Any], rounds: int = 20) -> float:
    """Milliseconds per run in a sequence of runs without synchronisation between them."""
    wait()
    start = time.perf_counter()
    rounds = rounds if CUDA else 1
    for _ in range(rounds):
        run()
    wait()
    return round(1e3 * (time.perf_counter() - start) / rounds, 3)


def peak_mb(run: Callable[[], Any]) -> float | None:
    """Peak memory of a run in MB beyond what was allocated before it."""
    if not CUDA:
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def forget() -> int:
    """Reset the peak; return the allocated bytes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference, by norms."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def kernels(run: Callable[[], Any], largest: int = 22) -> dict[str, Any]:
    """Busy time of the device in one run, number of launches, and the longest kernels."""
    if not CUDA:
        return {}
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        wait()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent: dict[str, list[float]] = {}
    for event in events:
        spent.setdefault(event.name[:90], []).append(event.device_time)
    rows = sorted(((sum(v) / 1e3, len(v), k) for k, v in spent.items()), reverse=True)
    return {
        "busy_ms": round(sum(row[0] for row in rows), 2),
        "launches": len(events),
        "kernels": [[round(ms, 3), count, name] for ms, count, name in rows[:largest]],
    }


# Parts


def part_machine() -> None:
    """GPU, versions, memory bandwidth and matrix-product rate."""
    import platform

    say("machine", "versions", torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count())
    if CUDA:
        say("machine", "card", name=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability())
        a = torch.randn(2**28, device=DEVICE)
        b = torch.empty_like(a)
        ms = seconds_of(lambda: b.copy_(a))["ms"]
        say("machine", "copy", tb_per_s=round(2 * a.nbytes / ms / 1e9, 2))
        x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        say("machine", "bf16 product", tflop_per_s=round(2 * 8192**3 / seconds_of(lambda: x @ y)["ms"] / 1e9))
    for package in ("gcc", "g++", "cc"):
        found = subprocess.run(["which", package], capture_output=True, text=True, check=False).stdout.strip()
        say("machine", package, path=found)


def part_upsampling() -> None:
    """Gradient of the head's upsampling, by PyTorch and by matrix products; and the forward."""
    from transkd.layers.upsampling import resize_gradient, upsampled

    torch.set_float32_matmul_precision("high")
    batch, channels, large = (1, 8, (32, 64)) if TINY else (8, 256, (128, 256))
    for dtype, scale in itertools.product((torch.bfloat16, torch.float32), (2, 8)):
        small = (large[0] // scale, large[1] // scale)
        for layout in (torch.channels_last, torch.contiguous_format):
            maps = torch.randn(batch, channels, *small, device=DEVICE).to(dtype, memory_format=layout)
            upstream = torch.randn(batch, channels, *large, device=DEVICE).to(dtype, memory_format=layout)
            size = (list(large), [batch, channels, *small])

            def theirs(upstream: torch.Tensor = upstream, size: Any = size) -> torch.Tensor:
                return torch.ops.aten.upsample_bilinear2d_backward(upstream, *size, False, None, None)

            def ours(upstream: torch.Tensor = upstream, small: Any = small) -> torch.Tensor:
                return resize_gradient(upstream, small)

            def forward(maps: torch.Tensor = maps) -> torch.Tensor:
                return upsampled(maps, large)

            exact = torch.ops.aten.upsample_bilinear2d_backward(upstream.double(), *size, False, None, None)
            say(
                "upsampling",
                f"{dtype} ×{scale} {layout}",
                theirs=seconds_of(theirs)["ms"],
                products=seconds_of(ours)["ms"],
                forward=seconds_of(forward)["ms"],
                error=relative(ours(), exact),
                their_error=relative(theirs(), exact),
            )


def part_cross_entropy() -> None:
    """Cross-entropy at the labels' size: ours eager and compiled, compared with plain PyTorch."""
    from transkd.losses import TaskCrossEntropy
    from transkd.outputs import SegmentationOutput

    torch.set_float32_matmul_precision("high")

    def plain(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wide = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(wide, target, ignore_index=255)

    def ours(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return TaskCrossEntropy()(SegmentationOutput(logits, (), (), logits), None, target)

    compiled = torch.compile(ours, dynamic=False)
    cases = [(1, (64, 128))] if TINY else [(8, (512, 1024)), (8, (1024, 2048)), (2, (512, 1024))]
    for batch, size in cases:
        logits = 3 * torch.randn(batch, 19, size[0] // 4, size[1] // 4, device=DEVICE)
        logits = logits.to(torch.bfloat16).requires_grad_()
        target = torch.randint(0, 19, (batch, *size), device=DEVICE)
        target[torch.rand(target.shape, device=DEVICE) < 0.1] = 255

        def both(way: Any, logits: torch.Tensor = logits, target: torch.Tensor = target) -> Any:
            value = way(logits, target)
            return value.detach(), torch.autograd.grad(value, logits)[0]

        expected = both(plain)
        for name, way in (("plain", plain), ("ours", ours), ("ours, compiled", compiled)):
            start = time.perf_counter()
            found = both(way)
            wait()
            first = round(time.perf_counter() - start, 2)
            say(
                "cross-entropy",
                f"{name} {batch}×{size[0]}×{size[1]}",
                first_s=first,
                **seconds_of(lambda way=way: both(way)),
                peak_mb=peak_mb(lambda way=way: both(way)),
                loss=relative(found[0], expected[0]),
                gradient=relative(found[1], expected[1]),
                **kernels(lambda way=way: both(way), 8),
            )


def build(batch: int, distill: str = "transkd_base") -> Any:
    """Build networks, criterion and optimizer of the default training, and one batch."""
    from benchmarks import training

    args = argparse.Namespace(student="segformer_b0", teacher="segformer_b0" if TINY else "segformer_b2")
    cfg = training.compose_config(args, distill, "data.num_classes=19")
    parts = training.build_parts(cfg, DEVICE, optimizer=True)
    size = (64, 128) if TINY else (512, 1024)
    return training, parts, training.draw_batch(size, batch, 19, DEVICE)


def part_step(part: str, batch: int, dtype: torch.dtype, ways: list[str], mode: str = "reduce-overhead") -> None:
    """Measure several implementations of a training step, each compared with our eager one."""
    torch.set_float32_matmul_precision("high")
    training, parts, pair = build(batch)
    eager = training.Step(parts, dtype=dtype)

    def outcome(step: Any) -> Any:
        with step.repeatable(torch.float32):
            return step.gradients(*pair, autocast=True)

    for way in ways:
        wait()
        held = forget() if CUDA else 0
        eager.teacher.cast_once = way != "eager, the teacher's weights cast at every step"
        expected = outcome(eager)
        start = time.perf_counter()
        if way.startswith("eager"):
            step = eager
        elif way == "reference":
            step = training.Step(parts, training.AGAINST["drawn-out"], dtype=dtype)
        else:
            step = training.Step(parts, compiled=mode if CUDA else "default", dtype=dtype, whole=way == "whole")
        found = outcome(step)
        wait()
        first = round(time.perf_counter() - start, 2)
        difference = training.difference(found, expected)
        later = []
        for _ in range(4):
            start = time.perf_counter()
            step(*pair)
            wait()
            later.append(round(time.perf_counter() - start, 3))
        grown = {"start_peak_mb": (torch.cuda.max_memory_allocated() - held) / 1e6} if CUDA else {}
        say(part, way, first_s=first, next_s=later, **difference._asdict(), **grown)
        measured = {**seconds_of(lambda step=step: step(*pair)), "stream_ms": throughput(lambda step=step: step(*pair))}
        say(part, way, **measured, peak_mb=peak_mb(lambda step=step: step(*pair)))
        say(part, way, **kernels(lambda step=step: step(*pair)))
        if way in ("regions", "whole"):
            from torch._dynamo.utils import compile_times

            names, times = compile_times(repr="csv", aggregate=True)
            say(part, way, compile_times=dict(zip(names, times, strict=False)))
        del step, found, expected


def part_benchmark(part: str, arguments: list[str]) -> None:
    """A subcommand of ``benchmark.py``, whose rows go to ``FOLDER/PART.json``."""
    import benchmark

    device = ["--device", "cuda"] if CUDA else ["--rounds", "1"] if "--rounds" in arguments else []
    benchmark.main([*arguments, *device, "--json", str(OUT / f"{part}.json")])


def part_runs() -> None:
    """Scores of whole runs, eager, compiled, killed and resumed, all at once: their minutes say nothing."""
    from benchmarks.compiled_runs import compare_runs

    mode, epochs = ("reduce-overhead", 20) if CUDA else ("false", 4)
    compare_runs((OUT / "runs").absolute(), CAMVID, TEACHER, epochs, mode, functools.partial(say, "runs"))


FORWARD = ["forward", "--against", "transformers", "--dtype", "bf16", "--compile", "reduce-overhead", "--rounds", "9"]
TRAIN = ["train", "--dtype", "bf16", "--batch", "8", "--size", "512", "1024", "--workers", "14", "--images", "64"]
TRAIN += ["--steps", "100", "--warmup", "40"]
SMALL = ["--size", "64", "128"]

BF16, F32 = torch.bfloat16, torch.float32
PARTS: dict[str, tuple[int, Callable[[], None]]] = {
    "machine": (40, part_machine),
    "step8": (200, lambda: part_step("step8", 8, BF16, ["eager", "reference", "whole"])),
    "train": (130, lambda: part_benchmark("train", ["train", *SMALL] if TINY else TRAIN)),
    "runs": (260, part_runs),
    "step2": (190, lambda: part_step("step2", 2, BF16, ["eager", "reference", "whole"])),
    "step8-f32": (200, lambda: part_step("step8-f32", 8, F32, ["eager", "reference", "whole"])),
    "step8-warm": (60, lambda: part_step("step8-warm", 8, BF16, ["whole"])),
    "step8-regions": (170, lambda: part_step("step8-regions", 8, BF16, ["regions"])),
    "forward": (90, lambda: part_benchmark("forward", FORWARD + (SMALL if TINY else []))),
    "cross-entropy": (70, part_cross_entropy),
    "upsampling": (40, part_upsampling),
    "cast": (40, lambda: part_step("cast", 8, BF16, ["eager", "eager, the teacher's weights cast at every step"])),
}


def run_all(names: list[str], limit: float, tiny: bool) -> None:
    """Run each part in its own process, until the time limit."""
    end = time.monotonic() + limit
    for name in names:
        left = end - time.monotonic()
        if left < 10:
            say("end", name, skipped="no time left")
            continue
        allowed = min(PARTS[name][0] * (10 if tiny else 1), left)
        command = [sys.executable, __file__, "--out", str(OUT), "--part", name, *(["--tiny"] if tiny else [])]
        command += [*(["--camvid", str(CAMVID)] if CAMVID else []), *(["--teacher", str(TEACHER)] if TEACHER else [])]
        start = time.monotonic()
        with (OUT / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: Any = process.wait(allowed)
            except subprocess.TimeoutExpired:
                code = f"stopped after {allowed:.0f} s"
            with contextlib.suppress(ProcessLookupError):  # including the compiler's workers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        say("end", name, code=code, seconds=round(time.monotonic() - start, 1))
        if code != 0:
            print("".join((OUT / f"{name}.log").read_text(errors="replace").splitlines(True)[-25:]), flush=True)


def main() -> None:
    """Parse the command line and run the parts."""
    global OUT, CAMVID, TEACHER, TINY
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help="run only this part, in this process")
    parser.add_argument("--camvid", type=Path, help="CamVid for the part runs; without it scenes are drawn")
    parser.add_argument(
        "--teacher", type=Path, help="weights of a SegFormer-B1 for the part runs; without it there is none"
    )
    parser.add_argument("--limit", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a trial on a CPU")
    args = parser.parse_args()
    OUT, CAMVID, TEACHER, TINY = args.out, args.camvid, args.teacher, args.tiny
    OUT.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE))
    if args.part:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"/tmp/transkd_gpu_check/{args.part.removesuffix('-warm')}")
        if not CUDA:  # generating code takes minutes on a CPU
            plain = torch.compile
            torch.compile = lambda *given, mode=None, **others: plain(*given, **others, backend="aot_eager")
        PARTS[args.part][1]()
    else:
        run_all(args.parts, args.limit, args.tiny)


if __name__ == "__main__":
    main()
