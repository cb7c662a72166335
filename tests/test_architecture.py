"""The walks of docs/architecture.md are the ones that the code takes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import ROOT, blocks, text
from omegaconf import DictConfig
from runs import TINY

import transkd
from transkd import train
from transkd.data.dataset import Batch
from transkd.models import load_segmenter, save_segmenter
from transkd.training.distiller import Distiller

SOURCE = Path(transkd.__file__).parent
PREFIX = f"{SOURCE}{os.sep}"
PAGE = text("architecture")
WALKS = ("The walk of one batch", "The walk of one weights file", "The walk of the configuration")


def listed(heading):
    """The files under a heading, in order."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = blocks(section, "text")
    return [line.split()[0] for line in block.splitlines()]


class Walk:
    """The files of ours whose functions are called while it is on, each where it is first entered."""

    def __init__(self, counts: Callable[[dict], bool] = lambda arguments: True):
        self.files = []
        self.counts = counts

    def __call__(self, frame, event, argument):
        path = frame.f_code.co_filename
        if path.startswith(PREFIX) and frame.f_code.co_name != "<module>":
            name = f"src/transkd/{Path(path).relative_to(SOURCE).as_posix()}"
            if name not in self.files and self.counts(frame.f_locals):
                self.files.append(name)
        # giving None leaves the lines of this call alone

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """One tiny training run, watched: the files of a step, of a weights file, and those that hold the configuration."""
    batch, weights = Walk(), Walk()
    cfg = Walk(lambda arguments: any(isinstance(value, DictConfig) for value in arguments.values()))
    training_step = Distiller.training_step

    def watched_step(self, *arguments):
        if self.teacher is None or "step" in seen:
            return training_step(self, *arguments)
        seen.add("step")
        with batch:
            assert isinstance(next(iter(self.trainer.datamodule.train_dataloader())), Batch)
            return training_step(self, *arguments)

    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("walks"))
        patch.setattr(Distiller, "training_step", watched_step)
        patch.setattr("transkd.report.draw_curves", lambda *paths: None)  # a million calls, none of a walk
        patch.setattr(
            sys, "argv", ["transkd", *TINY, "distill=none", "term=[csf]", "trainer.max_epochs=1", "pictures=0"]
        )
        with cfg:
            train.main()
        (student,) = Path("outputs").glob("*/*/student.safetensors")
        with weights:
            network, _ = load_segmenter(student)
            save_segmenter(network, "again.safetensors")
    return dict(zip(WALKS, (batch.files, weights.files, cfg.files), strict=True))


@pytest.mark.parametrize("heading", WALKS)
def test_a_walk_is_the_one_that_is_taken(walks, heading):
    assert listed(heading) == walks[heading]


@pytest.mark.parametrize("heading", WALKS)
def test_a_walk_enters_no_file_twice(heading):
    files = listed(heading)
    assert len(set(files)) == len(files)
    assert all((ROOT / file).is_file() for file in files)


def test_the_map_names_what_exists():
    shown = listed("Map of the code")
    assert len(set(shown)) == len(shown)
    for path in shown:
        assert (ROOT / path).exists(), path
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert rooms <= {path.split("/")[2] for path in shown if path.startswith("src/")}


def test_the_picture_names_every_room():
    (picture,) = blocks(PAGE, "mermaid")
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert all(f"{room}/" in picture for room in rooms)
