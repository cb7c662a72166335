"""The package of docs/extending.md, in a folder outside src/, trains, is scored, predicts and is exported."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import ROOT, files, shell_lines, text, write_files
from PIL import Image
from runs import TINY

PAGE = text("extending")
TRAIN, STUDENT, EVALUATE, PREDICT, EXPORT = [line for line in shell_lines(PAGE) if line]
# how small it is; what the package chooses itself stays
SMALL = [
    *(setting for setting in TINY if setting.startswith(("trainer.", "pictures", "teacher.min_miou", "~callbacks"))),
    "teacher=segformer_b0",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.train_transform.transforms.0.height=32",
    "data.train_transform.transforms.0.width=64",
]


def call(folder, *lines):
    """Run a script in a folder from which `mine` can be imported; gives what it printed."""
    paths = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }
    script = "\n".join(["set -e", *lines])
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def draw_photos(root):
    """Three classes in 32×64 pixels: a ground, a building on it and, in each other picture, a vehicle."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 4, "val": 2}.items():
        for i in range(count):
            label = np.zeros((32, 64), np.uint8)
            label[4:20, 8 + i : 28 + i] = 1
            label[20:28, 40:52] = 2 if i % 2 == 0 else 0
            image = np.stack([label * 80 + 40] * 3, axis=-1) + rng.integers(0, 20, (32, 64, 3), dtype=np.uint8)
            for kind, suffix, pixels in (("images", "jpg", image), ("labels", "png", label)):
                path = root / kind / split / f"{i}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder after the page's training, at 32×64 for two epochs."""
    folder = tmp_path_factory.mktemp("project")
    write_files(PAGE, folder)
    draw_photos(folder / "photos")
    small = [*SMALL, "teacher.fit.max_epochs=1"]
    call(folder, TRAIN.replace("teacher.fit.max_epochs=40", " ".join(map(quoted, small))))
    return folder


def quoted(setting):
    return f"'{setting}'"


def run_of(folder):
    (run,) = [path.parent for path in (folder / "outputs" / "photos").glob("*/student.safetensors")]
    return run


def test_the_page_shows_each_kind():
    folders = {Path(path).parent.name for path in files(PAGE)}
    assert {"mine", "term", "data", "student", "callbacks", "experiment"} == folders
    assert ROOT / "src" not in (ROOT / "mine").parents  # and the package is none of ours
    assert not (ROOT / "mine").exists()


@pytest.mark.slow
def test_it_trains(trained):
    results = json.loads((run_of(trained) / "results.json").read_text())
    assert results["terms"].keys() == {"task", "csf", "cosine"}
    assert list(results["iou"]) == ["ground", "building", "vehicle"]
    with (run_of(trained) / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {"train/cosine", "val/interior/mIoU"} <= set(columns)


@pytest.mark.slow
def test_it_is_scored_under_its_protocol(trained):
    shown = call(trained, STUDENT, " ".join([EVALUATE, *map(quoted, SMALL)]))
    assert "interior" in shown
    (path,) = (trained / "outputs" / "photos").glob("evaluate_*/results.json")
    scored, results = (json.loads(file.read_text()) for file in (path, run_of(trained) / "results.json"))
    assert scored["protocol"] == "interior"
    assert "within 2 of another class" in scored["protocol_description"]
    assert scored["mIoU"] == results["mIoU"]
    small = [*SMALL, "protocols.frame.width=4"]
    framed = EVALUATE.replace("+experiment=photos", "+experiment=framed")
    assert "frame" in call(trained, STUDENT, " ".join([framed, *map(quoted, small)]))
    scored = [json.loads(file.read_text()) for file in (trained / "outputs" / "photos").glob("evaluate_*/results.json")]
    described = {results["protocol"]: results["protocol_description"] for results in scored}
    assert described["frame"] == "full-res, without 4 pixels at the edge"


@pytest.mark.slow
def test_its_student_predicts_and_is_exported(trained):
    call(trained, STUDENT, PREDICT, EXPORT)
    assert len(list((trained / "predictions" / "ids").glob("*.png"))) == 2
    assert (trained / "student.onnx").is_file()
