"""Compare students of one teacher: mIoU before any step and trained, over parameters, GFLOP and latency.

python scripts/family.py outputs/camvid/sweep_<date> [--output picture.png] [--markdown] [--size HEIGHT WIDTH] [--calm]

A sweep over ``student.network.encoder.channels`` and ``.depths`` makes such a family. Scores are those in each job's
``results.json``; the network is its ``student.safetensors``. Operations and times are those of one image to logits at
stride 4, as in scripts/model_table.py, all networks in alternating turns. The teacher stands last; it is measured only
where its weights are at hand.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks import forward, measure
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from sweep_table import Job, check_protocols, print_table, read_sweep, varying

from transkd.errors import UserError
from transkd.files import sha256
from transkd.models import Segmenter, load_segmenter
from transkd.models.inherit.families import stages_of
from transkd.models.storage.resizing import plain_resize

SHAPE = ("student.network.encoder.channels", "student.network.encoder.depths")
"""Settings whose values the table shows as the network has them."""
SAME_DATA = ("find", "root", "classes", "num_classes", "void", "eval_transform")
"""Settings of the data that scores depend on."""
HEADER = ("widths", "depths", "M", "GFLOP", "ms", "step 0", "trained", "% of teacher")
MARKERS = "osD^vP*X"


class Member(NamedTuple):
    """A student of the family, or its teacher; scores are fractions, None for what is not known."""

    name: str
    shape: tuple[str, str]  # widths and depths
    others: tuple[str, ...]  # what else differs between the jobs
    parameters: int | None
    gflop: float | None
    seconds: float | None
    start: float | None
    miou: float
    teacher: float | None


class Run(NamedTuple):
    """What a job's folder holds."""

    job: Job
    results: dict[str, Any]
    data: dict[str, Any]
    network: Segmenter
    size: tuple[int, int] | None  # of the images that the student was scored on


def read_run(folder: Path, job: Job) -> Run:
    """Read a job's results, data and network.

    Raises:
        UserError: a file is missing, or the student cannot be built from its own file.
    """
    for name in ("config.yaml", "student.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"job {job.name} has no {name}; run it again, or move its folder out of the sweep")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    network, card = load_segmenter(folder / "student.safetensors")
    data = {key: config["data"].get(key) for key in SAME_DATA}
    return Run(job, results, data, network.eval(), plain_resize(card.get("eval_transform")))


def check_same(runs: Sequence[Run]) -> None:
    """Check that all scores are comparable.

    Raises:
        UserError: two jobs differ in the data or the teacher.
    """
    first = runs[0]
    for run in runs[1:]:
        for key in SAME_DATA:
            if run.data[key] != first.data[key]:
                raise UserError(
                    f"scores on different data are not comparable: data.{key} is {first.data[key]} in job "
                    f"{first.job.name} and {run.data[key]} in job {run.job.name}"
                )
    teachers = {run.results["teacher"].get("teacher_sha256"): run.job.name for run in runs}
    teachers.pop(None, None)
    if len(teachers) > 1:
        raise UserError(f"a family has one teacher; the teachers differ of jobs {', '.join(teachers.values())}")


def choose_size(runs: Sequence[Run], given: Sequence[int] | None) -> tuple[int, int]:
    """The size of the timed image: as given, else that to which the runs bring their images.

    Raises:
        UserError: the runs leave images at their own size, and none is given.
    """
    size = given or runs[0].size
    if size is None:
        raise UserError("the runs leave images at their own size; give one to measure at: --size HEIGHT WIDTH")
    return size[0], size[1]


def find_teacher(runs: Sequence[Run]) -> Segmenter | None:
    """Load the teacher; None, with a line on stderr, where its weights are not at hand."""
    about = next((run.results["teacher"] for run in runs if "teacher_sha256" in run.results["teacher"]), None)
    if about is None:
        return None
    source = about["teacher_weights"]
    try:
        if not Path(source).exists():
            raise UserError(f"no such file: {source}")
        if sha256(source) != about["teacher_sha256"]:
            raise UserError(f"{source} has changed since the runs")
        return load_segmenter(source)[0].eval()
    except UserError as error:
        print(f"the teacher is not measured: {error}", file=sys.stderr)
        return None


def measure_costs(
    networks: Sequence[Segmenter], size: Sequence[int], rounds: int, calm: bool
) -> list[tuple[int, float, float]]:
    """Parameters, GFLOP and seconds (median) of each network for one image; heads of SegFormer are fused."""
    image = torch.rand(1, 3, *size)
    best = [forward.build_ours(network)[-1] for network in networks]
    runs = {str(i): lambda logits=each.logits: logits(image) for i, each in enumerate(best)}
    with torch.inference_mode():
        seconds = measure.take_turns(runs, rounds, calm)
        gflop = [measure.count_gflop(run) for run in runs.values()]
    parameters = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    return list(zip(parameters, gflop, map(statistics.median, seconds.values()), strict=True))


def describe_shape(network: Segmenter) -> tuple[str, str]:
    """Widths and depths of the stages; depths are known for MiT and PVTv2."""
    depths = [len(stage.blocks) for stage in stages_of(network.encoder) or []]
    return " ".join(map(str, network.channels)), " ".join(map(str, depths)) or "–"


def make_family(
    runs: Sequence[Run], names: Sequence[str], size: Sequence[int], args: argparse.Namespace
) -> list[Member]:
    """Measure all students and the teacher, which stands last if it is known."""
    teacher = find_teacher(runs)
    networks = [run.network for run in runs] + ([teacher] if teacher is not None else [])
    costs = measure_costs(networks, size, args.rounds, args.calm)
    family: list[Member] = []
    for run, cost in zip(runs, costs, strict=False):
        others = tuple(run.job.settings.get(name, "–") for name in names)
        start = (run.results.get("start") or {}).get("mIoU")
        scores = (start, run.job.miou, run.job.teacher_miou)
        family.append(Member(run.job.name, describe_shape(run.network), others, *cost, *scores))
    score = next((run.job.teacher_miou for run in runs if run.job.teacher_miou is not None), None)
    if score is not None:
        shape = describe_shape(teacher) if teacher is not None else ("–", "–")
        cost = costs[-1] if teacher is not None else (None, None, None)
        family.append(Member("teacher", shape, ("–",) * len(names), *cost, None, score, score))
    return family


def as_text(member: Member) -> list[str]:
    """Format the cells of a row."""
    share = member.miou / member.teacher if member.teacher else None
    numbers = [
        (member.parameters, 1e-6, 2),
        (member.gflop, 1, 3),
        (member.seconds, 1e3, 1),
        (member.start, 100, 2),
        (member.miou, 100, 2),
        (share, 100, 1),
    ]
    cells = ["–" if value is None else f"{value * factor:.{digits}f}" for value, factor, digits in numbers]
    return [member.name, *member.others, *member.shape, *cells]


def draw(family: Sequence[Member], title: str, path: Path) -> None:
    """Draw mIoU over parameters, GFLOP and latency: hollow before any step, filled trained, the teacher a star."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    fields = {"parameters [M]": ("parameters", 1e-6), "GFLOP": ("gflop", 1), "latency [ms]": ("seconds", 1e3)}
    widths = list(dict.fromkeys(member.shape[0] for member in family))
    kinds = list(dict.fromkeys((member.shape[1], *member.others) for member in family))
    for axis, (heading, (field, factor)) in zip(axes, fields.items(), strict=True):
        for member in family:
            x, start, miou = getattr(member, field), member.start, 100 * member.miou
            kind = kinds.index((member.shape[1], *member.others))
            colour = f"C{widths.index(member.shape[0]) % 10}"
            label = ", ".join([" × ".join(member.shape), *member.others])
            look = {"color": colour, "marker": MARKERS[kind % len(MARKERS)], "linestyle": ""}
            if member.name == "teacher":
                axis.axhline(miou, color="black", linewidth=0.8, linestyle="--", label="teacher")
                label, look = "", look | {"color": "black", "marker": "*", "markersize": 12}
            if x is None:
                continue
            if start is not None:
                axis.plot([factor * x] * 2, [100 * start, miou], color=colour, linewidth=1.2)
                axis.plot(factor * x, 100 * start, markerfacecolor="white", **look)
            axis.plot(factor * x, miou, label=label, **look)
        axis.set_xlabel(heading)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mIoU [%], hollow: step 0, filled: trained")
    figure.suptitle(title, fontsize=10)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, title="widths × depths", title_fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sweep", type=Path, help="a sweep's folder, such as outputs/camvid/sweep_<date>")
    parser.add_argument("--output", type=Path, help="also draw the picture to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: that of the runs")
    parser.add_argument("--rounds", type=int, default=20, help="timed turns of each network")
    parser.add_argument("--calm", action="store_true", help="measure only while other processes are idle (Linux)")
    args = parser.parse_args(arguments)

    if args.rounds < 1:
        sys.exit(f"error: --rounds must be at least 1; got {args.rounds}")
    if args.output and not args.output.parent.is_dir():
        sys.exit(f"error: --output: no such folder: {args.output.parent}")
    jobs = read_sweep(args.sweep)
    protocol = check_protocols(jobs)
    names = [name for name in varying(jobs) if name not in SHAPE] + ["seed"] * (len({job.seed for job in jobs}) > 1)
    machine = measure.say_machine(measure.describe_machine(torch.device("cpu")))
    try:
        runs = [read_run(args.sweep / job.name, job) for job in jobs]
        check_same(runs)
        size = choose_size(runs, args.size)
        family = make_family(runs, names, size, args)
    except UserError as error:
        sys.exit(f"error: {error}")
    title = (
        f"mIoU [%] before any step (step 0) and trained, {protocol}; "
        f"M: parameters; GFLOP, ms: one image of {size[0]}×{size[1]}, median of {args.rounds}"
    )
    header, rows = ["job", *names, *HEADER], [as_text(member) for member in family]
    if args.markdown:
        print(f"{title}\n\n{measure.as_markdown(header, rows)}")
    else:
        print_table(header, rows, title)
    print(f"\n{machine}")
    if args.output:
        draw(family, title, args.output)


if __name__ == "__main__":
    main()
