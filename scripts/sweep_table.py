"""Summarise a sweep in a table: mIoU in percent, mean ± sample standard deviation over seeds.

python scripts/sweep_table.py outputs/acdc/sweep_<date> [--group distill] [--csv FILE] [--markdown]

A job is a subfolder with settings in ``.hydra/overrides.yaml`` and scores in ``results.json``. Jobs that differ only in
the seed form a row. Jobs without results are listed on stderr and excluded from the means.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

OVERRIDES = Path(".hydra") / "overrides.yaml"


class Job(NamedTuple):
    """A finished run of a sweep; scores are fractions."""

    name: str
    settings: dict[str, str]
    seed: int
    protocol: str
    miou: float
    teacher_miou: float | None
    start_miou: float | None = None
    protocol_description: str = ""


class Row(NamedTuple):
    """Jobs that differ only in the seed; scores in percent, None for missing values."""

    settings: tuple[str, ...]
    miou: float
    std: float | None
    runs: int
    teacher: float | None
    teacher_std: float | None
    protocol: str
    start: float | None = None


def read_settings(folder: Path) -> dict[str, str]:
    """Read the overrides of a job by name."""
    lines = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES))
    pairs = (str(line).lstrip("+").partition("=") for line in lines)
    return {name: value for name, _, value in pairs}


def read_job(folder: Path) -> Job:
    """Read settings and scores of a job.

    Raises:
        ValueError: there are no usable results; the message states the reason.
    """
    settings = read_settings(folder)
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        miou = float(results["mIoU"])
        teacher, start = ((results.get(part) or {}).get("mIoU") for part in ("teacher", "start"))
        about = results.get("protocol_description", "")
        job = Job(folder.name, settings, results["seed"], results["protocol"], miou, teacher, start, about)
    except FileNotFoundError:
        raise ValueError(read_error(folder) or "no results.json: it failed or is not finished") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"results.json is damaged ({error})") from None
    except KeyError as error:
        raise ValueError(f"results.json has no {error}") from None
    if not math.isfinite(miou):
        raise ValueError(f"its mIoU is {miou}")
    return job


def read_error(folder: Path) -> str | None:
    """Read the line with which a job failed; None if it left none."""
    path = folder / "error.txt"
    return path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else None


def read_sweep(root: Path) -> list[Job]:
    """Read all finished jobs in numerical order; list the others on stderr."""
    if not root.is_dir():
        sys.exit(f"error: no such folder: {root}")
    folders = [path.parents[1] for path in root.glob(f"*/{OVERRIDES}")]
    if not folders:
        sys.exit(f"error: no jobs in {root}: expected <number>/{OVERRIDES}, as written by a run with -m")
    jobs = []
    for folder in sorted(folders, key=lambda path: (not path.name.isdigit(), path.name.zfill(9))):
        try:
            jobs.append(read_job(folder))
        except ValueError as error:
            overrides = " ".join(f"{name}={value}" for name, value in read_settings(folder).items())
            print(f"left out: job {folder.name} ({overrides}): {error}", file=sys.stderr)
    if not jobs:
        sys.exit(f"error: no job in {root} has results")
    return jobs


def varying(jobs: Sequence[Job]) -> list[str]:
    """Return the names of settings other than the seed that differ between jobs, in the order given."""
    names = dict.fromkeys(name for job in jobs for name in job.settings if name != "seed")
    return [name for name in names if len({job.settings.get(name) for job in jobs}) > 1]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation (n − 1); None as deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def check_protocols(jobs: Sequence[Job]) -> str:
    """Return the protocol of all jobs; exit with one line if there are several."""
    return one_protocol({f"job {job.name}": (job.protocol, job.protocol_description) for job in jobs})


def one_protocol(protocols: Mapping[str, tuple[str, str]]) -> str:
    """Return the name of the one protocol of all runs; exit with one line if there are several.

    Args:
        protocols: name and description by run; a protocol with other settings has another description.
    """
    runs = {protocol: run for run, protocol in protocols.items()}
    names = [name for name, _ in runs]
    if len(runs) > 1:
        found = ", ".join(
            f"{name}{f': {about}' if names.count(name) > 1 else ''} ({run})" for (name, about), run in runs.items()
        )
        sys.exit(f"error: scores of different protocols are not comparable: {found}")
    return names[0]


def make_rows(jobs: Sequence[Job], names: Sequence[str]) -> list[Row]:
    """Build a row per combination of the named settings, in the order of the jobs."""
    check_protocols(jobs)
    groups = defaultdict(list)
    for job in jobs:
        groups[tuple(job.settings.get(name, "–") for name in names)].append(job)
    rows = []
    for settings, group in groups.items():
        teachers = [100 * job.teacher_miou for job in group if job.teacher_miou is not None]
        one_teacher = len(set(teachers)) == 1
        starts = [100 * job.start_miou for job in group if job.start_miou is not None]
        rows.append(
            Row(
                settings,
                *mean_and_std([100 * job.miou for job in group]),
                len(group),
                *((teachers[0], None) if one_teacher else mean_and_std(teachers) if teachers else (None, None)),
                group[0].protocol,
                statistics.fmean(starts) if starts else None,
            )
        )
    return rows


def show(mean: float | None, std: float | None) -> str:
    """Format a value in percent with its deviation, if any."""
    if mean is None:
        return "–"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def as_text(row: Row, with_start: bool) -> list[str]:
    """Format the cells of a row; the deviation of a single seed is shown as missing."""
    miou = show(row.miou, row.std) if row.std is not None else f"{row.miou:.2f} ± –"
    start = [show(row.start, None)] if with_start else []
    return [*row.settings, *start, miou, str(row.runs), show(row.teacher, row.teacher_std), row.protocol]


def print_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Print cells as a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    print(f"{title}\n")
    for line in lines:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Print cells as a table for a terminal."""
    table = Table(title=escape(title))
    for name in header:
        table.add_column(escape(name), overflow="fold")  # names of settings often differ at their end
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Write the unrounded numbers of the table; missing values are empty cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *Row._fields[1:]])
        writer.writerows([*row.settings, *row[1:]] for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sweep", type=Path, help="a sweep's folder, such as outputs/acdc/sweep_<date>")
    parser.add_argument("--group", help="settings that define rows, separated by commas; default: all but the seed")
    parser.add_argument("--csv", type=Path, help="also write the numbers to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    args = parser.parse_args(arguments)

    jobs = read_sweep(args.sweep)
    differing = varying(jobs)
    names = args.group.split(",") if args.group else differing
    known = dict.fromkeys(name for job in jobs for name in job.settings)
    for name in names:
        if name not in known:
            sys.exit(f"error: --group {name}: no job sets it; available: {', '.join(known)}")
    rows = make_rows(jobs, names)
    merged = ["seed", *(name for name in differing if name not in names)]
    title = f"mIoU [%], mean ± standard deviation over {', '.join(merged)}"
    with_start = any(row.start is not None for row in rows)
    runs = "seeds" if merged == ["seed"] else "runs"
    header = [*names, *(["before step 1"] if with_start else []), "mIoU", runs, "teacher", "protocol"]
    cells = [as_text(row, with_start) for row in rows]
    (print_markdown if args.markdown else print_table)(header, cells, title)
    if args.csv:
        write_csv(args.csv, names, rows)


if __name__ == "__main__":
    main()
