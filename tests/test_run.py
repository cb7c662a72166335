"""Whole runs on tiny drawn data: what they write, and that they can be repeated and continued exactly."""

import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import wandb
from omegaconf import OmegaConf
from runs import TINY, assert_identical, composed, results, student

from transkd.cli import CONF
from transkd.errors import UserError
from transkd.models import load_segmenter
from transkd.run import run
from transkd.settings import TrainSettings
from transkd.training.build import teacher_source
from transkd.training.capture import Step
from transkd.training.distiller import Distiller
from transkd.training.replaying import replay


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with one finished run of TransKD-Base, its teacher trained in the same run."""
    root = tmp_path_factory.mktemp("runs")
    run(composed(root, "base", "distill=transkd_base"))
    return root


def test_what_a_run_writes(base):
    written = {path.relative_to(base / "base").as_posix() for path in (base / "base").rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "results.json",
        "student.safetensors",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "pictures/predictions.png",
        "pictures/curves.png",
    } <= written
    found = results(base, "base")
    assert found["protocol"] == "full-res"
    assert 0 <= found["mIoU"] <= 1
    assert len(found["iou"]) == 19
    assert found["seed"] == 0
    assert found["terms"] == {"csf": 1.0, "pea": 1.0, "task": 1.0}
    assert found["teacher"]["teacher_sha256"]
    assert found["versions"]["torch"] == torch.__version__


def test_the_student_is_the_plain_network(base):
    network, card = load_segmenter(base / "base" / "student.safetensors")
    assert sum(p.numel() for p in network.parameters()) == results(base, "base")["parameters"]["student"] == 3_719_027
    assert card["class_names"][0] == "road"
    assert card.get("eval_transform") is None


def test_the_checkpoint_holds_student_and_terms_but_no_teacher(base):
    checkpoint = torch.load(base / "base" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student", "criterion"}
    assert checkpoint["transkd"]["teacher_weights"].endswith(".safetensors")


def test_a_trained_teacher_is_kept_and_found_again(base, caplog):
    caplog.set_level(logging.INFO)
    run(composed(base, "again", "distill=transkd_base"))
    assert "trained by an earlier run with the same settings" in caplog.text
    assert_identical(student(base, "base"), student(base, "again"))


def test_all_weights_zero_is_training_without_a_teacher(base):
    off = ["criterion.terms.csf.weight=0", "criterion.terms.pea.weight=0", "teacher.weights=does-not-exist"]
    run(composed(base, "zero", "distill=transkd_base", *off))
    run(composed(base, "none", "distill=none"))
    assert_identical(student(base, "zero"), student(base, "none"))
    assert results(base, "zero")["mIoU"] == results(base, "none")["mIoU"]


def test_the_best_checkpoint_can_be_loaded_as_a_network(base):
    network, _ = load_segmenter(base / "base" / "checkpoints" / "best.ckpt")
    assert network.name == "segformer_b0"


class Killed(Exception):  # noqa: N818
    """Stands for the end of the process."""


@pytest.fixture
def killed_in_epoch_2(base, monkeypatch):
    """A run of four epochs that ends in the middle of its third."""
    step = Distiller.training_step

    def dies(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == 1:
            raise Killed
        return step(self, batch, batch_idx)

    settings = ["distill=transkd_base", "trainer.max_epochs=4", "name=resumed"]
    shutil.rmtree(base / "outputs" / "resumed" / "killed", ignore_errors=True)  # a run is not written over
    monkeypatch.setattr(Distiller, "training_step", dies)
    with pytest.raises(Killed):
        run(composed(base, "outputs/resumed/killed", *settings))
    monkeypatch.undo()
    return settings


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resuming_after_a_kill_gives_the_undisturbed_weights(base, killed_in_epoch_2, monkeypatch, workers):
    monkeypatch.chdir(base)
    settings = [*killed_in_epoch_2, f"data.num_workers={workers}"]
    run(composed(base, "undisturbed", *settings))
    run(composed(base, "outputs/resumed/second", *settings, "ckpt_path=last"))
    assert_identical(student(base, "undisturbed"), student(base, "outputs/resumed/second"))
    assert results(base, "outputs/resumed/second")["resumed_from"].endswith("killed/checkpoints/last.ckpt")


@pytest.mark.slow
def test_resuming_after_a_real_kill(base, tmp_path):
    """The process is killed as the system would do it, somewhere in the third epoch or later."""
    settings = ["distill=transkd_base", "trainer.max_epochs=6", "name=killed", f"data.root={base / 'data'}"]
    command = [sys.executable, "-m", "transkd.train", *TINY, *settings, f"teacher.fit.folder={base / 'teachers'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as in the undisturbed run
    process = subprocess.Popen([*command, "hydra.run.dir=outputs/killed/first"], cwd=tmp_path, env=environment)
    last = tmp_path / "outputs" / "killed" / "first" / "checkpoints" / "last.ckpt"
    while process.poll() is None and not (last.is_file() and torch.load(last, weights_only=True)["epoch"] >= 1):
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "outputs" / "killed" / "first" / "results.json").exists()
    for arguments in (["ckpt_path=last", "hydra.run.dir=second"], ["hydra.run.dir=undisturbed"]):
        subprocess.run([*command, *arguments], cwd=tmp_path, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert results(tmp_path, "second")["resumed_from"] == "outputs/killed/first/checkpoints/last.ckpt"
    assert_identical(student(tmp_path, "second"), student(tmp_path, "undisturbed"))


@pytest.mark.parametrize("change", ["distill=kd", "student=lvt"])
def test_a_checkpoint_of_another_run_is_one_clear_mistake(base, killed_in_epoch_2, monkeypatch, change):
    monkeypatch.chdir(base)
    with pytest.raises(
        UserError, match=r"ckpt_path=.*is of a run with other settings: .*killed/config\.yaml.*resume=force"
    ):
        run(composed(base, "outputs/resumed/other", *killed_in_epoch_2, change, "ckpt_path=last"))


def test_nothing_to_resume_from(base, monkeypatch):
    monkeypatch.chdir(base)
    with pytest.raises(UserError, match=r"ckpt_path=last: no checkpoints/last.ckpt in any run under .*outputs/never"):
        run(composed(base, "never", "name=never", "ckpt_path=last"))
    with pytest.raises(UserError, match="ckpt_path=nowhere: there is no file nowhere"):
        run(composed(base, "never", "ckpt_path=nowhere"))
    torch.save({"encoder": torch.zeros(1)}, base / "foreign.pth")
    with pytest.raises(UserError, match=r"is no checkpoint of a run; .* student\.weights="):
        run(composed(base, "never", "ckpt_path=foreign.pth"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(base, monkeypatch):
    step = Distiller.training_step

    def breaks(self, batch, batch_idx):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.student.head.linear_pred.bias.fill_(float("inf"))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Distiller, "training_step", breaks)
    with pytest.raises(UserError, match=r"not finite at epoch 1, step 4 \(.*task=nan.*_rgb_anon\.png") as error:
        run(composed(base, "broken", "distill=none"))
    assert "ckpt_path=last" in str(error.value)
    file = base / "broken" / "not_finite.pt"
    assert f"python -m transkd.replay {file}" in str(error.value)
    lines = replay(base / "broken")
    assert lines[0].startswith("epoch 1, step 4; files: ")
    assert lines[1] == "task: nan then, nan now"
    assert lines[2] == "weights that are not finite: student.head.linear_pred.bias"
    assert lines[3] == "first module whose output is not finite: student.head.linear_pred"
    network, _ = load_segmenter(base / "broken" / "checkpoints" / "last.ckpt")
    assert all(p.isfinite().all() for p in network.parameters())


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_offers_none(base, monkeypatch):
    """Else ckpt_path=last would go on from an older run of the same name."""
    monkeypatch.setattr(Step, "is_finite", lambda self: False)
    with pytest.raises(UserError, match=r"not finite at epoch 0, step 0 .* It has no checkpoint yet: .*again") as error:
        run(composed(base, "broken_at_once", "distill=none"))
    assert "ckpt_path" not in str(error.value)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(base, monkeypatch):
    def breaks(self):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.student.head.linear_pred.bias.fill_(float("nan"))

    monkeypatch.setattr(Distiller, "on_validation_epoch_end", breaks)
    with pytest.raises(UserError, match=r"student.head.linear_pred.bias is not finite at epoch 1"):
        run(composed(base, "nan", "distill=none", "~callbacks.best"))
    network, _ = load_segmenter(base / "nan" / "checkpoints" / "last.ckpt")
    assert all(p.isfinite().all() for p in network.parameters())


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(base, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(self):
        if self.current_epoch == 1:  # files may now grow to 1 MB and no further
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))

    monkeypatch.setattr(Distiller, "on_validation_epoch_start", fill_disk, raising=False)
    try:
        with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: File too large; the previous file is kept"):
            run(composed(base, "full", "distill=none", "~callbacks.best"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoint = torch.load(base / "full" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0
    assert [path.name for path in (base / "full" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_teacher_that_knows_nothing_stops_the_run(base):
    with pytest.raises(UserError, match=r"teacher reaches only mIoU 0\.\d+ .*teacher\.min_miou=0\.99"):
        run(composed(base, "weak", "distill=transkd_base", "teacher.min_miou=0.99"))


def test_a_teacher_is_kept_only_once_its_score_is_known(base):
    short = ["trainer.limit_train_batches=1", "teacher.min_miou=0.99", f"teacher.fit.folder={base / 'kept'}"]
    trained = base / "poor" / "teacher.safetensors"
    with pytest.raises(UserError, match=rf"below teacher\.min_miou=0\.99.* It is {trained}, and not kept"):
        run(composed(base, "poor", "distill=transkd_base", *short))
    assert trained.is_file()
    assert not (base / "kept").exists()


def test_a_smoke_run_has_a_teacher_of_its_own(base):
    composed_once = composed(base, "unused", "distill=transkd_base")
    OmegaConf.set_struct(composed_once, False)

    def kept(change=""):
        cfg = OmegaConf.merge(composed_once, OmegaConf.from_dotlist([f"trainer.{change}"] if change else []))
        return teacher_source(cfg, TrainSettings.read(cfg), SimpleNamespace(name="segformer_b0"))

    assert kept().is_file()  # the teacher of the finished run
    for smoke in (
        "fast_dev_run=true",
        "limit_train_batches=2",
        "max_steps=3",
        "overfit_batches=1",
        "precision=bf16-mixed",
        "accumulate_grad_batches=2",
        "gradient_clip_val=1",
        "devices=2",
    ):
        assert not kept(smoke).exists(), smoke
    for harmless in ("max_epochs=7", "log_every_n_steps=1", "limit_val_batches=2", "gradient_clip_val=null"):
        assert kept(harmless) == kept(), harmless


def test_a_kept_teacher_of_which_a_bit_has_changed(base):
    cfg = composed(base, "flipped", "distill=transkd_base")
    kept = teacher_source(cfg, TrainSettings.read(cfg), SimpleNamespace(name="segformer_b0"))
    whole = kept.read_bytes()
    try:
        kept.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        with pytest.raises(
            UserError, match=rf"the kept teacher {kept} is damaged.*remove both files to train it again"
        ):
            run(cfg)
    finally:
        kept.write_bytes(whole)


def test_a_term_without_a_teacher(base):
    with pytest.raises(UserError, match=r"teacher\.weights=PATH.*teacher\.fit\.max_epochs=N.*distill=none"):
        run(composed(base, "untaught", "distill=transkd_base", "teacher.fit.max_epochs=0"))


def test_a_term_that_reads_embeddings_under_a_network_without_them(base, monkeypatch):
    monkeypatch.setattr(
        "transkd.models.encoders.mit.MixTransformer.forward_stages",
        without_embeddings(torch.nn.Module.get_submodule),
    )
    with pytest.raises(UserError, match=r"Term 'pea'.*embeddings"):
        run(composed(base, "blind", "distill=transkd_base"))


def without_embeddings(_):
    from transkd.models.encoders.mit import MixTransformer

    stages = MixTransformer.forward_stages

    def forward_stages(self, image, num_stages=None):
        return stages(self, image, num_stages)[0], ()

    return forward_stages


def test_teacher_and_student_with_different_numbers_of_stages(base, monkeypatch):
    from transkd.models import FrozenTeacher

    forward = FrozenTeacher.forward

    def three_stages(self, image, needs=None):
        output = forward(self, image, needs)
        return output._replace(features=output.features[:3])

    monkeypatch.setattr(FrozenTeacher, "forward", three_stages)
    with pytest.raises(UserError, match=r"Term 'csf'.*3"):
        run(composed(base, "stages", "distill=transkd_base"))


LARGER = [
    "data.prepare.height=64",
    "data.prepare.width=128",
    "data.train_transform.transforms.0.height=64",
    "data.train_transform.transforms.0.width=128",
]
PRESETS = sorted(
    path.stem for path in (CONF / "distill").glob("*.yaml") if not path.stem.startswith(("transkd", "none"))
)
NEEDED = {
    # its discriminator wants 64×64 logits; the labels are so large here
    "skd_adversarial": ["criterion.terms.skd_adversarial.term.grid=labels"],
    # its student has the teacher's widths, as here, and fewer blocks
    "wecolora": ["+student.network.encoder.depths=[1,2,1,1]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_the_zoo_trains(base, preset):
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "pictures=0", f"data.root={base / 'larger'}"]
    run(composed(base, preset, f"distill={preset}", *LARGER, *short, *NEEDED.get(preset, [])))
    found = results(base, preset)
    assert len(found["terms"]) >= (1 if preset == "solve" else 2)
    assert all(tensor.isfinite().all() for tensor in student(base, preset).values())


@pytest.mark.parametrize("preset", ["transkd_gl", "transkd_ea", "transkd_cwd"])
def test_every_preset_trains_the_student_and_its_own_modules(base, preset):
    run(composed(base, preset, f"distill={preset}", "trainer.max_epochs=1", "trainer.limit_train_batches=2"))
    found = results(base, preset)
    assert found["parameters"]["training_modules"] > 0
    assert found["parameters"]["student"] == 3_719_027


def test_mixed_precision(base):
    run(composed(base, "bf16", "distill=transkd_ea", "trainer.precision=bf16-mixed", "trainer.limit_train_batches=2"))
    assert all(tensor.isfinite().all() for tensor in student(base, "bf16").values())


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
@pytest.mark.slow
def test_loggers(base, logger, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    extra = ["logger.wandb.offline=true"] if logger == "wandb" else []
    run(composed(base, logger, "distill=none", f"logger={logger}", "trainer.max_epochs=1", *extra))
    assert (base / logger / "metrics.csv").is_file()
    if logger == "wandb":
        wandb.finish()
    events = {"wandb": "wandb/offline-run-*/*.wandb", "tensorboard": "tensorboard/events.*"}
    (written,) = (path.read_bytes() for path in (base / logger).glob(events[logger]))
    assert b"val/full-res/mIoU" in written
    assert (b"check_val_every_n_epoch" in written) == (logger == "wandb")  # the configuration
