"""Plot the validation curves of several runs.

python scripts/compare_curves.py outputs/camvid/<run> outputs/camvid/<run> --labels alone transkd_base --out curves.png
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from sweep_table import one_protocol

from transkd.pictures import read_metrics


def draw(runs: list[Path], labels: list[str], out: Path) -> None:
    """Plot mIoU [%] over the training step, a line per run, with the final scores in the legend."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    found = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in runs]
    about = [(results["protocol"], results.get("protocol_description", "")) for results in found]
    protocol = one_protocol(dict(zip(map(str, runs), about, strict=True)))
    for run, label, results in zip(runs, labels, found, strict=True):
        steps, values = zip(*read_metrics(run / "metrics.csv")[f"val/{protocol}/mIoU"], strict=True)
        axis.plot(steps, [100 * value for value in values], label=f"{label}: {100 * results['mIoU']:.2f}", marker=".")
    axis.set_xlabel("step")
    axis.set_ylabel(f"validation mIoU [%], {protocol}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--labels", nargs="+", help="one per run; default: the folders' names")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    labels = arguments.labels or [run.name for run in arguments.runs]
    if len(labels) != len(arguments.runs):
        sys.exit(f"error: {len(arguments.runs)} runs, but {len(labels)} labels")
    unfinished = [str(run) for run in arguments.runs if not (run / "results.json").is_file()]
    if unfinished:
        sys.exit(f"error: not a finished run (no results.json): {', '.join(unfinished)}")
    draw(arguments.runs, labels, arguments.out)


if __name__ == "__main__":
    main()
