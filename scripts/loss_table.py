"""Write docs/losses.md and docs/losses/*.svg: inputs, trained parameters and costs of every term in conf/term.

    python scripts/loss_table.py                # with costs; takes minutes on two cores
    python scripts/loss_table.py --no-cost      # keeps the costs in docs/losses.md

Every term is built for MiT-B2 -> MiT-B0 with 19 classes and called with random outputs of the size that these networks
have for one image of 512×1024. Its inputs are found by experiment: a tensor is an input if replacing it by NaN changes
the value. Time and memory are those of value and gradient, relative to the task's cross-entropy at label size.
"""

import argparse
import inspect
import platform
import re
import textwrap
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import matplotlib
import torch
from benchmarks.measure import Cost
from benchmarks.terms import CLASSES, SAME_WIDTHS, SETTINGS, SIZE, TASK, TERMS, Term, build, measure_terms
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrow, Rectangle
from omegaconf import OmegaConf
from torch import Tensor, nn

from transkd.outputs import SegmentationOutput

ROOT = Path(__file__).parents[1]


def parts(output: SegmentationOutput) -> dict[str, Tensor]:
    """Return an output's tensors by their names in the table."""
    named = {"image": output.image, "logits": output.logits}
    for kind in ("features", "embeddings"):
        named |= {f"{kind} {i}": tensor for i, tensor in enumerate(getattr(output, kind), start=1)}
    return named


def replaced(output: SegmentationOutput, name: str, tensor: Tensor) -> SegmentationOutput:
    """Return an output with one tensor replaced."""
    kind, _, stage = name.partition(" ")
    if not stage:
        return output._replace(**{kind: tensor})
    tensors = list(getattr(output, kind))
    tensors[int(stage) - 1] = tensor
    return output._replace(**{kind: tuple(tensors)})


@torch.no_grad()
def reads(term: Term) -> tuple[list[str], list[str], bool]:
    """Return the student's and the teacher's tensors that affect the term's value, and whether the labels do."""
    student, teacher, target = term.pair

    def value(*arguments: object) -> Tensor:
        torch.manual_seed(0)
        return term.module.eval()(*arguments)

    expected = value(student, teacher, target)
    found = []
    for i, output in enumerate((student, teacher)):
        names = []
        for name, tensor in parts(output).items():
            changed = replaced(output, name, torch.full_like(tensor, torch.nan))
            pair = (changed, teacher) if i == 0 else (student, changed)
            if not torch.equal(value(*pair, target), expected):
                names.append(name)
        found.append(names)
    labels = not torch.equal(value(student, teacher, target.roll(1, 2)), expected)
    return found[0], found[1], labels


def summarise(names: list[str]) -> str:
    """Abbreviate ``features 1``, ``features 2``, … as "features 1-4"."""
    summary = [name for name in names if " " not in name]
    for kind in ("features", "embeddings"):
        stages = [name.split()[1] for name in names if name.startswith(f"{kind} ")]
        if stages:
            summary.append(f"{kind} {', '.join(stages)}" if len(stages) < 4 else f"{kind} 1-4")
    return "; ".join(summary)


def draw(path: Path, student: list[str], teacher: list[str], labels: bool) -> None:
    """Draw both networks as rows of boxes; inputs of the term are filled."""
    figure = Figure(figsize=(7.2, 1.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 14.4), ylim=(0, 3.8))
    axes.axis("off")
    boxes = [("image", "image")]
    for stage in range(1, 5):
        boxes += [(f"embeddings {stage}", f"E{stage}"), (f"features {stage}", f"F{stage}")]
    boxes += [("logits", "logits")]
    for y, role, read, colour in ((2.2, "teacher", teacher, "#c44e52"), (0.5, "student", student, "#4c72b0")):
        axes.text(0.1, y + 0.45, role, va="center", fontsize=9)
        for i, (name, text) in enumerate(boxes):
            x = 1.4 + 1.15 * i
            filled = name in read
            axes.add_patch(Rectangle((x, y), 0.9, 0.9, facecolor=colour if filled else "white", edgecolor="#555555"))
            axes.text(
                x + 0.45, y + 0.45, text, ha="center", va="center", fontsize=8, color="white" if filled else "#555555"
            )
            if i:
                axes.add_patch(FancyArrow(x - 0.24, y + 0.45, 0.12, 0, width=0.01, head_width=0.12, color="#999999"))
    axes.add_patch(Rectangle((13.1, 1.4), 1.1, 0.8, facecolor="#55a868" if labels else "white", edgecolor="#555555"))
    axes.text(13.65, 1.8, "labels", ha="center", va="center", fontsize=8, color="white" if labels else "#555555")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transkd"}):  # small and reproducible files
        figure.savefig(path, metadata={"Date": None})


def describe(module: nn.Module) -> str:
    """Return the class docstring up to its arguments."""
    text = inspect.getdoc(type(module)) or ""
    return re.split(r"\n(?:Args|Shapes|Raises|Attributes|Example):", text)[0].strip()


def as_markdown(text: str) -> str:
    """Convert indented formulas to code blocks and double backticks to single ones."""
    lines = []
    for block in re.split(r"\n\n", text.replace("``", "`")):
        if all(line.startswith("    ") for line in block.splitlines()):
            lines.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            lines.append(block)
    return "\n\n".join(lines)


def costs_of(built: Mapping[str, Term], arguments: argparse.Namespace) -> dict[str, Cost]:
    """Measure time and memory of the task's cross-entropy and of every term."""
    fixed = {"size": SIZE, "batch": 1, "classes": CLASSES, "device": "cpu", "compile": False}
    costs = measure_terms(built, argparse.Namespace(**vars(arguments), **fixed), torch.float32)
    return {cost.name: cost for cost in costs}


def known_costs(path: Path) -> dict[str, tuple[str, str]]:
    """Read time and memory from an existing table."""
    if not path.is_file():
        return {}
    rows = re.findall(r"^\| \[`(\w+)`\]\(#.*\| ([^|]+) \| ([^|]+) \|$", path.read_text(encoding="utf-8"), re.M)
    return {name: (seconds, memory) for name, seconds, memory in rows}


HEAD = """# Distillation terms

Written by `python scripts/loss_table.py` from `conf/term/` and the classes' documentation; do not edit.

A term compares the outputs of a student and a teacher (`SegmentationOutput`: logits, features F1-F4, patch embeddings
E1-E4, the normalised image) and returns an unweighted scalar. Choose terms with `'term=[kd,csf]'`, or a
[preset](#presets) that weighs them as its paper does with `distill=`. Every run also has `task`, the cross-entropy of
the student's logits with the labels (`TaskCrossEntropy`). `dice`, `focal` and `ohem` compare the student with the
labels too and need no teacher; `criterion.terms.task.term._target_=transkd.losses.TaskFocal` puts one in the place of
the cross-entropy. Parameters of a term are not part of the deployed student.

Common to all terms: the teacher's outputs are detached; maps of another size are resized to a common grid, by default
the teacher's (bilinear, align_corners=False); labels are resized by nearest neighbour, 255 is ignored; values are
computed in float32 or float64; a batch without a valid position gives 0 with zero gradients; images without labels
(`data.unlabelled`) are ignored by what reads labels and seen by everything else, with `mask_ignored` too; values are
means over positions, so that they do not grow with the image, unless the method is a sum (stated). In distributed
training means over valid positions are computed in each process, so with unequal numbers of labelled pixels the result
differs from that of one process with the joined batch.

**Weights.** `criterion.terms.<name>.weight=0.5` sets a weight. `'criterion.terms.<name>.weight="auto(0.3)"'` calibrates
it on the first ten steps such that the norm of the term's gradient on the student is 0.3 times that of the task's, and
keeps it. A schedule multiplies the weight:
`'+criterion.terms.<name>.schedule={_target_:transkd.losses.Schedule,end:0.8}'` enables the term for 80 % of the run;
`start`, `rise`, `end` and `fall` are fractions of the run, or in the unit of `unit:epoch` or `unit:step`;
`shape:cosine` gives cosine ramps. While no term reads the teacher, it is not run. `gradients_every=50` logs the norm of
each term's gradient and its cosine with the task's.

"""


def presets() -> str:
    """The table of conf/distill: each preset's terms, and what its file says of it."""
    rows = []
    for path in sorted((ROOT / "conf" / "distill").glob("*.yaml")):
        terms = OmegaConf.load(path).defaults[0]["override /term"]
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:  # the first names the package
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        link = f"[`{path.stem}`](../conf/distill/{path.name})"
        rows.append(f"| {link} | {', '.join(f'`{term}`' for term in terms)} | {' '.join(comment)} |")
    return "\n".join(["## Presets", "", "| `distill=` | terms | composition |", "|---|---|---|", *rows])


def main() -> None:
    """Parse the command line, measure, write the page and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-cost", action="store_true", help="keep the costs in docs/losses.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calm", action="store_true", help="measure only while other processes are idle (Linux)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "losses.md")
    arguments = parser.parse_args()
    pictures = arguments.output.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    known = known_costs(arguments.output) if arguments.no_cost else {}

    built = {name: build(path) for name, path in TERMS.items()}
    costs = None if arguments.no_cost else costs_of(built, arguments)
    rows, sections = [], []
    for path in TERMS.values():
        # small outputs: the inputs of a term do not depend on the size
        student, teacher, labels = reads(build(path, (256, 256)))
        draw(pictures / f"{path.stem}.svg", student, teacher, labels)
        term = built[path.stem]
        seconds, memory = known.get(path.stem, ("-", "-"))
        if costs is not None:
            spent = costs[path.stem]
            seconds, memory = f"{spent.ratio:.2f}", f"{spent.peak_memory_mb / costs[TASK].peak_memory_mb:.2f}"
        trained = sum(p.numel() for p in term.module.parameters() if p.requires_grad)
        kind = type(term.module).__name__
        columns = [
            f"[`{term.name}`](#{term.name})",
            f"`{kind}`",
            term.about.split(": ", 1)[0],
            summarise(student),
            summarise(teacher),
            "yes" if labels else "",
            f"{trained / 1e6:.2f} M" if trained else "",
            f"{term.weight:g}",
            seconds,
            memory,
        ]
        rows.append(f"| {' | '.join(columns)} |")
        settings = f" Here with {SETTINGS[term.name]}." if SETTINGS.get(term.name) else ""
        sections.append(
            f"### {term.name}\n\n`{kind}`, [conf/term/{term.name}.yaml](../conf/term/{term.name}.yaml): "
            f"{term.about}.{settings}\n\n![inputs of {term.name}]({pictures.name}/{term.name}.svg)\n\n"
            f"{as_markdown(describe(term.module))}\n"
        )
        print(rows[-1], flush=True)
    header = [
        "term",
        "class",
        "method",
        "inputs: student",
        "teacher",
        "labels",
        "trains",
        "weight",
        "time",
        "memory",
    ]
    table = "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *rows])
    measured = (
        "Time and memory: value and gradient for one image of 512×1024, MiT-B2 → MiT-B0 "
        f"({', '.join(sorted(SAME_WIDTHS))}: equal widths), 19 classes, float32, over those of the task's "
        "cross-entropy at label size; memory is the peak beyond the networks' outputs.\n"
    )
    if costs is not None:
        measured += (
            f"The cross-entropy itself: {costs[TASK].median:.3f} s, {costs[TASK].peak_memory_mb / 1.048576:.0f} MiB. "
            f"Measured {date.today()} "
            f"on {torch.get_num_threads()} threads ({platform.machine()}), torch {torch.__version__}.\n"
        )
    elif arguments.output.is_file():
        found = re.search(r"^The cross-entropy itself: .*$", arguments.output.read_text(encoding="utf-8"), re.M)
        measured += f"{found[0]}\n" if found else ""
    arguments.output.write_text(
        f"{HEAD}{table}\n\n{measured}\n{presets()}\n\n## Terms\n\n" + "\n".join(sections), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
