"""Scheduled and automatic weights, looks at gradients, and a student at another scale, in whole runs."""

import csv

import pytest
import torch
from hydra.utils import instantiate
from runs import assert_identical, composed, results, run_until_killed, student

from transkd.errors import UserError
from transkd.models import FrozenTeacher, load_segmenter
from transkd.run import run
from transkd.settings import TrainerSettings
from transkd.training.distiller import Distiller
from transkd.training.rehearsal import check_schedules

SHORT = ["pictures=0", "trainer.max_epochs=2", "distill=transkd_cwd", "term=[pea,cwd]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("schedules")


def column(root, name, key):
    with (root / name / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def test_a_teacher_that_nobody_reads_any_more_does_not_run(root, monkeypatch):
    asked = []
    forward = FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", lambda self, *args: (asked.append(args[1]), forward(self, *args))[1])
    off = [f"+criterion.terms.{term}.schedule={{_target_:transkd.losses.Schedule,end:{end},unit:epoch}}"
           for term, end in (("pea", 1), ("cwd", 0.5))]  # fmt: skip
    run(composed(root, "early", *SHORT, *off))
    steps = 4  # an epoch: 8 images, 2 a batch; asked[0] is before step 1, where the terms are weighed
    assert asked[1:] == [{"embeddings", "logits"}] * (steps // 2) + [{"embeddings"}] * (steps // 2)
    assert len(column(root, "early", "train/pea")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("start:0.99", "'pea': .* never turns on at a step of a run of 2 epochs and 8 steps"),
        ("start:3,unit:epoch", "2 epochs"),
    ],
)
def test_a_schedule_that_never_turns_on_stops_the_run_at_once(root, monkeypatch, settings, message):
    monkeypatch.setattr(Distiller, "training_step", lambda *args: pytest.fail("trained"))
    never = f"+criterion.terms.pea.schedule={{_target_:transkd.losses.Schedule,{settings}}}"
    with pytest.raises(UserError, match=message):
        run(composed(root, "never", *SHORT, never))


def test_the_early_look_at_schedules_asks_for_no_epochs_and_counts_every_step(root):
    def look(start, *settings):
        late = f"+criterion.terms.pea.schedule={{_target_:transkd.losses.Schedule,{start}}}"
        cfg = composed(root, "look", *SHORT, late, *settings)
        cfg.channels.student = cfg.channels.teacher = [8, 16, 40, 64]
        data = instantiate(cfg.data)
        data.prepare_data()
        check_schedules(instantiate(cfg.criterion), data, TrainerSettings.read(cfg.trainer))

    second = "start:1,unit:step"
    look(second, "trainer.max_epochs=null")
    look(second, "trainer.max_epochs=1", "trainer.accumulate_grad_batches=3")  # 4 batches are 2 steps
    with pytest.raises(UserError, match="the run has 1 epochs and 1 steps"):
        look(second, "trainer.max_epochs=1", "trainer.accumulate_grad_batches=4")
    look("start:2,unit:epoch", "trainer.max_epochs=-1", "+trainer.max_steps=9")
    with pytest.raises(UserError, match="the run has 2 epochs and 8 steps"):  # max_steps ends it first
        look("start:2,unit:epoch", "trainer.max_epochs=100", "+trainer.max_steps=8")


@pytest.mark.slow
def test_automatic_weights_are_saved_and_reused(root, monkeypatch):
    auto = ['criterion.terms.cwd.weight="auto(0.3)"', "trainer.max_epochs=4", "name=auto"]
    run(composed(root, "undisturbed", *SHORT, *auto))
    weight = results(root, "undisturbed")["terms"]["cwd"]
    assert 0 < weight < float("inf")
    run_until_killed(composed(root, "killed", *SHORT, *auto), 3, monkeypatch)
    run(composed(root, "resumed", *SHORT, *auto, f"ckpt_path={root / 'killed/checkpoints/last.ckpt'}"))
    assert results(root, "resumed")["terms"]["cwd"] == weight
    assert_identical(student(root, "undisturbed"), student(root, "resumed"))


@pytest.mark.slow
def test_gradients_can_be_looked_at_and_change_nothing(root):
    run(composed(root, "plain", *SHORT))
    run(composed(root, "looked", *SHORT, "gradients_every=2"))
    assert_identical(student(root, "plain"), student(root, "looked"))
    for key in ("gradient/task/norm", "gradient/cwd/norm", "gradient/pea/norm"):
        assert all(value > 0 for value in column(root, "looked", key))
    assert all(-1 <= value <= 1 for value in column(root, "looked", "gradient/cwd/cosine"))


def test_a_student_may_see_the_image_smaller_than_its_teacher(root):
    half = ["student.network.scale=0.5", "data.prepare.height=64", "data.prepare.width=64", "pictures=0"]
    half += [f"data.root={root / 'square'}", "data.train_transform.transforms.0.height=64"]
    run(composed(root, "half", "distill=none", "term=[csf,cwd]", "trainer.max_epochs=1", *half))
    network, card = load_segmenter(root / "half" / "student.safetensors")
    assert (network.scale, card["recipe"]["scale"]) == (0.5, 0.5)
    output = network.eval()(torch.zeros(1, 3, 64, 96))
    assert output.image.shape == (1, 3, 32, 48)
    assert network.predict(torch.zeros(1, 3, 64, 96)).shape == (1, 64, 96)
