"""Report of the command ``check``: tables, ``sheet.png`` and ``check.json``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from transkd.data import SegmentationDataModule
from transkd.files import write_atomically
from transkd.pictures import colourise, legend_of, overlay, save_sheet

__all__ = ["draw_sheet", "folded", "report_check"]

ROWS = 4
SHOWN = 5  # lines of one kind


def draw_sheet(data: SegmentationDataModule, path: Path) -> None:
    """Save a contact sheet: images as stored, labels on them, and both as the student sees them in training."""
    dataset, palette = data.dataset("train"), data.classes.palette
    count = min(ROWS, dataset.labelled)
    rows, labels = [], []
    for row in range(count):
        index = row * dataset.labelled // count
        image, label = dataset.read(index)
        seen = dataset[index, data.seed + row]
        pixels = seen.image.permute(1, 2, 0).numpy()
        shown = overlay(pixels, colourise(seen.target.numpy(), palette))
        rows.append([image, overlay(image, colourise(label, palette)), pixels, shown])
        labels += [label, seen.target.numpy()]
    titles = ["image", "label on it", "in training", "label on it"]
    save_sheet(rows, titles, path, legend=legend_of(labels, data.classes))


def report_check(problems: Sequence[str], warnings: Sequence[str], facts: dict[str, Any], folder: Path) -> None:
    """Print tables of the facts, then a line for each warning and problem; write all of it to ``check.json``."""
    content = {"problems": list(problems), "warnings": list(warnings), **facts}
    write_atomically(folder / "check.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    console = Console()
    for table in (files_table(facts), classes_table(facts), taps_table(facts), terms_table(facts), run_table(facts)):
        if table.row_count:
            console.print(table)
    for line in folded(warnings):
        print(f"warning: {line}", file=sys.stderr)
    for line in folded(problems):
        print(f"error: {line}", file=sys.stderr)
    sheet = " and sheet.png beside it" if (folder / "sheet.png").is_file() else ""
    print(f"problems: {len(problems)}, warnings: {len(warnings)}; see {folder / 'check.json'}{sheet}")


def folded(lines: Sequence[str], most: int = SHOWN) -> list[str]:
    """The lines to print: the first of each kind, and how many more there are; a mistake is often one of all files.

    Two lines are of one kind if they differ only in words that hold something other than letters: paths, numbers.

    Example:
        >>> folded(["a/1.png: is empty", "no teacher", "a/2.png: is empty", "a/3.png: is empty"], most=1)
        ['a/1.png: is empty', '2 more like the last, all in check.json', 'no teacher']
    """
    kinds: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        kinds.setdefault(tuple(word for word in line.split() if word.isalpha()), []).append(line)
    shown = []
    for alike in kinds.values():
        shown += alike[:most]
        if len(alike) > most:
            shown.append(f"{len(alike) - most} more like the last, all in check.json")
    return shown


def files_table(facts: dict[str, Any]) -> Table:
    """What was read of each split."""
    table = _table("files", "split", "images", "read", "unusable", "sizes")
    for split, found in facts.get("files", {}).items():
        sizes = [f"{size} ({count})" for size, count in found["sizes"].items()]
        more = f", {len(sizes) - 3} more" if len(sizes) > 3 else ""
        table.add_row(split, *(str(found[key]) for key in ("images", "read", "unusable")), ", ".join(sizes[:3]) + more)
    return table


def classes_table(facts: dict[str, Any]) -> Table:
    """Share of the labelled pixels that each class has."""
    files = facts.get("files", {})
    table = _table("labelled pixels [%]", "class", *files)
    shares = {split: found["pixels"] for split, found in files.items()}
    totals = {split: max(1, sum(pixels.values())) for split, pixels in shares.items()}
    for name in next(iter(shares.values()), {}):
        table.add_row(name, *(f"{100 * shares[split][name] / totals[split]:.2f}" for split in files))
    return table


def taps_table(facts: dict[str, Any]) -> Table:
    """Outputs of both networks and the terms that read them."""
    table = _table("outputs for one image, and the terms that read them", "output", "student", "teacher", "terms")
    for tap in facts.get("taps", []):
        shapes = ["×".join(map(str, shape)) if shape else "" for shape in (tap["student"], tap["teacher"])]
        table.add_row(tap["name"], *shapes, ", ".join(tap["readers"]))
    return table


def terms_table(facts: dict[str, Any]) -> Table:
    """Value, weight and gradient of each term."""
    table = _table("terms on the first images", "term", "value", "weight", "gradient norm", "reads of the teacher")
    for name, term in facts.get("terms", {}).items():
        numbers = [f"{term['value']:.4g}", f"{term['weight']}", f"{term['gradient']:.4g}"]
        table.add_row(name, *numbers, ", ".join(term["reads"]))
    return table


def run_table(facts: dict[str, Any]) -> Table:
    """Parameters, memory, speed and hours."""
    table = _table("the run", "", "")
    if "teacher" in facts:
        table.add_row("teacher", facts["teacher"])
    if "teacher_score" in facts:
        found = facts["teacher_score"]
        score = f"{100 * found['mIoU']:.2f} % on {found['images']} validation images ({found['protocol']})"
        table.add_row("teacher's mIoU", score)
    if "start" in facts:
        table.add_row("the student's start", facts["start"])
    if "parameters" in facts:
        found = facts["parameters"]
        table.add_row("student", f"{found['student'] / 1e6:.2f} M parameters, all that is deployed")
        table.add_row("with training modules", f"{found['with_training_modules'] / 1e6:.2f} M parameters")
        table.add_row("trained of the student", f"{found['trained_of_the_student'] / 1e6:.2f} M parameters")
    if "memory" in facts:
        found = facts["memory"]
        table.add_row(f"batch of {found['batch_size']}", f"{found['bytes'] / 2**30:.2f} GiB {found['measured']}")
    if "speed" in facts:
        found = facts["speed"]
        more = ", more once the run has filled data.cache" if found["cache"] else ""
        table.add_row("loader", f"{found['loader_images_per_second']:.2f} images/s{more}")
        speed = f"{found['step_images_per_second']:.2f} images/s, {found['step_seconds']:.3f} s"
        table.add_row("training step", speed + (", compiled" if found["compiled"] else ", not compiled"))
    if "hours" in facts:
        hours = facts["hours"]
        length = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        table.add_row("the whole run", f"{length}, without the teacher's own training and the student's start from it")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
