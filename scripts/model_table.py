"""Write docs/models.md: parameters, operations and speed of the networks, compared with other libraries.

python scripts/model_table.py [--size 512 1024] [--rounds 3] [--calm] [--no-latency] [--names NAME …] [--output FILE]

Operations are counted on the meta device; times are measured as in scripts/benchmark.py.
"""

import argparse
import datetime
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks import forward, measure

from transkd.errors import UserError
from transkd.models import SEGMENTERS, SegformerHead
from transkd.models.encoders.mit import VARIANTS

OUTPUT = Path(__file__).parents[1] / "docs" / "models.md"
CLASSES = 19
EXAMPLES = {
    "swin_tiny_patch4_window7_224": "fpn",
    "convnext_tiny": "segformer",
    "resnet50": "fpn",
    "efficientvit_b0": "segformer",
}
"""Examples of timm networks, with the head used here."""

LIBRARIES = {"transformers": "transformers", "smp": "smp, stride 4"}
"""Libraries with SegFormer, and their alternative in benchmark.py that returns logits at stride 4."""


class Counted(NamedTuple):
    """Properties of a network that do not require running it."""

    name: str
    head: str
    parameters: int
    gflop_reference: float | None  # None for other heads than SegFormer's
    gflop: float
    strides: tuple[int, ...]
    embeddings: bool


class Timed(NamedTuple):
    """Seconds of a forward, and the other libraries' times relative to it."""

    seconds: float
    ratios: dict[str, float]


def head_of(name: str) -> str:
    """Return the name of a network's head."""
    return SEGMENTERS[name].head if name in SEGMENTERS else EXAMPLES[name]


@torch.no_grad()
def count(name: str, size: Sequence[int]) -> Counted:
    """Count parameters and floating-point operations, and determine the taps."""
    with torch.device("meta"):
        network = forward.build_network(name, CLASSES, head_of(name))
        image = torch.empty(1, 3, *size)
        output = network(image)
        best = forward.build_ours(network)[-1]
        reference = None
        if isinstance(network.head, SegformerHead):
            unfolded = forward.build_unfolded(network)[0]
            reference = measure.count_gflop(lambda: unfolded.logits(image))
        return Counted(
            name,
            head_of(name),
            sum(parameter.numel() for parameter in network.parameters()),
            reference,
            measure.count_gflop(lambda: best.logits(image)),
            tuple(round(size[0] / feature.shape[2]) for feature in output.features),
            bool(output.embeddings),
        )


def time_forward(name: str, size: Sequence[int], rounds: int, calm: bool) -> Timed:
    """Time our network and the same network in other libraries, in alternating turns."""
    network = forward.build_network(name, CLASSES, head_of(name))
    image = torch.randn(1, 3, *size)
    libraries = LIBRARIES if getattr(SEGMENTERS.get(name), "encoder", None) in VARIANTS else {}
    alternatives = {found.name: found for found in forward.build_alternatives(network, list(libraries))}
    best = forward.best_of_ours(alternatives)
    chosen = [alternatives[key] for key in (best, *libraries.values())]
    runs = {key: lambda logits=logits: logits(image) for key, _, logits in chosen}
    with torch.inference_mode():
        forward.compare_logits(chosen, image)  # the first warm-up
        seconds = measure.take_turns(runs, rounds, calm, warmup=1)
    median = {key: statistics.median(times) for key, times in seconds.items()}
    return Timed(median[best], {library: median[key] / median[best] for library, key in libraries.items()})


def as_cells(counted: Counted, timed: Timed | None) -> list[str]:
    """Format a row of the table."""
    reference = "–" if counted.gflop_reference is None else f"{counted.gflop_reference:.1f}"
    cells = [counted.name, counted.head, f"{counted.parameters / 1e6:.2f}", reference, f"{counted.gflop:.1f}"]
    if timed:
        cells += [f"{timed.seconds:.2f}"]
        cells += [f"{timed.ratios[key]:.1f}×" if key in timed.ratios else "–" for key in LIBRARIES]
    strides = " ".join(map(str, counted.strides))
    return [*cells, strides, "yes" if counted.embeddings else "–"]


PAGE = """\
# Networks

Written on {date} by the command below; do not edit by hand.

```bash
{command}
```

All names in `transkd.models.SEGMENTERS` and some timm networks, with {classes} classes, random weights and one
image of {height}×{width}. Any other timm network with four stages from stride 4 on works too.

{table}

- **parameters**: parameters in training.
- **GFLOP**: 2 per multiply-add, counted by `torch.utils.flop_counter`. *Reference* is the SegFormer head as in its
  reference implementation; the next column is the form used here, with folded linear layers and BatchNorm
  (`Segmenter.fuse()`). Other heads have only one form.
{latency}- **taps**: every network returns its logits and four features, at the **strides** given; **embeddings** states
  whether it also returns patch embeddings, which `pea`, `gl_mixer` and `ea` need.
"""

LATENCY = """\
- **seconds**: one forward, float32, median of {rounds} after two warm-up runs{calm}. SegFormer heads are fused.
- **transformers**, **smp** (segmentation_models.pytorch): time of the same network with the same weights relative to
  ours, measured in the same turns. All return logits at stride 4, which must agree with ours to {tolerance:g} of the
  largest logit.
- **machine**: {machine}.
"""


def write_page(rows: Sequence[Sequence[str]], args: argparse.Namespace, machine: str) -> str:
    """Format the page."""
    times = ["seconds", *LIBRARIES] if args.latency else []
    header = ["network", "head", "parameters M", "GFLOP reference", "GFLOP", *times, "strides", "embeddings"]
    calm = ", while other processes were idle" if args.calm else ""
    latency = LATENCY.format(rounds=args.rounds, calm=calm, tolerance=forward.TOLERANCE, machine=machine)
    return PAGE.format(
        date=datetime.date.today(),
        command=shlex.join(["python", "scripts/model_table.py", *args.command_line]),
        classes=CLASSES,
        height=args.size[0],
        width=args.size[1],
        table=measure.as_markdown(header, rows),
        latency=latency if args.latency else "",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write the page."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [*SEGMENTERS, *EXAMPLES]
    parser.add_argument("--names", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each network")
    parser.add_argument("--calm", action="store_true", help="measure only while other processes are idle (Linux)")
    parser.add_argument(
        "--no-latency", dest="latency", action="store_false", help="do not measure times, which takes minutes"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    args.command_line = arguments

    torch.manual_seed(0)
    machine = measure.say_machine(measure.describe_machine(torch.device("cpu")))
    rows = []
    try:
        for name in args.names:
            print(name, file=sys.stderr)
            timed = time_forward(name, args.size, args.rounds, args.calm) if args.latency else None
            rows.append(as_cells(count(name, args.size), timed))
    except UserError as error:
        sys.exit(f"error: {error}")
    args.output.write_text(write_page(rows, args, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
