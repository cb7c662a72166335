"""A run of two processes that is interrupted, and one in which a single process fails: it ends as a whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from door import SMALL
from runs import assert_identical, student

CALLBACK = """
import time
from pathlib import Path
import lightning as L
from transkd.errors import UserError

class Told(L.Callback):
    def on_validation_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1 and Path("dawdle").exists():
            Path("reached").touch()
            time.sleep(0.5)

    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1 and trainer.global_rank == 1 and Path("fail").exists():
            raise UserError("what process 1 alone has found")
"""
SETTINGS = [*SMALL, "distill=none", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "name=two"]
SETTINGS += ["trainer.max_epochs=2", "data.prepare.train=4", "data.prepare.val=2", "+callbacks.told._target_=told.Told"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


def start(folder: Path, *overrides: str, launcher=(), said="said.txt", **others: str) -> subprocess.Popen:
    (folder / "told.py").write_text(CALLBACK)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MARK": str(folder), **others}
    command = [sys.executable, "-m", *launcher, "transkd.train", *SETTINGS, *overrides]
    with (folder / said).open("w") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def living(folder: Path) -> list[str]:
    """Processes of runs in a folder, as the environment that they inherit shows."""
    mark, found = f"MARK={folder}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] if mark in path.read_bytes() else []
        except OSError:  # ended, or another user's
            continue
    return found


def errors(folder: Path) -> list[str]:
    return [line for line in (folder / "said.txt").read_text().splitlines() if line.startswith(("error", "stopped"))]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A folder with data and the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("several")
    assert start(folder, "hydra.run.dir=quiet", launcher=TORCHRUN).wait(120) == 0, (folder / "said.txt").read_text()
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_ctrl_c_in_the_validation_of_two_processes(quiet):
    (quiet / "dawdle").touch()
    process = start(quiet)
    while not (quiet / "reached").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(60) == 130
    (quiet / "dawdle").unlink()
    assert errors(quiet) == ["stopped by SIGINT: go on with ckpt_path=last"]
    assert "Traceback" not in (quiet / "said.txt").read_text()
    assert living(quiet) == []
    assert start(quiet, "ckpt_path=last", "hydra.run.dir=resumed", launcher=TORCHRUN).wait(120) == 0
    assert_identical(student(quiet, "quiet"), student(quiet, "resumed"))


@pytest.mark.slow
def test_a_mistake_that_one_process_alone_finds(quiet):
    (quiet / "fail").touch()
    process = start(quiet, "hydra.run.dir=failed")
    assert process.wait(120) == 1
    (quiet / "fail").unlink()
    assert errors(quiet) == ["error: what process 1 alone has found"]
    assert "Traceback" not in (quiet / "said.txt").read_text()
    assert (quiet / "failed" / "error.txt").read_text() == "what process 1 alone has found\n"


@pytest.mark.slow
def test_processes_of_srun_share_a_folder(quiet):
    """srun gives each process its rank, and starts none of them again; they begin in different seconds."""
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    ranks = []
    for rank in ("0", "1"):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        ranks.append(start(quiet, "name=srun", said=f"srun_{rank}.txt", **job, **place))
        time.sleep(1.1)
    assert [process.wait(120) for process in ranks] == [0, 0], (quiet / "srun_0.txt").read_text()
    (run,) = (quiet / "outputs" / "srun").iterdir()
    assert_identical(student(quiet, "quiet"), student(quiet, f"outputs/srun/{run.name}"))
    assert living(quiet) == []
