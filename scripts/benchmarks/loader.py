"""The subcommand ``loader``: training on PNG files from disk, compared with training on tensors in memory."""

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import measure
from benchmarks.training import Step, add_step_options, build_parts, compose_config, mistakes_as_user_errors
from transkd.data.dataset import Batch
from transkd.data.synthetic import write_road_scenes
from transkd.errors import UserError


class Loop(NamedTuple):
    """One pass over the images; ``step`` is None if they are only loaded."""

    name: str
    batches: Iterable[Any]
    step: Step | None
    device: torch.device
    workers: int = 0

    def __call__(self) -> None:
        """Run the pass."""
        for image, target, *_ in self.batches:
            if self.step is not None:
                self.step(image.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True).long())


def loader(args: argparse.Namespace) -> None:
    """Training on PNG files by the data module, compared with the same steps on tensors in memory."""
    if min(args.workers) < 0:
        raise UserError(f"--workers must be 0 or more; got {min(args.workers)}")
    if args.images < args.batch:
        raise UserError(f"--images {args.images} does not fill a batch of {args.batch}")
    device, dtype, found = measure.prepare(args)
    with tempfile.TemporaryDirectory() as folder:
        height, width = args.frame
        root = args.root or write_road_scenes(Path(folder) / "scenes", args.images, val=0, height=height, width=width)
        cfg = compose_config(
            args, args.distill, f"data={args.data}", f"data.root={root}", f"data.batch_size={args.batch}"
        )
        parts = build_parts(cfg, device, args.optimizer)
        here = build_loader(args, cfg, workers=0)
        held = [(batch.image.to(device), batch.target.to(device)) for batch in here]
        loops = build_loops(args, cfg, held, Step(parts, compiled=args.compile, dtype=dtype))
        found["images_per_core_s"] = images_per_core_second(here)
        eager = Step(parts, dtype=dtype)
        arithmetic = {loop.name: loop._replace(batches=held, step=loop.step and eager) for loop in loops}
        runs = {loop.name: loop for loop in loops}  # not settled: each run has many steps and warms up by itself
        costs = measure.measure_costs(runs, args, arithmetic=arithmetic, settled=False)

    count = len(held) * args.batch
    table, said = describe(costs, loops, count, found)
    shape = "×".join(map(str, held[0][0].shape))
    about = f"{args.teacher} → {args.student}, {args.distill}, data {args.data}, {count} images a round"
    measure.report(args, f"{about}, fed as {shape}", found, table, said)


def describe(
    costs: Sequence[measure.Cost], loops: Sequence[Loop], count: int, found: dict[str, Any]
) -> tuple[str, str]:
    """Format the table and the number of cores needed; adds both to ``found``."""
    rates = [count / cost.median for cost in costs]
    each = [None if loop.step else rate / max(1, loop.workers) for loop, rate in zip(loops, rates, strict=True)]
    found["rows"] = [
        {**cost._asdict(), "images_per_s": rate, "images_per_s_per_worker": one}
        for cost, rate, one in zip(costs, rates, each, strict=True)
    ]
    found["cores_needed"] = rates[0] / found["images_per_core_s"]
    rows = [
        [cost.name, f"{rate:.2f}", "–" if one is None else f"{one:.2f}", *measure.cost_cells(cost)]
        for cost, rate, one in zip(costs, rates, each, strict=True)
    ]
    said = (
        f"One core loads {found['images_per_core_s']:.1f} img/s (processor time), the steps alone process "
        f"{rates[0]:.1f} img/s: {found['cores_needed']:.2f} cores for loading"
    )
    return measure.as_markdown(("loop", "img/s", "img/s per worker", *measure.COSTS), rows), said


def build_loops(args: argparse.Namespace, cfg: DictConfig, held: list[tuple[Tensor, Tensor]], step: Step) -> list[Loop]:
    """Steps on tensors in memory, steps on the loader's batches, and the loader without steps."""
    device = torch.device(args.device)
    loaders = {workers: build_loader(args, cfg, workers) for workers in args.workers}
    return [
        Loop("in memory", held, step, device),
        *(Loop(f"{n} workers", batches, step, device, n) for n, batches in loaders.items()),
        *(Loop(f"loading alone, {n} workers", batches, None, device, n) for n, batches in loaders.items()),
    ]


def build_loader(args: argparse.Namespace, cfg: DictConfig, workers: int) -> DataLoader[Batch]:
    """Build the data module's loader of ``args.images`` training images, repeated ``args.passes`` times."""
    with mistakes_as_user_errors():
        data = instantiate(cfg.data, num_workers=workers)
        dataset = data.dataset("train")
        dataset.pairs = dataset.pairs[: args.images] * args.passes
        return data.train_dataloader()


def images_per_core_second(batches: Iterable[Batch]) -> float:
    """Images loaded per second of processor time, independent of other load on the machine."""
    before = time.process_time()
    images = sum(len(batch.image) for batch in batches)
    return images / (time.process_time() - before)


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, loader, rounds=3)
    add_step_options(parser, several=False)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loader processes, one row each"
    )
    parser.add_argument("--data", default="acdc", help="entry of conf/data in ACDC's layout; determines the transform")
    parser.add_argument("--root", type=Path, help="a folder in ACDC's layout; default: synthetic scenes")
    parser.add_argument("--images", type=int, default=16, help="number of frames to generate, or to use from --root")
    parser.add_argument("--frame", type=int, nargs=2, default=(1080, 1920), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--passes", type=int, default=1, help="passes over the images per round")
