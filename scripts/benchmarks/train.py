"""The subcommand ``train``: the loop of transkd.train on frames from disk, compared with its bare training step."""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks import measure
from benchmarks.training import (
    Step,
    add_step_options,
    build_parts,
    compose_config,
    draw_batch,
    mistakes_as_user_errors,
)
from transkd.data import SegmentationDataModule
from transkd.data.synthetic import write_road_scenes
from transkd.errors import UserError
from transkd.training.build import build_optimization, build_trainer
from transkd.training.device import Device
from transkd.training.distiller import Distiller

PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
ON_A_GPU = (
    "on a GPU with 16 cores beside it: python scripts/benchmark.py train --device cuda --dtype bf16 --batch 8 "
    "--size 512 1024 --workers 14 --images 64 --steps 150 --warmup 40 --json train.json"
)


class Feed(NamedTuple):
    """A way to feed the loop."""

    cached: bool
    augment: str

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{'data.cache' if self.cached else 'PNG'}, augmentation on the {self.augment}"


class Clock(L.Callback):
    """Seconds of the steps after a warm-up.

    Args:
        warmup: steps before the clock starts.
        steps: steps that are timed.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.first, self.last = warmup, warmup + steps
        self.times: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Read the clock at the ends of the warm-up and of the last step."""
        if trainer.global_step in (self.first, self.last):
            self.times[trainer.global_step] = measure.now()

    @property
    def seconds(self) -> float:
        """Seconds from the end of the warm-up to the end of the last step."""
        return self.times[self.last] - self.times[self.first]


def train(args: argparse.Namespace) -> None:
    """Loop of transkd.train on frames from disk, loader and logging included, compared with the bare step."""
    check(args)
    device, dtype, found = measure.prepare(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as transkd.train does
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose(args, Path(folder))
        step = Step(build_parts(cfg, device, optimizer=True), compiled=args.compile, dtype=dtype)
        found["rows"] = []
        for row in measure_feeds(args, cfg, step, Path(folder) / "cache"):
            found["rows"].append(row)
            print(f"{row['name']}: {row['images_per_s']:.2f} img/s, {100 * row['share']:.0f} % of the bare step's")
            if args.json:
                measure.write_json(args.json, args, found)

    header = ("loop", "img/s", "bare step, img/s", "share %")
    rows = []
    for row in found["rows"]:
        rates = (f"{row[key]:.2f}" for key in ("images_per_s", "bare_images_per_s"))
        rows.append([row["name"], *rates, f"{100 * row['share']:.0f}"])
    shape = "×".join(map(str, (args.batch, 3, *args.size)))
    frames = f"frames of {args.frame[0]}×{args.frame[1]}" if args.root is None else f"frames of {args.root}"
    about = f"{args.teacher} → {args.student}, {args.distill}, {frames} to {shape}, {args.workers} workers"
    measure.report(args, about, found, measure.as_markdown(header, rows))


def check(args: argparse.Namespace) -> None:
    """Raise an error for numbers that make no measurement."""
    for name, least in (("workers", 0), ("steps", 1), ("warmup", 1), ("images", args.batch)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}; got {getattr(args, name)}")


def compose(args: argparse.Namespace, folder: Path) -> DictConfig:
    """Compose the configuration of a training run; draws the frames if none are given."""
    height, width = args.size
    frames = {"height": args.frame[0], "width": args.frame[1]}
    root = args.root or write_road_scenes(folder / "scenes", args.images, val=1, **frames)
    transforms = "data.train_transform.transforms"
    return compose_config(
        args,
        args.distill,
        "data=acdc_modern",
        f"data.root={root}",
        f"data.batch_size={args.batch}",
        f"data.num_workers={args.workers}",
        f"{transforms}.0.max_size={height}",
        f"{transforms}.2.height={height}",
        f"{transforms}.2.width={width}",
        f"run_dir={folder / 'run'}",
        f"trainer.accelerator={'cpu' if args.device == 'cpu' else 'gpu'}",
        "trainer.devices=1",
        f"trainer.precision={PRECISIONS[args.dtype]}",
        "trainer.enable_progress_bar=false",
        "trainer.limit_val_batches=0",
        "~callbacks.progress",
    )


def measure_feeds(args: argparse.Namespace, cfg: DictConfig, step: Step, cache: Path) -> Iterator[dict[str, Any]]:
    """Measure one row after the other, each beside the bare step just before and after it."""
    batch = draw_batch(args.size, args.batch, cfg.data.num_classes, torch.device(args.device))
    images = args.batch * args.steps

    def bare() -> float:
        for module in step.modules():
            module.to(batch[0].device)  # Lightning leaves them on the CPU
        for _ in range(args.warmup):
            step(*batch)
        start = measure.now()
        for _ in range(args.steps):
            step(*batch)
        return images / (measure.now() - start)

    before = bare()
    for feed in (Feed(cached, augment) for cached in (False, True) for augment in args.augment):
        started = time.perf_counter()
        data = build_data(args, cfg, feed, cache)
        preparing = time.perf_counter() - started
        loops, bares = [], [before]
        for _ in range(args.rounds):
            loops.append(images / run_loop(args, cfg, step, data))
            bares.append(bare())
        before = bares[-1]
        rate, alone = statistics.median(loops), statistics.median(bares)
        yield {
            "name": feed.name,
            "images_per_s": rate,
            "bare_images_per_s": alone,
            "share": rate / alone,
            "preparing_s": preparing,
            "loops": loops,
            "bares": bares,
        }


def build_data(args: argparse.Namespace, cfg: DictConfig, feed: Feed, cache: Path) -> SegmentationDataModule:
    """Build the data module with its cache filled, its training images repeated to last for all steps of an epoch."""
    with mistakes_as_user_errors():
        folder = str(cache) if feed.cached else None
        data: SegmentationDataModule = instantiate(cfg.data, cache=folder, augment=feed.augment)
        data.dataset("val").pairs = data.dataset("val").pairs[:1]
        dataset = data.dataset("train")
        dataset.pairs = dataset.pairs[: args.images]
        data.prepare_data()
    needed = args.batch * (args.warmup + args.steps)
    dataset.pairs = dataset.pairs * -(-needed // len(dataset.pairs))
    return data


def run_loop(args: argparse.Namespace, cfg: DictConfig, step: Step, data: SegmentationDataModule) -> float:
    """Train by transkd's own parts, with its callbacks and logger; return the seconds of the timed steps."""
    clock = Clock(args.warmup, args.steps)
    device = Device.choose("cpu" if args.device == "cpu" else "auto", args.compile or False, cfg.channels_last)
    parts = step.parts
    distiller = Distiller(parts.student, parts.criterion, step.teacher, build_optimization(cfg), device=device)
    callbacks = [clock, *(instantiate(part) for part in cfg.callbacks.values())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: few workers, no validation
        build_trainer(cfg, callbacks=callbacks, max_epochs=-1, max_steps=clock.last).fit(distiller, datamodule=data)
    return clock.seconds


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, train, rounds=1)
    parser.epilog = ON_A_GPU
    add_step_options(parser, several=False)
    measure.add_image_options(parser, (256, 512), batch=2)
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--augment", nargs="+", choices=("cpu", "device"), default=["cpu", "device"])
    parser.add_argument("--root", type=Path, help="a folder in ACDC's layout; default: synthetic scenes")
    parser.add_argument("--images", type=int, default=8, help="number of frames to generate, or to use from --root")
    parser.add_argument("--frame", type=int, nargs=2, default=(1080, 1920), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before; more than the loader prefetches")
