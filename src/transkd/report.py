"""Report of a run: table of scores, pictures, results.json."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import albumentations
import lightning as L
import timm
import torch
from rich.console import Console
from rich.table import Table

import transkd
from transkd.data import SegmentationDataModule
from transkd.files import write_atomically
from transkd.losses import Criterion
from transkd.metrics import PROTOCOLS, Scores
from transkd.models import Network
from transkd.pictures import colourise, draw_curves, save_sheet

__all__ = [
    "count_parameters",
    "describe_scores",
    "print_scores",
    "save_report_pictures",
    "sha256",
    "versions",
    "write_results",
]


def print_scores(networks: Mapping[str, Scores | None], names: tuple[str, ...], protocol: str) -> None:
    """Print mIoU, pixel accuracy and IoU per class of every scored network, in percent."""
    scored = {network: scores for network, scores in networks.items() if scores is not None}
    table = Table(title=f"validation, protocol {protocol} [%]")
    table.add_column("")
    for network in scored:
        table.add_column(network, justify="right")
    table.add_row("mIoU", *[f"{100 * scores.miou:.2f}" for scores in scored.values()], style="bold")
    table.add_row("pixel accuracy", *[f"{100 * s.pixel_accuracy:.2f}" for s in scored.values()], end_section=True)
    for i, name in enumerate(names):
        values = [scores.iou[i].item() for scores in scored.values()]
        table.add_row(name, *["–" if value != value else f"{100 * value:.2f}" for value in values])
    Console().print(table)


def save_report_pictures(
    run_dir: Path, data: SegmentationDataModule, networks: Mapping[str, Network | None], count: int
) -> None:
    """Save ``pictures/predictions.png`` (image, label and each network's prediction) and ``pictures/curves.png``."""
    folder = run_dir / "pictures"
    folder.mkdir(exist_ok=True)
    metrics = run_dir / "metrics.csv"
    if metrics.is_file():
        draw_curves(metrics, folder / "curves.png")
    shown = {name: network.cpu().eval() for name, network in networks.items() if network is not None}
    dataset = data.dataset("val")
    if count < 1:
        return
    rows = []
    for i in range(0, len(dataset), -(-len(dataset) // count)):
        image, target, _ = dataset[i]
        row = [image.permute(1, 2, 0).numpy(), colourise(target.numpy(), data.classes.palette)]
        for network in shown.values():
            ids = network.predict(image[None], target.shape)[0].numpy()
            row.append(colourise(ids, data.classes.palette))
        rows.append(row)
    save_sheet(rows, ["image", "label", *shown], folder / "predictions.png")


def describe_scores(scores: Scores | None, protocol: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Convert scores for JSON: fractions, None for a class that does not occur."""
    if scores is None:
        return {}
    iou = {
        name: None if value.isnan() else round(value.item(), 6) for name, value in zip(names, scores.iou, strict=True)
    }
    return {
        "protocol": protocol,
        "protocol_description": PROTOCOLS[protocol].description,
        "mIoU": round(scores.miou.item(), 6),
        "pixel_accuracy": round(scores.pixel_accuracy.item(), 6),
        "iou": iou,
    }


def write_results(results: dict[str, Any], run_dir: Path) -> None:
    """Write ``results.json``."""
    write_atomically(run_dir / "results.json", (json.dumps(results, indent=2) + "\n").encode())


def count_parameters(student: Network, criterion: Criterion) -> dict[str, int]:
    """Count the parameters of the student and of the modules that are trained with it."""
    return {
        "student": sum(p.numel() for p in student.parameters()),
        "training_modules": sum(p.numel() for p in criterion.parameters()),
    }


def sha256(path: Path) -> str | None:
    """SHA-256 of a file; None for a folder or a hub address."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    modules = {
        "transkd": transkd,
        "torch": torch,
        "lightning": L,
        "timm": timm,
        "albumentations": albumentations,
    }
    return {
        "python": platform.python_version(),
        **{name: module.__version__ for name, module in modules.items()},
    }
