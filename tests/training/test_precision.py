"""trainer.precision=auto follows the hardware, compile=auto the length of the run, the optimizer its kernels."""

import copy
import functools
import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from runs import assert_identical, composed, results, student
from torch import nn

from transkd.errors import UserError
from transkd.models import create_segmenter
from transkd.run import run
from transkd.settings import TrainerSettings
from transkd.training import device as device_module
from transkd.training.device import EARNED, Device
from transkd.training.optimization import Optimization
from transkd.training.precision import choose_precision
from transkd.training.rehearsal import planned_steps
from transkd.training.scoring import score

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({"avx2": True}, "32-true")],
)
def test_a_cpu_trains_in_bf16_if_it_multiplies_in_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("auto", CPU, trains=False) == "32-true"
    assert choose_precision("64-true", CPU) == "64-true"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_likewise(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("auto", torch.device("mps")) == "32-true"


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: CUDA)
    checked = []
    monkeypatch.setattr(device_module, "check_compiler", lambda *given: checked.append(given))
    return checked


@pytest.mark.parametrize(
    ("steps", "obstacles", "mode"),
    [
        (EARNED, [], "reduce-overhead"),
        (None, [], "reduce-overhead"),
        (EARNED, ["automatic weights"], "default"),
        (EARNED - 1, [], None),
    ],
)
def test_a_gpu_compiles_runs_that_are_long_enough(on_a_gpu, steps, obstacles, mode, caplog):
    device = Device.choose()
    device.check()
    assert on_a_gpu == []  # not before it is decided
    with caplog.at_level(logging.INFO):
        assert device.settled(steps, obstacles).compile_mode == mode
    assert on_a_gpu == ([] if mode is None else [(CUDA, mode)])
    assert all(name in caplog.text for name in obstacles)


def test_without_a_compiler_auto_is_eager_and_true_an_error(on_a_gpu, monkeypatch, caplog):
    def missing(*given):
        raise UserError("no gcc")

    monkeypatch.setattr(device_module, "check_compiler", missing)
    assert Device.choose().settled(EARNED).compile_mode is None
    assert "no gcc" in caplog.text
    with pytest.raises(UserError, match="no gcc"):
        Device.choose(compile=True).check()


def test_a_cpu_is_eager_unless_told_otherwise():
    assert Device.choose("cpu").settled(10 * EARNED).compile_mode is None
    assert Device.choose("cpu", compile=True).settled(1).compile_mode == "default"


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"max_epochs": 3}, 36),  # 50 images in batches of 4
        ({"max_epochs": 3, "accumulate_grad_batches": 5}, 9),
        ({"max_epochs": 3, "max_steps": 20}, 20),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 18),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": -1}, None),
        ({"max_epochs": 3, "fast_dev_run": True}, 1),
    ],
)
def test_steps_of_a_run(trainer, expected):
    data = SimpleNamespace(batches=lambda: 50 // 4)
    assert planned_steps(data, TrainerSettings(**trainer)) == expected


def configured(optimizer, precision="32-true", clip=None):
    layer = nn.Linear(3, 2)
    trainer = SimpleNamespace(precision=precision, gradient_clip_val=clip, estimated_stepping_batches=1)
    return Optimization(optimizer).configure(layer.parameters(), trainer)


def steps_of(optimizer):
    return configured(optimizer).defaults.get("fused")


def test_a_fused_kernel_is_used_where_there_is_one():
    assert steps_of(functools.partial(torch.optim.AdamW, lr=1e-3)) is True
    assert steps_of(functools.partial(torch.optim.AdamW, lr=1e-3, fused=False)) is False
    assert steps_of(functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True)) is None
    assert steps_of(functools.partial(torch.optim.Adadelta, lr=1e-3)) is None  # has none


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_clips_the_gradients_of_the_optimizer_under_autocast(precision):
    optimizer = configured(functools.partial(torch.optim.AdamW, lr=1e-3), precision, clip=1.0)
    (weight, bias) = optimizer.param_groups[0]["params"]
    weight.grad, bias.grad = torch.full_like(weight, 3.0), torch.zeros_like(bias)
    MixedPrecision(precision, "cpu").clip_gradients(optimizer, 1.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert configured(functools.partial(torch.optim.AdamW, lr=1e-3), precision).defaults["fused"] is True


def test_a_score_leaves_a_network_in_its_dtype():
    class InDouble:
        def validate(self, scorer, datamodule, verbose):
            scorer.double()  # as Lightning does for trainer.precision=64-true
            scorer.scores = SimpleNamespace(miou=torch.tensor(0.5))

    network = create_segmenter("segformer_b0", 3, encoder={"channels": [8, 16, 40, 64], "depths": [1] * 4})
    before = copy.deepcopy(network.state_dict())
    score(network, SimpleNamespace(), "full-res", InDouble())
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        name: tensor.dtype for name, tensor in network.state_dict().items()
    }
    assert_identical(before, network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_student_that_starts_from_its_teacher_at_any_precision(tmp_path, precision):
    small = [f"+{who}.network.encoder.channels=[8,16,40,64]" for who in ("student", "teacher")]
    start = ["student.from_teacher=solve", "student.solve.images=2", "term=[csf,fitnet]", "trainer.max_epochs=1"]
    for name in ("run", "again"):  # the first trains the teacher, the second finds it
        run(composed(tmp_path, name, *small, *start, f"trainer.precision={precision}", "distill=none", "pictures=0"))
    assert results(tmp_path, "run")["mIoU"] >= 0
    assert_identical(student(tmp_path, "run"), student(tmp_path, "again"))
