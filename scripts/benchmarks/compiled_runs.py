"""Scores of whole training runs: eager, compiled, and compiled but killed half-way and resumed, side by side."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["compare_runs"]

SMALL = [
    "data=synthetic",
    *("data.prepare.height=64", "data.prepare.width=128", "data.prepare.train=8", "data.prepare.val=3"),
    *(f"data.train_transform.transforms.0.{side}=64" for side in ("height", "width")),
    *("data.batch_size=2", "trainer.check_val_every_n_epoch=1"),
]
POLL = 0.05  # seconds


def compare_runs(
    folder: Path, data: Path | None, teacher: Path | None, epochs: int, compiled: str, say: Callable[..., None]
) -> None:
    """Train the students of ``+experiment=camvid`` all at once, and report each one's mIoU and minutes.

    Args:
        folder: the runs' folders are made in it.
        data: CamVid; None draws scenes instead, small ones.
        teacher: weights of a SegFormer-B1 for TransKD-Base; None trains without a teacher.
        epochs: length of a run.
        compiled: ``compile=`` of the compiled runs.
        say: writes a result, ``say(name, **values)``.
    """
    frames = [*SMALL, f"data.root={folder / 'drawn'}"] if data is None else [f"data.root={data.absolute()}"]
    terms = ["distill=none"] if teacher is None else ["distill=transkd_base", f"teacher.weights={teacher.absolute()}"]
    shared = ["+experiment=camvid", *frames, *terms, f"trainer.max_epochs={epochs}", "pictures=0"]
    shared += ["data.num_workers=1", "trainer.check_val_every_n_epoch=1", "~callbacks.progress"]
    ways = {f"eager, seed {seed}": ("false", seed) for seed in range(3)}
    ways |= {f"compiled, seed {seed}": (compiled, seed) for seed in range(3)}
    interrupted = "compiled, seed 0, killed and resumed"
    ways[interrupted] = (compiled, 0)
    start, runs = time.monotonic(), dict[str, subprocess.Popen[bytes]]()
    commands = {name: [*shared, f"compile={mode}", f"seed={seed}"] for name, (mode, seed) in ways.items()}
    places = {name: folder / name.replace(", ", "_").replace(" ", "_") for name in ways}
    for name, command in commands.items():
        runs[name] = _begin(command, places[name])
        if data is None and len(runs) == 1:  # which draws the scenes for all
            runs[name].wait()
    saved = _kill_after(runs[interrupted], places[interrupted] / "checkpoints" / "last.ckpt", epochs // 2)
    runs[interrupted] = _begin([*commands[interrupted], f"ckpt_path={places[interrupted]}"], places[interrupted])
    while runs:
        for name in [name for name, process in runs.items() if process.poll() is not None]:
            code = runs.pop(name).returncode
            say(name, code=code, seconds=round(time.monotonic() - start, 1), **_outcome(places[name], code))
        time.sleep(POLL)
    say("killed", after_epochs=saved)


def _begin(overrides: Sequence[str], place: Path) -> "subprocess.Popen[bytes]":
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "transkd.train", *overrides, f"hydra.run.dir={place}"]
    with (place.parent / f"{place.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _kill_after(run: "subprocess.Popen[bytes]", checkpoint: Path, epochs: int) -> int:
    """Kill a run once its checkpoint has been written this many times; return how often that was."""
    times = set[int]()
    while len(times) < epochs and run.poll() is None:
        if checkpoint.is_file():
            times.add(checkpoint.stat().st_mtime_ns)
        time.sleep(POLL)
    run.kill()
    run.wait()
    return len(times)


def _outcome(place: Path, code: int) -> dict[str, Any]:
    if code:
        log = (place.parent / f"{place.name}.log").read_text(errors="replace").splitlines()
        return {"last_line": log[-1] if log else ""}
    return {"mIoU": json.loads((place / "results.json").read_text(encoding="utf-8"))["mIoU"]}
