"""Families made by hand of tiny networks: the table's figures, the picture, and what is refused."""

import json
import shutil

import albumentations as A
import family
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from runs import composed

from transkd.files import sha256
from transkd.models import create_segmenter, save_segmenter
from transkd.run import run

SIZE = (32, 64)
DATA = {"root": "CamVid", "num_classes": 5, "batch_size": 2}
RESIZE = A.Compose([A.Resize(*SIZE)]).to_dict()


def tiny(channels, depths=(1, 1, 1, 1)):
    encoder = {"channels": list(channels), "depths": list(depths)}
    return create_segmenter("segformer_b0", 5, encoder=encoder, width=16)


def add_job(root, number, network, miou, start=None, overrides=(), teacher=None, transform=RESIZE, **changes):
    folder = root / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides) or "[]\n")
    save_segmenter(network, folder / "student.safetensors", eval_transform=transform)
    OmegaConf.save({"data": DATA | changes.pop("data", {})}, folder / "config.yaml")
    about = {} if teacher is None else {"teacher_weights": str(teacher), "teacher_sha256": sha256(teacher), "mIoU": 0.5}
    started = None if start is None else {"mIoU": start}
    results = {"mIoU": miou, "protocol": "input-res", "seed": 0, "teacher": about, "start": started}
    (folder / "results.json").write_text(json.dumps(results | changes))


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_segmenter(tiny((16, 32, 80, 128), (1, 2, 1, 1)), path)
    return path


@pytest.fixture
def sweep(tmp_path, teacher):
    root = tmp_path / "sweep"
    add_job(root, 0, tiny((4, 8, 20, 32)), 0.4, 0.3, teacher=teacher)
    add_job(root, 1, tiny((8, 16, 40, 64), (1, 1, 2, 1)), 0.45, 0.425, teacher=teacher)
    return root


def rows_of(capsys, *arguments):
    family.main([*map(str, arguments), "--markdown", "--rounds", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table(sweep, capsys):
    header, _, small, large, last = rows_of(capsys, sweep)
    assert header == ["job", "widths", "depths", "M", "GFLOP", "ms", "step 0", "trained", "% of teacher"]
    assert [row[:3] for row in (small, large, last)] == [
        ["0", "4 8 20 32", "1 1 1 1"],
        ["1", "8 16 40 64", "1 1 2 1"],
        ["teacher", "16 32 80 128", "1 2 1 1"],
    ]
    # 0.4 / 0.5 and 0.45 / 0.5 of the teacher
    assert [row[-3:] for row in (small, large, last)] == [
        ["30.00", "40.00", "80.0"],
        ["42.50", "45.00", "90.0"],
        ["–", "50.00", "100.0"],
    ]
    parameters = sum(parameter.numel() for parameter in tiny((16, 32, 80, 128), (1, 2, 1, 1)).parameters())
    assert last[3] == f"{parameters / 1e6:.2f}"
    assert 0 < float(small[4]) <= float(large[4]) < float(last[4])
    assert all(float(row[5]) > 0 for row in (small, large, last))


def test_costs_are_those_of_the_deployed_network_at_the_given_size():
    networks = [tiny((4, 8, 20, 32)).eval(), create_segmenter("resnet18", 5, head="fpn", width=16).eval()]
    (parameters, once, seconds), _ = family.measure_costs(networks, (32, 64), 1, False)
    assert parameters == sum(parameter.numel() for parameter in networks[0].parameters())
    assert seconds > 0
    # the reduced keys and values grow too, so attention grows by more than the pixels
    assert family.measure_costs(networks, (64, 64), 1, False)[0][1] > 2 * once * 0.99
    assert family.describe_shape(networks[1]) == ("64 128 256 512", "–")


def test_the_picture_and_the_terminal(sweep, tmp_path, capsys):
    family.main([str(sweep), "--rounds", "1", "--output", str(tmp_path / "family.png")])
    said = capsys.readouterr().out
    assert "one image of 32×64" in said
    assert "cores" in said
    assert Image.open(tmp_path / "family.png").size[0] > 1000


def test_a_teacher_that_is_gone_or_changed_keeps_its_score(sweep, teacher, tmp_path, capsys):
    for what in ("has changed", "no such file"):
        teacher.write_bytes(b"") if what == "has changed" else teacher.unlink()
        family.main([str(sweep), "--rounds", "1", "--markdown", "--output", str(tmp_path / "family.png")])
        said = capsys.readouterr()
        assert what in said.err
        last = [line for line in said.out.splitlines() if line.startswith("|")][-1]
        assert last.replace(" ", "") == "|teacher|–|–|–|–|–|–|50.00|100.0|"


def test_students_from_random_weights_and_other_settings(tmp_path, capsys):
    for number, (seed, rate) in enumerate([(0, "1e-3"), (1, "1e-4")]):
        overrides = [f"seed={seed}", f"optim.optimizer.lr={rate}", "+student.network.encoder.depths=[1,1,1,1]"]
        add_job(tmp_path, number, tiny((4, 8, 20, 32)), 0.4, overrides=overrides, seed=seed)
    header, _, *rows = rows_of(capsys, tmp_path)
    assert header[:4] == ["job", "optim.optimizer.lr", "seed", "widths"]
    assert [row[1:3] for row in rows] == [["1e-3", "0"], ["1e-4", "1"]]
    assert [row[-3:] for row in rows] == [["–", "40.00", "–"]] * 2  # no teacher, no start


def refused(capsys, message, *arguments):
    with pytest.raises(SystemExit) as caught:
        family.main([*map(str, arguments), "--rounds", "1"])
    said = str(caught.value.code)
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said
    assert capsys.readouterr().out == ""


def test_runs_that_are_no_family(sweep, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_segmenter(tiny((16, 32, 80, 128)), other)
    wrong = {
        "scores of different protocols are not comparable: input-res (job 1), full-res (job 2)": {
            "protocol": "full-res"
        },
        "data.root is CamVid in job 0 and elsewhere in job 2": {"data": {"root": "elsewhere"}},
        "a family has one teacher; the teachers differ of jobs 1, 2": {"teacher": other},
    }
    for message, changes in wrong.items():
        add_job(sweep, 2, tiny((4, 8, 20, 32)), 0.4, **changes)
        refused(capsys, message, sweep)
        shutil.rmtree(sweep / "2")


def test_folders_that_hold_no_family(sweep, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(capsys, "no such folder", tmp_path / "absent")
    refused(capsys, "no jobs in", tmp_path / "empty")
    refused(capsys, "--output: no such folder", sweep, "--output", tmp_path / "absent" / "family.png")
    (sweep / "1" / "student.safetensors").unlink()
    refused(capsys, "job 1 has no student.safetensors", sweep)
    for number in range(2):
        (sweep / str(number) / "results.json").unlink()
    refused(capsys, "has results", sweep)


def test_images_of_their_own_size_want_a_size(tmp_path, capsys):
    add_job(tmp_path, 0, tiny((4, 8, 20, 32)), 0.4, transform=None)
    refused(capsys, "--size HEIGHT WIDTH", tmp_path)
    assert len(rows_of(capsys, tmp_path, "--size", 32, 32)) == 3


@pytest.mark.slow
def test_what_a_run_writes_is_read(tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "b0.safetensors"
    save_segmenter(create_segmenter("segformer_b0", 19), path)
    overrides = ["distill=none", "student.from_teacher=solve", f"teacher.weights={path}", "student.solve.images=2"]
    overrides += [f"+student.network.encoder.{name}" for name in ("channels=[4,8,20,32]", "depths=[1,1,1,1]")]
    overrides += ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "pictures=0"]
    run(composed(tmp_path, "sweep/0", *overrides))
    (tmp_path / "sweep" / "0" / ".hydra").mkdir()
    OmegaConf.save(overrides, tmp_path / "sweep" / "0" / ".hydra" / "overrides.yaml")
    _, _, student, teacher = rows_of(capsys, tmp_path / "sweep", "--size", *SIZE)
    assert student[1:3] == ["4 8 20 32", "1 1 1 1"]
    assert teacher[1:3] == ["32 64 160 256", "2 2 2 2"]
    assert float(student[-3]) >= 0
