"""The subcommand ``step``: cost of a training step, compared with other implementations of it."""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.training import (
    AGAINST,
    Difference,
    Parts,
    Step,
    add_step_options,
    build_parts,
    build_steps,
    compare,
    compose_config,
    draw_batch,
)
from transkd.errors import UserError


def step(args: argparse.Namespace) -> None:
    """Training step (forward of both networks, criterion, backward), compared with other implementations."""
    check_sweep(args)
    device, dtype, found = measure.prepare(args)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as transkd.train does
    presets = {name: parts_of(args, name, device) for name in args.distill}
    shape = f"{args.batch}×3×{args.size[0]}×{args.size[1]}"
    if args.sizes or args.batches:
        shape = f"{args.batch} images" if args.sizes else f"3×{args.size[0]}×{args.size[1]}"
        tables = sweep(args, *presets.values(), dtype, found)
    else:
        tables = beside(args, presets, found, dtype)
    if args.profile:
        batch = draw_batch(args.size, args.batch, args.classes, device)
        tables += profile(args, Step(presets[args.distill[0]], dtype=dtype), batch, found)
    about = f"{args.teacher} → {args.student}, {', '.join(args.distill)}, {args.classes} classes, {shape}"
    settings = f"cross-entropy at {args.resolution}, {'AdamW' if args.optimizer else 'no optimizer'}"
    measure.report(args, f"{about}, {settings}", found, *tables)


def check_sweep(args: argparse.Namespace) -> None:
    """Raise an error if a sweep is combined with alternatives."""
    if (args.sizes or args.batches) and (args.against or len(args.distill) > 1):
        raise UserError("--sizes and --batches take one --distill and no --against: they measure only ours")


def parts_of(args: argparse.Namespace, distill: str, device: torch.device) -> Parts:
    """Build networks and criterion of one preset."""
    resolution = f"criterion.terms.task.term.resolution={args.resolution}"
    cfg = compose_config(args, distill, f"data.num_classes={args.classes}", resolution)
    return build_parts(cfg, device, args.optimizer)


def beside(
    args: argparse.Namespace, presets: Mapping[str, Parts], found: dict[str, Any], dtype: torch.dtype
) -> list[str]:
    """Measure every preset and alternative, one row each; ratios refer to the first."""
    image, target = draw_batch(args.size, args.batch, args.classes, torch.device(args.device))
    steps: dict[str, Step] = {}
    differences: dict[str, Difference] = {}
    for preset, parts in presets.items():
        alternatives = build_steps(parts, args.against, args.compile, dtype)
        prefix = f"{preset}: " if len(presets) > 1 else ""
        for name, difference in compare(alternatives, image, target).items():
            steps[prefix + name], differences[prefix + name] = alternatives[name], difference
    runs = {name: lambda step=step: step(image, target) for name, step in steps.items()}
    costs = measure.measure_costs(runs, args)
    found["rows"] = [
        {
            **cost._asdict(),
            "loss_difference": differences[cost.name].loss,
            "gradient_difference": differences[cost.name].gradient,
        }
        for cost in costs
    ]
    rows = [
        [cost.name, *measure.cost_cells(cost), *(f"{value:.0e}" for value in differences[cost.name])] for cost in costs
    ]
    return [measure.as_markdown(("step", *measure.COSTS, "loss difference", "gradient difference"), rows)]


# Sweeps


def sweep(args: argparse.Namespace, parts: Parts, dtype: torch.dtype, found: dict[str, Any]) -> list[str]:
    """Measure every size or batch, one row each, and fit the growth of the cost with the number of pixels."""
    device = torch.device(args.device)
    sizes = args.sizes or [tuple(args.size)]
    batches = args.batches or [args.batch]
    inputs = {
        f"{batch}×3×{size[0]}×{size[1]}": draw_batch(size, batch, args.classes, device)
        for size in sizes
        for batch in batches
    }
    ours, eager = Step(parts, compiled=args.compile, dtype=dtype), Step(parts, dtype=dtype)
    runs = {name: lambda pair=pair: ours(*pair) for name, pair in inputs.items()}
    arithmetic = {name: lambda pair=pair: eager(*pair) for name, pair in inputs.items()}
    costs = measure.measure_costs(runs, args, arithmetic=arithmetic)
    pixels = [target.numel() for _, target in inputs.values()]
    found["rows"] = [{**cost._asdict(), "pixels": count} for cost, count in zip(costs, pixels, strict=True)]
    found["exponents"] = {"time": exponent(pixels, [cost.median for cost in costs])}
    peaks = [cost.peak_memory_mb for cost in costs]
    if all(peaks):
        found["exponents"]["memory"] = exponent(pixels, peaks)
    said = ", ".join(f"{what} ~ pixels^{power:.2f}" for what, power in found["exponents"].items())
    table = measure.as_markdown(("step", *measure.COSTS), [[cost.name, *measure.cost_cells(cost)] for cost in costs])
    return [table, said]


def exponent(pixels: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent e of cost ~ pixels^e by least squares of the logarithms; NaN for a single point."""
    xs, ys = [math.log(value) for value in pixels], [math.log(value) for value in costs]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan


# Profiles


def profile(args: argparse.Namespace, ours: Step, batch: tuple[Tensor, Tensor], found: dict[str, Any]) -> list[str]:
    """Profile our step by operator and by part."""
    if args.calm:
        measure.wait_for_calm()
    found["operators"] = measure.operator_shares(lambda: ours(*batch), torch.device(args.device))
    found["parts"] = part_shares(ours, *batch, args.rounds)
    return [
        measure.as_markdown(("operator of ours", "share %"), measure.largest(found["operators"])),
        measure.as_markdown(("part of ours", "share %"), measure.largest(found["parts"], len(found["parts"]))),
    ]


def part_shares(ours: Step, image: Tensor, target: Tensor, rounds: int) -> dict[str, float]:
    """Share of a step's time in each network, each term, the backward pass and the rest."""
    spent: dict[str, float] = defaultdict(float)

    def spend(name: str, since: float) -> float:
        spent[name] += (moment := measure.now()) - since
        return moment

    modules: dict[str, nn.Module] = {"student forward": ours.student}
    if ours.teacher is not None:
        modules["teacher forward"] = ours.teacher
    modules |= {f"term {name}": term for name, term in ours.parts.criterion.terms.items()}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(timed(module, lambda since, name=name: spend(name, since)))
        for _ in range(rounds):
            start = measure.now()
            loss = ours.loss(image, target)
            computed = measure.now()
            ours.backward(loss)
            done = spend("backward", computed)
            ours.update()
            spend("optimizer and zeroing", done)
            spend("step", start)
    total = spent.pop("step")
    shares = {name: seconds / total for name, seconds in spent.items()}
    return {**shares, "rest": max(0.0, 1 - sum(shares.values()))}


@contextmanager
def timed(module: nn.Module, tell: Callable[[float], Any]) -> Iterator[None]:
    """Call ``tell`` after each forward of a module with the time at which it started."""
    starts: list[float] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: starts.append(measure.now())),
        module.register_forward_hook(lambda *_: tell(starts.pop()) and None),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# The command line


def size_of(text: str) -> tuple[int, int]:
    """Parse ``512x1024`` as height and width."""
    try:
        height, width = map(int, text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 512x1024, got {text!r}") from None
    return height, width


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, step)
    add_step_options(parser, several=True)
    measure.add_image_options(parser, batch=2)
    parser.add_argument(
        "--resolution", choices=("logits", "labels"), default="labels", help="resolution of the cross-entropy"
    )
    measure.add_against_option(parser, AGAINST)
    sweeps = parser.add_mutually_exclusive_group()
    sweeps.add_argument("--sizes", type=size_of, nargs="+", metavar="HEIGHTxWIDTH", help="one row each, only ours")
    sweeps.add_argument("--batches", type=int, nargs="+", metavar="BATCH", help="one row each, only ours")
    parser.add_argument("--profile", action="store_true", help="also profile our step by operator and part")
