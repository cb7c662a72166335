"""Folders of runs: each belongs to one."""

import json
import multiprocessing

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from transkd.cli import CONF
from transkd.command import folders
from transkd.command.folders import Refusal, RunFolder, enter
from transkd.errors import UserError

FORK = multiprocessing.get_context("fork")


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["+experiment=demo", *overrides], return_hydra_config=True)


def take(folder, taken, done):
    folders._held.clear()
    enter(folder)
    taken.set()
    done.wait()


def test_a_folder_in_which_a_process_works_is_refused_until_it_ends(tmp_path):
    taken, done = FORK.Event(), FORK.Event()
    other = FORK.Process(target=take, args=(tmp_path / "run", taken, done))
    other.start()
    taken.wait()
    try:
        with pytest.raises(UserError, match=r"another run is at work in .*run; .*hydra\.run\.dir=FOLDER"):
            enter(tmp_path / "run")
    finally:
        done.set()
        other.join()
    enter(tmp_path / "run")


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = composed()
    RunFolder().on_run_start(first)
    run = OmegaConf.select(first, "hydra.run.dir")
    (tmp_path / run / "student.safetensors").touch()
    second, third = composed(), composed()
    for cfg in (second, third):
        OmegaConf.set_cache(cfg, OmegaConf.get_cache(first))  # the time
        RunFolder().on_run_start(cfg)
        (tmp_path / cfg.hydra.run.dir / "student.safetensors").touch()
    assert [second.hydra.run.dir, third.hydra.run.dir] == [f"{run}_2", f"{run}_3"]


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "student.safetensors", "results.json"])
def test_a_named_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(Refusal, match=rf"run holds a run already, whose {name} would be overwritten"):
        RunFolder().on_run_start(composed("hydra.run.dir=run"))
    RunFolder().on_run_start(composed("hydra.run.dir=run", "ckpt_path=last"))
    RunFolder().on_run_start(composed("hydra.run.dir=run", "ckpt_path=run/checkpoints/last.ckpt"))
    with pytest.raises(Refusal):
        RunFolder().on_run_start(composed("hydra.run.dir=run", "ckpt_path=other/checkpoints/last.ckpt"))


def test_a_score_may_be_taken_again_but_not_over_a_training_run(tmp_path):
    (tmp_path / "results.json").touch()
    enter(tmp_path, scores_only=True)
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(UserError, match=r"student\.safetensors would be overwritten"):
        enter(tmp_path, scores_only=True)


STARTS = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    "srun": {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"},
    "srun on two machines": {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"},
}


@pytest.mark.parametrize("start", STARTS)
def test_processes_that_are_started_together_share_the_folder_of_rank_0(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in STARTS[start].items():
        monkeypatch.setenv(name, value)
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK" if start == "torchrun" else "SLURM_PROCID", rank)
        cfg = composed()
        OmegaConf.get_cache(cfg)["now"][("%Y-%m-%d_%H-%M-%S",)] = f"second_{rank}"
        RunFolder().on_run_start(cfg)
        found.append(cfg.hydra.run.dir)
    assert found == ["outputs/demo/second_0"] * 2
    (meeting,) = tmp_path.glob(".transkd_*.json")
    assert [["%Y-%m-%d_%H-%M-%S"], "second_0"] in json.loads(meeting.read_text())


def test_rank_1_does_not_wait_for_ever(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "alone", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(folders, "PATIENCE", 0.0)
    with pytest.raises(Refusal, match=r"rank 1 did not hear from rank 0"):
        RunFolder().on_run_start(composed())


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "'a\\\\b'", "..", "''"])
def test_a_name_is_no_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=r"^name=.*: expected a plain name, without / and .*hydra\.run\.dir=FOLDER$"):
        RunFolder().on_run_start(composed(f"name={name}"))
    assert not list(tmp_path.iterdir())
    RunFolder().on_run_start(composed(f"hydra.run.dir={tmp_path / 'elsewhere'}"))


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"SLURM_PROCID": "3"}, 3), ({"SLURM_PROCID": "3", "LOCAL_RANK": "0"}, 0), ({"RANK": "2"}, 2)],
)
def test_the_rank_in_the_environment(monkeypatch, environment, rank):
    for name in folders.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert folders.rank() == rank
