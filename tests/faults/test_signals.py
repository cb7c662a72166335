"""SIGINT and SIGTERM in every part of a run: one line, status 130 or 143, and what was written stays whole."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from door import SMALL

from transkd import train
from transkd.command import stopping
from transkd.training.distiller import Distiller
from transkd.training.scoring import Scorer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"data.root={tmp_path_factory.mktemp('signals') / 'data'}"


@pytest.fixture
def call(data, tmp_path, monkeypatch, capsys):
    """Call ``train``; gives its exit status and the last line on stderr."""

    def call(*overrides, mode=(), last_line=True):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            sys, "argv", ["transkd", *mode, *SMALL, "distill=none", "hydra.run.dir=run", data, *overrides]
        )
        with pytest.raises(SystemExit) as stop:
            train.main()
        said = capsys.readouterr().err.strip()
        return stop.value.code, said.splitlines()[-1] if last_line else said

    return call


def signalling(number, original, when=lambda *_: True):
    def wrapped(*arguments, **named):
        if when(*arguments):
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    return wrapped


KINDS = pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@KINDS
def test_in_training(call, tmp_path, monkeypatch, number, status):
    before = signal.getsignal(number)
    step = signalling(number, Distiller.training_step, lambda self, *_: self.current_epoch == 1)
    monkeypatch.setattr(Distiller, "training_step", step)
    code, line = call("trainer.max_epochs=3", "hydra.run.dir=outputs/demo/run")
    assert code == status
    assert line == f"stopped by {signal.Signals(number).name}: go on with ckpt_path=last"
    assert torch.load(tmp_path / "outputs/demo/run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    assert signal.getsignal(number) is before


@KINDS
def test_before_the_first_checkpoint(call, monkeypatch, number, status):
    monkeypatch.setattr("transkd.run.rehearse", signalling(number, lambda *_: None))
    code, line = call()
    assert code == status
    assert line.endswith(": before the first checkpoint, so nothing of this run is kept")


def test_in_the_teachers_training(call, tmp_path, monkeypatch):
    monkeypatch.setattr(Distiller, "training_step", signalling(signal.SIGTERM, Distiller.training_step))
    code, line = call("distill=transkd_cwd", f"teacher.fit.folder={tmp_path / 'teachers'}")
    assert (code, line.split(":")[0]) == (143, "stopped by SIGTERM")
    assert not (tmp_path / "teachers").exists()


def test_while_the_student_is_scored(call, tmp_path, monkeypatch):
    trained = signalling(signal.SIGTERM, Scorer.validation_step, lambda self, *_: not isinstance(self, Distiller))
    monkeypatch.setattr(Scorer, "validation_step", trained)
    code, line = call()
    assert code == 143
    assert "run/student.safetensors; score it with python -m transkd.evaluate" in line
    assert (tmp_path / "run" / "student.safetensors").is_file()


def test_a_student_of_the_run_that_is_resumed_is_not_taken_for_this_one(call, tmp_path, monkeypatch):
    student = tmp_path / "run" / "student.safetensors"
    monkeypatch.setattr("transkd.run.check_arguments", signalling(signal.SIGINT, lambda *_: None))
    student.parent.mkdir()
    student.touch()
    os.utime(student, (0, 0))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    code, line = call("ckpt_path=run")
    assert (code, line) == (130, f"stopped by SIGINT: go on with ckpt_path={tmp_path}/run/checkpoints/last.ckpt")


def test_a_run_of_wandb_that_is_stopped_has_not_succeeded(call, monkeypatch):
    ended = []
    wandb = SimpleNamespace(run="one", finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("transkd.run.check_arguments", signalling(signal.SIGINT, lambda *_: None))
    assert call()[0] == 130
    assert ended == [1]


def test_a_signal_that_was_swallowed_ends_the_run_at_the_next_batch(call, monkeypatch):
    step = Distiller.training_step

    def swallows(self, *arguments):
        with suppress(stopping.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Distiller, "training_step", swallows)
    assert call()[0] == 143


def test_a_sweep_ends_as_a_whole(call, tmp_path, monkeypatch):
    monkeypatch.setattr("transkd.run.rehearse", signalling(signal.SIGINT, lambda *_: None))
    assert call("seed=0,1", "hydra.sweep.dir=sweep", mode=["-m"])[0] == 130
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_signal_that_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping.received() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_a_launcher_passes_on_counts_once():
    with stopping.listening():
        with pytest.raises(stopping.Stopped):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.received() == signal.SIGINT


def test_other_processes_of_a_run_end_without_a_handler(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with stopping.listening():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] == [signal.SIG_DFL] * 2


def test_processes_of_a_launcher_end_with_the_command(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.5)
    deaf = "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    procs = [subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) for script in ("exec sleep 60", deaf)]
    procs[1].stdout.readline()
    launcher = SimpleNamespace(procs=list(procs))
    with stopping.listening():
        stopping.takes_along(SimpleNamespace())
        stopping.takes_along(launcher)
        stopping.end_children()
    assert [process.returncode for process in procs] == [-signal.SIGTERM, -signal.SIGKILL]
    assert launcher.procs == []  # Lightning's watch has nothing to watch any more


def test_a_process_that_fails_after_another_one_is_silent(call, monkeypatch, tmp_path):
    def fails(*_):
        (tmp_path / "run" / "error.txt").write_text("the other one's line")
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("transkd.run.check_arguments", fails)
    assert call("seed=1", last_line=False) == (1, "")
    assert (tmp_path / "run" / "error.txt").read_text() == "the other one's line"
