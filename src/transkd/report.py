"""Report of a run: table of scores, pictures, results.json."""

import copy
import json
import logging
import math
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
from torch import Tensor

import transkd
from transkd.data import SegmentationDataModule
from transkd.files import sha256, write_atomically
from transkd.losses import Criterion
from transkd.metrics import PROTOCOLS, Scores
from transkd.models import Network, add_lora
from transkd.pictures import colourise, draw_curves, legend_of, save_sheet
from transkd.settings import LoraSettings
from transkd.training.build import Parts

__all__ = [
    "count_parameters",
    "describe_scores",
    "log_sizes",
    "print_scores",
    "report_run",
    "report_scores",
    "save_report_pictures",
    "versions",
    "write_results",
]

log = logging.getLogger(__name__)


def log_sizes(student: Network, criterion: Criterion, lora: LoraSettings) -> None:
    """Log the parameters of the student, of the training modules and, with low-rank terms, the trained ones."""
    count = count_parameters(student, criterion)
    log.info(
        "student: %.2f M parameters; with the training modules %.2f M, which are not deployed",
        count["student"] / 1e6,
        sum(count.values()) / 1e6,
    )
    if lora.rank is None:
        return
    adapted = copy.deepcopy(student)  # a copy: the student's weights are loaded later; this checks the settings early
    add_lora(adapted, lora.rank, lora.train, lora.keep_drop_path)
    log.info(
        "student: %.2f M parameters are trained: low-rank terms, which are merged into the weights, and %s",
        sum(p.numel() for p in adapted.parameters() if p.requires_grad) / 1e6,
        ", ".join(lora.train) or "nothing else",
    )


def report_run(
    run_dir: Path,
    parts: Parts,
    scores: Mapping[str, Scores | None],
    facts: dict[str, Any],
    notes: dict[str, Any],
    pictures: int,
) -> None:
    """Write ``results.json`` and the pictures of a training run, and print the table of scores.

    Args:
        run_dir: the run's folder, with student.safetensors and metrics.csv.
        parts: the run's data, networks and criterion.
        scores: scores of "teacher" and "student"; None if not scored.
        facts: additional entries of ``results.json``.
        notes: notes in the student's weights file.
        pictures: number of validation images to draw.
    """
    protocol, names = parts.data.protocol, parts.data.classes.names
    about_teacher = {key: value for key, value in notes.items() if key.startswith("teacher_")}
    results = {
        **describe_scores(scores["student"], protocol, names),
        "teacher": about_teacher | describe_scores(scores["teacher"], protocol, names),
        "terms": parts.criterion.weights,
        **facts,
        "parameters": count_parameters(parts.student, parts.criterion),
        "sha256": {"student.safetensors": sha256(run_dir / "student.safetensors")},
        "versions": versions(),
    }
    write_results(results, run_dir)
    save_report_pictures(run_dir, parts.data, {"teacher": parts.teacher, "student": parts.student}, pictures)
    print_scores(scores, names, protocol)


def print_scores(networks: Mapping[str, Scores | None], names: tuple[str, ...], protocol: str) -> None:
    """Print mIoU, also of each condition, pixel accuracy and IoU per class of every scored network, in percent."""
    scored = {network: scores for network, scores in networks.items() if scores is not None}
    table = Table(title=f"validation, protocol {protocol} [%]")
    table.add_column("")
    for network in scored:
        table.add_column(network, justify="right")
    table.add_row("mIoU", *[f"{100 * scores.miou:.2f}" for scores in scored.values()], style="bold")
    table.add_row("pixel accuracy", *[f"{100 * s.pixel_accuracy:.2f}" for s in scored.values()], end_section=True)
    for condition in next(iter(scored.values())).conditions if scored else ():
        values = [scores.conditions[condition].miou.item() for scores in scored.values()]
        table.add_row(f"mIoU, {condition}", *map(_percent, values))
    table.add_section()
    for i, name in enumerate(names):
        table.add_row(name, *[_percent(scores.iou[i].item()) for scores in scored.values()])
    Console().print(table)


def _percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.2f}"


def report_scores(scores: Scores, weights: str, names: tuple[str, ...], protocol: str, run_dir: str | Path) -> None:
    """Write ``results.json`` of one scored file of weights, and print its table."""
    results = {
        **describe_scores(scores, protocol, names),
        "weights": weights,
        "sha256": sha256(weights),
        "versions": versions(),
    }
    write_results(results, Path(run_dir))
    print_scores({"network": scores}, names, protocol)


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
    rows, maps = [], []
    for i in range(0, len(dataset), -(-len(dataset) // count)):
        sample = dataset[i]
        image, target, *_ = sample
        place = getattr(sample, "place", None)
        labels = [target.numpy()]
        for network in shown.values():
            ids = network.predict(image[None], target.shape, None if place is None else place[None])[0]
            labels.append(ids.numpy())
        rows.append([image.permute(1, 2, 0).numpy(), *(colourise(ids, data.classes.palette) for ids in labels)])
        maps += labels
    legend = legend_of(maps, data.classes)
    save_sheet(rows, ["image", "label", *shown], folder / "predictions.png", legend=legend)


def describe_scores(scores: Scores | None, protocol: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Convert scores for JSON: fractions, None for a class that does not occur."""
    if scores is None:
        return {}
    conditions = {name: _fractions(part, names) for name, part in scores.conditions.items()}
    return {
        "protocol": protocol,
        "protocol_description": PROTOCOLS[protocol].description,
        **_fractions(scores, names),
        "mIoU": round(scores.miou.item(), 6),  # NaN where nothing could be scored: no table takes it for a score
        **({"conditions": conditions} if conditions else {}),
    }


def _fractions(scores: Scores, names: tuple[str, ...]) -> dict[str, Any]:
    def rounded(value: Tensor) -> float | None:
        return None if value.isnan() else round(value.item(), 6)

    iou = {name: rounded(value) for name, value in zip(names, scores.iou, strict=True)}
    return {"mIoU": rounded(scores.miou), "pixel_accuracy": rounded(scores.pixel_accuracy), "iou": iou}


def write_results(results: dict[str, Any], run_dir: Path) -> None:
    """Write ``results.json``; a number that is not finite becomes null, since JSON has none."""
    content = json.dumps(_as_json(results), indent=2, allow_nan=False)
    write_atomically(run_dir / "results.json", f"{content}\n".encode())


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count_parameters(student: Network, criterion: Criterion) -> dict[str, int]:
    """Count the parameters of the student and of the modules that are trained with it."""
    return {
        "student": sum(p.numel() for p in student.parameters()),
        "training_modules": sum(p.numel() for p in criterion.parameters()),
    }


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
