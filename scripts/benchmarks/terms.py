"""The subcommand ``terms``: cost of value and gradient of each term, compared with the task's cross-entropy."""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks import measure
from transkd.cli import CONF
from transkd.losses import TaskCrossEntropy
from transkd.outputs import SegmentationOutput

TERMS = {path.stem: path for path in sorted((CONF / "term").glob("*.yaml"))}
TASK = "task"

CLASSES, SIZE = 19, (512, 1024)
STUDENT, TEACHER = (32, 64, 160, 256), (64, 128, 320, 512)  # MiT-B0 and MiT-B2
# settings that a term requires for these outputs, see docs/losses.md
SETTINGS = {"isrd": {"ratio": 4}, "teacher_labels": {"threshold": 0.15}}
SAME_WIDTHS = {"wecolora"}

Pair = tuple[SegmentationOutput, SegmentationOutput, Tensor]


class Term(NamedTuple):
    """Term built from a file of conf/term, with outputs to compute it on."""

    name: str
    module: nn.Module
    about: str
    weight: float
    pair: Pair


@functools.cache  # all terms share the outputs
def draw_pair(
    student: tuple[int, ...], teacher: tuple[int, ...], size: tuple[int, ...], batch: int = 1, classes: int = CLASSES
) -> Pair:
    """Random outputs of a student and a teacher, and labels of which a part is ignored."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def output(channels: Sequence[int]) -> SegmentationOutput:
        grids = [(size[0] // 2**i, size[1] // 2**i) for i in range(2, 6)]
        return SegmentationOutput(
            draw(batch, classes, *grids[0]),
            tuple(draw(batch, c, *grid) for c, grid in zip(channels, grids, strict=True)),
            tuple(draw(batch, grid[0] * grid[1], c) for c, grid in zip(channels, grids, strict=True)),
            draw(batch, 3, *size),
        )

    target = torch.randint(0, classes, (batch, *size), generator=generator)
    target[:, : size[0] // 16] = 255
    return output(student), output(teacher), target


def build(path: Path, size: Sequence[int] = SIZE, batch: int = 1, classes: int = CLASSES) -> Term:
    """Build the term of a file, and random outputs for it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    entry = OmegaConf.merge(OmegaConf.load(path), {"term": SETTINGS.get(path.stem, {})})
    student = TEACHER if path.stem in SAME_WIDTHS else STUDENT
    context = {
        "channels": {"student": list(student), "teacher": list(TEACHER)},
        "data": {"num_classes": classes},
        "entry": entry,
    }
    built = instantiate(OmegaConf.create(context).entry)
    pair = draw_pair(student, TEACHER, tuple(size), batch, classes)
    return Term(path.stem, built.term, lines[1].removeprefix("# "), built.weight, pair)


def learning(
    term: nn.Module, pair: Pair, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Return a function that computes value and gradient of a term; bfloat16 uses autocast; gradients are cleared."""
    device = torch.device(device)
    student, teacher = (_to(output, device) for output in pair[:2])
    target = pair[2].to(device)
    for tensor in (student.logits, *student.features, *student.embeddings):
        tensor.requires_grad_()
    term.train().to(device)

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = term(student, teacher, target)
        value.backward()
        for tensor in (student.logits, *student.features, *student.embeddings):
            tensor.grad = None
        term.zero_grad()

    return run


def _to(output: SegmentationOutput, device: torch.device) -> SegmentationOutput:
    logits, features, embeddings, image = output
    moved = [tuple(tensor.to(device) for tensor in tensors) for tensors in (features, embeddings)]
    return SegmentationOutput(logits.to(device), *moved, image.to(device))


def measure_terms(chosen: Mapping[str, Term], args: argparse.Namespace, dtype: torch.dtype) -> list[measure.Cost]:
    """Measure the task's cross-entropy at label size, then every term; ratios refer to the first."""
    device = torch.device(args.device)
    task_pair = draw_pair(STUDENT, TEACHER, tuple(args.size), args.batch, args.classes)
    runs = {TASK: learning(TaskCrossEntropy(), task_pair, device, dtype)}
    runs |= {name: learning(term.module, term.pair, device, dtype) for name, term in chosen.items()}
    if args.compile:
        for name, term in chosen.items():
            compiled = torch.compile(term.module, mode=args.compile)
            runs[name + measure.COMPILED] = learning(compiled, term.pair, device, dtype)
    return measure.measure_costs(runs, args, memory=measure.peak_allocated_mb)


def terms(args: argparse.Namespace) -> None:
    """Value and gradient of each distillation term, compared with the task's cross-entropy at label size."""
    _, dtype, found = measure.prepare(args)
    chosen = {name: build(TERMS[name], args.size, args.batch, args.classes) for name in args.names}
    costs = measure_terms(chosen, args, dtype)
    peak = costs[0].peak_memory_mb
    memory = {cost.name: cost.peak_memory_mb / peak for cost in costs}
    found["rows"] = [{**cost._asdict(), "memory_ratio": memory[cost.name]} for cost in costs]
    rows = [[cost.name, *measure.cost_cells(cost), f"{memory[cost.name]:.2f}"] for cost in costs]
    table = measure.as_markdown(("term", *measure.COSTS, "memory ratio"), rows)
    shape = f"{args.batch}×3×{args.size[0]}×{args.size[1]}"
    measure.report(args, f"terms for MiT-B2 → MiT-B0, {args.classes} classes, {shape}", found, table)


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, terms)
    measure.add_image_options(parser)
    parser.add_argument("--names", nargs="+", default=list(TERMS), choices=TERMS, metavar="TERM", help="default: all")
