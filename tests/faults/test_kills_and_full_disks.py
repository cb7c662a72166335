"""A campaign of kills and full disks: after the next start nothing is partial, and the student is that of a quiet run.

``pytest tests/faults/test_kills_and_full_disks.py -m slow --trials 30`` makes it longer.
"""

import random
import signal
import time
from collections import Counter

import pytest
from processes import command, said
from runs import assert_identical, student

SETTINGS = ("trainer.max_epochs=8", "data.prepare.train=4", "name=killed")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A folder with data and with a run that nothing disturbed; and the seconds that it took."""
    root = tmp_path_factory.mktemp("kills")
    for run in ("first", "quiet"):  # the first one waits for the fork server, and draws the data
        started = time.monotonic()
        process = command(root, *SETTINGS, f"hydra.run.dir={run}")
        process.join()
        assert process.exitcode == 0, said(root)
    return root, time.monotonic() - started


def end_well(root, run):
    """Go on from the last checkpoint, or begin anew if there is none, until a run is whole; say which."""
    last = root / run / "checkpoints" / "last.ckpt"
    resume = [f"ckpt_path={last}"] if last.is_file() else []
    run = run if resume else f"{run}_anew"
    process = command(root, *SETTINGS, f"hydra.run.dir={run}", *resume)
    process.join()
    assert process.exitcode == 0, said(root)
    assert_identical(student(root, "quiet"), student(root, run))
    assert not list((root / run).rglob(".*.????????"))
    return "resumed" if resume else "begun anew"


@pytest.mark.slow
def test_kills(quiet, request):
    root, seconds = quiet
    trials = request.config.getoption("trials")
    rng = random.Random(trials)
    ends = Counter()
    for trial in range(4 * trials):
        run, wait = f"killed_{trial}", rng.uniform(0.2, 0.95) * seconds
        process = command(root, *SETTINGS, f"hydra.run.dir={run}")
        time.sleep(wait)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it takes less than that, and this was no trial
            seconds = wait
            continue
        assert process.exitcode == -signal.SIGKILL
        ends[end_well(root, run)] += 1
        if ends.total() == trials:
            break
    print(f"kills: {dict(ends)}")
    assert ends.total() == trials
    assert "Traceback" not in said(root)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 2_000, 300_000], ids=["from the start", "before a checkpoint", "at a checkpoint"])
def test_a_full_disk(quiet, limit):
    root, _ = quiet
    length = len(said(root))
    folder = root / f"full_{limit}"
    folder.mkdir()
    process = command(folder, *SETTINGS, f"data.root={root / 'data/road_scenes'}", file_limit=limit)
    process.join()
    assert process.exitcode == 1
    lines = said(folder).splitlines() if limit else []
    assert "Traceback" not in said(folder)
    assert [line for line in lines if line.startswith("error: cannot write")] or not limit
    assert len(said(root)) == length
    assert not list(folder.rglob(".*.ckpt*"))
