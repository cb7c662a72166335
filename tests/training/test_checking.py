"""The command ``check``: what it finds, measures and writes."""

import json
import mmap
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damage import damage, write_many
from hydra import compose, initialize_config_dir
from PIL import Image
from runs import TINY, composed
from small_data import Samples

import transkd.check
from transkd.cli import CONF
from transkd.losses import Criterion, TaskCrossEntropy
from transkd.models import create_segmenter
from transkd.training.build import build_side_trainer
from transkd.training.checking import Findings, check
from transkd.training.checking_report import report_check
from transkd.training.costs import ONE_DEVICE, estimate_hours
from transkd.training.device import Device
from transkd.training.probing import PeakMemory, ValidationTimer, taps_and_readers, term_gradients


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def good(root):
    """The findings of a run that would work."""
    least = ["+trainer.min_epochs=2", "+trainer.min_steps=8"]  # of the run, not of the check
    cache = f"data.cache={root / 'frames'}"
    return check(composed(root, "good", "distill=transkd_base", cache, *least, config="check"))


def test_a_good_run_has_no_problem(good):
    assert good.problems == []


def test_what_it_writes(root, good):
    assert {path.name for path in (root / "good").iterdir()} == {"check.json", "sheet.png"}
    written = json.loads((root / "good" / "check.json").read_text())
    assert written["problems"] == []
    assert written["files"]["train"]["images"] == 8
    assert Image.open(root / "good" / "sheet.png").width > 400
    assert {path.name for path in root.iterdir()} == {"data", "good"}  # no teacher, no frames


def test_what_it_says_of_networks_and_terms(good):
    readers = {tap["name"]: tap["readers"] for tap in good.facts["taps"]}
    assert readers["logits"] == ["task"]
    assert all(readers[f"features {i}"] == ["csf"] and readers[f"embeddings {i}"] == ["pea"] for i in range(1, 5))
    assert good.facts["taps"][-1]["student"] == [1, 19, 8, 16]
    terms = good.facts["terms"]
    assert {name: term["weight"] for name, term in terms.items()} == {"task": 1.0, "csf": 1.0, "pea": 1.0}
    assert terms["csf"]["reads"] == ["features"]
    assert all(term["gradient"] > 0 for term in terms.values())
    parameters = good.facts["parameters"]
    assert parameters["student"] == parameters["trained_of_the_student"] == 3_719_027
    assert parameters["with_training_modules"] > 3_719_027


def test_what_it_measures(good):
    assert good.facts["memory"]["bytes"] > 10**8
    assert good.facts["memory"]["batch_size"] == 2
    assert good.facts["speed"]["step_seconds"] > 0
    assert good.facts["speed"]["steps_timed"] <= 2  # of three, the first as warm-up
    assert good.facts["speed"]["loader_images_per_second"] > 0
    assert good.facts["hours"] > 0


def test_all_that_is_wrong_is_said_at_once(root, good, monkeypatch, capsys, tmp_path):
    """Through the command itself: exit status 1 and one line for each."""
    data = tmp_path / "CamVid"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (data / folder).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(data / split / f"{i}.png")
            Image.fromarray(rng.integers(0, 10, (32, 64), dtype=np.uint8)).save(data / f"{split}annot" / f"{i}.png")
    (data / "train" / "0.png").unlink()
    (data / "train" / "1.png").write_bytes(b"")
    Image.fromarray(np.full((32, 64), 99, np.uint8)).save(data / "valannot" / "2.png")
    own = [
        part for part in TINY if not part.startswith(("+experiment", "data.prepare", "data.train_transform", "distill"))
    ]
    arguments = ["+experiment=camvid", *own, f"data.root={data}", "distill=kd", "teacher.weights=nowhere.pth"]
    arguments += ["student.network.num_classes=12", "data.num_workers=0", "ckpt_path=gone.ckpt", "data.batch_size=4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["transkd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        transkd.check.main()
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "warning: "))]
    parts = [
        "ckpt_path=gone.ckpt: there is no file gone.ckpt",
        f"label without an image: {data / 'trainannot' / '0.png'}",
        f"cannot read the image {data / 'train' / '1.png'}",
        "2.png: label values [99] are outside the 11 classes",
        "data.batch_size=4 on 1 device(s) is more than the 3 training images",
        "weights file not found: nowhere.pth",
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    assert [part for part in parts if sum(part in line for line in errors) != 1] == []
    assert len(errors) == len(parts)
    assert any("the class bicyclist never occurs in the labels of train" in line for line in lines)


def test_one_mistake_of_many_files_is_counted(tmp_path, capsys):
    many = [f"labels/{i}.png: label values [{90 + i}] are outside the 3 classes" for i in range(12)]
    report_check([many[0], "weights file not found: a.pth", *many[1:]], [], {}, tmp_path)
    printed = capsys.readouterr()
    errors = [line.removeprefix("error: ") for line in printed.err.splitlines()]
    assert errors == [*many[:5], "7 more like the last, all in check.json", "weights file not found: a.pth"]
    assert "problems: 13, warnings: 0" in printed.out
    assert len(json.loads((tmp_path / "check.json").read_text())["problems"]) == 13


def test_a_crop_in_the_validation_transform_is_one_line(root, good):
    crop = "{_target_: albumentations.CenterCrop, height: 16, width: 16}"
    transform = f"data.eval_transform={{_target_: albumentations.Compose, transforms: [{crop}]}}"
    (line,) = check(composed(root, "crop", "distill=none", transform, config="check")).problems
    assert line.startswith("data.eval_transform cannot be undone: it cuts off pixels of the image")
    assert "protocol=input-res" in line


def test_a_run_without_training_can_be_checked(root, good):
    found = check(composed(root, "untrained", "distill=none", "trainer.max_epochs=0", config="check"))
    assert found.problems == []
    assert "hours" not in found.facts


def test_measurements_wait_for_no_other_machine(root):
    cfg = composed(root, "nodes", "+trainer.num_nodes=2", config="check")
    assert build_side_trainer(cfg, **ONE_DEVICE).world_size == 1


def test_time_of_validation_batches_without_the_start_of_the_loader():
    timer = ValidationTimer(Device.choose("cpu"))
    timer.marks = [0.0, 10.0]
    assert timer.seconds == 10.0
    timer.marks += [13.0, 14.0]
    assert timer.seconds == 2.0


def test_a_student_and_a_schedule_that_do_not_fit(root, good):
    never = "+criterion.terms.pea.schedule={_target_:transkd.losses.Schedule,start:3,unit:epoch}"
    wrong = ["distill=transkd_base", "student.network.num_classes=18", never]
    first, second = check(composed(root, "wrong", *wrong, config="check")).problems
    assert first == "segformer_b0 has 18 classes, the data has 19"
    assert "Term 'pea'" in second


@pytest.mark.slow
def test_200_damaged_files_are_all_found(tmp_path):
    data, rng = tmp_path / "CamVid", np.random.default_rng(1)
    files = []
    for split, count in (("train", 100), ("val", 50)):
        for folder in (split, f"{split}annot"):
            (data / folder).mkdir(parents=True)
        pairs = write_many(data / split, data / f"{split}annot", count, rng)
        files += [file for pair in pairs for file in pair]
    broken = sorted(files[i] for i in rng.permutation(len(files))[:200])
    for turn, path in enumerate(broken):
        damage(path, turn, rng)
    own = [
        part for part in TINY if not part.startswith(("+experiment", "data.prepare", "data.train_transform", "distill"))
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = [
            "+experiment=camvid",
            *own,
            "distill=none",
            "all=true",
            f"data.root={data}",
            f"run_dir={tmp_path / 'run'}",
        ]
        found = check(compose("check", settings))
    assert len(found.problems) == 200
    assert {path for path in files if any(f" {path}:" in line for line in found.problems)} == set(broken)
    assert found.facts["speed"]["step_seconds"] > 0  # on the files that are intact


def test_a_mistake_of_another_library_is_a_problem_too():
    findings = Findings(batch_size=7)

    def fails(error):
        raise error

    assert findings.attempt("the step", fails, ZeroDivisionError("no\nway")) is None
    assert findings.attempt("the step", fails, torch.OutOfMemoryError("")) is None
    assert "ZeroDivisionError: no way" in findings.problems[0]
    assert "data.batch_size=7 does not fit into the memory" in findings.problems[1]


class Data:
    """One sample with two classes."""

    batch_size = 1

    def dataset(self, split):
        from transkd.data import Batch

        image = torch.arange(3 * 64 * 64).view(3, 64, 64).to(torch.uint8)
        return Samples([Batch(image, (image[0] > 128).to(torch.uint8), "one")])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_backward_pass(checkpointing):
    torch.manual_seed(0)
    encoder = {"channels": [8, 16, 40, 64], "depths": [1, 1, 1, 1], "drop_path_rate": 0.1}
    student = create_segmenter("segformer_b0", 2, width=16, encoder=encoder)
    student.encoder.set_grad_checkpointing(checkpointing)
    criterion = Criterion({"task": {"term": TaskCrossEntropy(), "weight": 2.0}})
    values, statistics = term_gradients(student, None, criterion, Data())
    assert student.training
    image, target, _ = Data().dataset("train")[0]
    output = student.eval()(image[None])
    taps = taps_and_readers(criterion, output, None, target[None].long())
    assert [tap.name for tap in taps if tap.readers] == ["logits"]
    assert criterion.training
    logits = output.logits
    full = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")
    loss = torch.nn.functional.cross_entropy(full, target[None].long())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(values["task"], loss.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(statistics["task/norm"], norm, rtol=1e-4, atol=0)


def test_hours():
    data = SimpleNamespace(
        batches=lambda devices: 100 // devices, dataset=lambda split: range(7), eval_batch_size=2, num_workers=2
    )
    trainer = SimpleNamespace(
        max_epochs=9,
        max_steps=-1,
        accumulate_grad_batches=2,
        world_size=2,
        check_val_every_n_epoch=2,
        val_check_interval=1.0,
        limit_train_batches=1.0,
        limit_val_batches=1.0,
    )
    # 9 epochs of 50 batches of 3 s, 4 validations of 2 batches of 5 s on each of two devices
    assert estimate_hours(trainer, data, 2.0, 3.0, 5.0) == pytest.approx((9 * 50 * 3 + 4 * 2 * 5) / 3600)
    data.num_workers = 0  # without workers one waits for the other
    trainer.limit_train_batches, trainer.limit_val_batches = 10, 0.5
    assert estimate_hours(trainer, data, 2.0, 3.0, 5.0) == pytest.approx((9 * 10 * 5 + 4 * 1 * 5) / 3600)
    trainer.max_steps = 20  # of two batches: four epochs
    assert estimate_hours(trainer, data, 2.0, 3.0, 5.0) == pytest.approx((4 * 10 * 5 + 2 * 1 * 5) / 3600)
    trainer.val_check_interval = 0.5  # twice in each epoch that has one
    assert estimate_hours(trainer, data, 2.0, 3.0, 5.0) == pytest.approx((4 * 10 * 5 + 4 * 1 * 5) / 3600)
    trainer.val_check_interval, trainer.check_val_every_n_epoch = 15, None  # batches, across epochs
    assert estimate_hours(trainer, data, 2.0, 3.0, 5.0) == pytest.approx((4 * 10 * 5 + 2 * 1 * 5) / 3600)
    trainer.max_epochs = trainer.max_steps = -1
    assert estimate_hours(trainer, data, 2.0, 3.0, 5.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset elsewhere")
def test_the_peak_of_memory():
    memory = PeakMemory(Device.choose("cpu"))
    memory.start()
    before = memory.read()
    with mmap.mmap(-1, 2 * 10**8) as pages:
        for page in range(0, len(pages), mmap.PAGESIZE):
            pages[page] = 1
    assert memory.read() - before > 1.5 * 10**8
    memory.start()
    assert memory.read() < before + 10**8
