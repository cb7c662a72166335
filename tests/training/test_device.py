"""Compiled code and channels-last memory: what is computed and what is kept stay the same."""

import copy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hydra.utils import instantiate
from runs import composed, results, student
from torch import nn
from torch._dynamo.utils import counters

from transkd.errors import UserError
from transkd.losses import Criterion, KDLoss, Progress, Schedule, TaskCrossEntropy
from transkd.models import (
    FrozenTeacher,
    MixTransformer,
    SegformerHead,
    Segmenter,
    add_lora,
    create_segmenter,
    load_segmenter,
)
from transkd.run import run
from transkd.training.compilation import check_compiler, compile_in_place, regions
from transkd.training.device import Device
from transkd.training.distiller import Distiller

WIDTHS = {"student": (8, 16, 24, 32), "teacher": (16, 16, 24, 32)}
PRESETS = ["transkd_base", "transkd_ea", "transkd_gl", "kd", "cwd"]
SMALL = [
    f"+{who}.network.encoder.{setting}"
    for who in ("student", "teacher")
    for setting in ("channels=[8,16,40,64]", "depths=[1,1,1,1]")
]
# calls that make Python wait for the device
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Writes down which operators run that need a value on the host."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in SYNCHRONISING or boolean:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def network(who="student", drop_path=0.0):
    widths = WIDTHS[who]
    encoder = MixTransformer(widths, depths=(1,) * 4, heads=(1, 2, 3, 4), drop_path_rate=drop_path, num_classes=0)
    return Segmenter(encoder, SegformerHead(widths, 16, 19), 19)


def criterion_of(tmp_path, preset):
    cfg = composed(tmp_path, "run", f"distill={preset}")
    cfg.channels.student, cfg.channels.teacher = (list(WIDTHS[who]) for who in ("student", "teacher"))
    return instantiate(cfg.criterion)


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8), torch.randint(19, (2, 64, 96))


@pytest.fixture
def eager_backend(monkeypatch):
    """Compile without generating code; a graph break is an error."""
    plain = nn.Module.compile

    def compile_without_code(module, mode, dynamic):
        plain(module, backend="eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_without_code)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_waits_for_one_look_at_the_loss(tmp_path, preset, monkeypatch):
    monkeypatch.setattr(Distiller, "log", lambda *args, **settings: None)
    held, ours, theirs = criterion_of(tmp_path, preset), network(drop_path=0.1), FrozenTeacher(network("teacher"))
    distiller = Distiller(ours, held, theirs)
    with Calls() as calls:
        distiller.training_step(batch(), 0).backward()
        assert calls.waits == []  # the device has the backward pass to compute before it is looked at
        distiller.on_after_backward()
    assert calls.waits == ["_local_scalar_dense"]


def test_automatic_and_scheduled_weights_wait_for_nothing_once_they_are_set():
    kd = {"term": KDLoss(), "weight": "auto(0.3)", "schedule": Schedule(fall=1.0, end=2.0)}
    held = Criterion({"task": {"term": TaskCrossEntropy(), "weight": 1.0}, "kd": kd})
    ours, theirs = network(), network("teacher")
    image, target = batch()

    def step(number):
        held.advance(Progress(number, steps=20, epochs=1))
        looks = list(ours.parameters()) if held.calibrating else ()
        held(ours(image), theirs(image), target, looks).total.backward()

    for number in range(11):
        step(number)
    with Calls() as calls:
        step(11)
    assert calls.waits == []
    held.load_state_dict(Criterion({"task": {"term": TaskCrossEntropy(), "weight": 1.0}, "kd": kd}).state_dict())
    assert held.calibrating  # an earlier state sets the weight once more


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_no_graph_break_and_no_compiling_after_the_first_step(tmp_path, eager_backend, preset):
    held, ours, theirs = criterion_of(tmp_path, preset), network(), network("teacher")
    held.schedules = dict.fromkeys(held.terms, Schedule(rise=1.0))  # other weights at each step
    image, target = batch()
    teacher = FrozenTeacher(theirs)

    def step(number):
        held.advance(Progress(number, steps=8, epochs=1))
        torch.manual_seed(0)  # of the dropout
        total, _ = held(ours(image), teacher(image, held.needs), target)
        total.backward()
        return total

    expected = step(1)
    counters.clear()
    compile_in_place(ours, theirs, *held.terms.values())
    torch.testing.assert_close(step(1), expected, rtol=1e-5, atol=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 + len(held.terms)
    for number in range(2, 6):
        step(number)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("segformer_b2", {"Block": 16, "OverlapPatchEmbedding": 4, "TokenNorm": 4, "SegformerHead": 1}),
        ("segformer_b0 LoRA", {"Block": 8, "OverlapPatchEmbedding": 4, "TokenNorm": 4, "SegformerHead": 1}),
        ("lvt", {"Block": 8, "OverlapPatchEmbedding": 4, "SegformerHead": 1}),
        ("deeplabv3plus_resnet101", {"Bottleneck": 33, "ASPPConv": 3}),
        ("convnext_atto", {"ConvNeXtBlock": 12}),
    ],
)
def test_regions_are_blocks_and_what_lies_between(name, expected):
    built = create_segmenter(name.split()[0], 19)
    if "LoRA" in name:
        add_lora(built, rank=4)
    found = regions(built)
    assert expected.items() <= Counter(type(part).__name__ for part in found).items()
    parts = [id(p) for part in found for p in part.parameters()]
    assert sorted(parts) == sorted(id(p) for p in built.parameters())  # each once
    built.checkpoint_activations()
    assert regions(built) == [built]


@pytest.mark.slow
def test_blocks_of_a_stage_share_their_code(eager_backend):
    """In training with unlike rates of stochastic depth but for the first, which is 0, and all in the teacher."""
    encoder = MixTransformer((8, 16), depths=(3, 2), heads=(1, 2), reductions=(2, 1), drop_path_rate=0.3, num_classes=0)
    ours = Segmenter(encoder, SegformerHead((8, 16), 16, 19), 19)
    theirs = FrozenTeacher(copy.deepcopy(ours))
    image, target = batch()
    counters.clear()
    compile_in_place(ours, theirs.network, whole=False)
    for _ in range(2):
        TaskCrossEntropy()(ours(image), None, target).backward()
        theirs(image, {"features"})
    assert counters["stats"]["unique_graphs"] == (3 + 2 + 2 + 1) + (2 + 2 + 2)  # blocks, embeddings, norms, head


@pytest.mark.slow
def test_names_and_copies_stay_plain(eager_backend):
    compiled, plain = network(), network()
    image, _ = batch()
    plain.load_state_dict(compiled.state_dict())
    compile_in_place(compiled)
    torch.testing.assert_close(compiled.eval()(image).logits, plain.eval()(image).logits)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(copy.deepcopy(compiled)(image).logits, plain(image).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0", "deeplabv3plus_resnet101", "convnext_atto", "segformer_b0 LoRA"])
@pytest.mark.parametrize("whole", [True, False])
def test_every_kind_of_network_compiles(eager_backend, name, whole):
    name, adapted = name.split()[0], "LoRA" in name
    built = create_segmenter(name, 19)
    if adapted:
        add_lora(built, rank=4)
    ours = built.eval()  # without dropout and drawn paths
    image, target = batch()

    def outcome():
        ours.zero_grad()
        loss = TaskCrossEntropy()(ours(image), None, target)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    expected = outcome()
    counters.clear()
    compile_in_place(ours, whole=whole)
    torch.testing.assert_close(outcome(), expected, rtol=1e-4, atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    outcome()
    assert counters["stats"]["unique_graphs"] == graphs == (1 if whole else graphs)


@pytest.mark.slow
def test_compiled_code_under_autocast(tmp_path, eager_backend):
    held, ours, theirs = criterion_of(tmp_path, "transkd_base"), network().eval(), network("teacher")
    image, target = batch()
    teacher = FrozenTeacher(theirs)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return held(ours(image), teacher(image, held.needs), target).total

    expected = loss()
    compile_in_place(ours, theirs, *held.terms.values())
    torch.testing.assert_close(loss(), expected, rtol=1e-3, atol=1e-3)
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}


def test_without_a_compiler_the_run_stops_at_once(tmp_path, monkeypatch):
    def fails(function, mode):
        raise RuntimeError("Failed to find C++ compiler\nmore of it")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"C\+\+ compiler.*Failed to find C\+\+ compiler\).*compile=false$"):
        run(composed(tmp_path, "run", "compile=true", "trainer.accelerator=cpu"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    with pytest.raises(UserError, match="triton"):
        check_compiler(torch.device("cuda"))


def test_an_unknown_mode_stops_the_run_at_once(tmp_path):
    with pytest.raises(UserError, match=r"compile=fastest: expected true, false or a mode .*reduce-overhead"):
        run(composed(tmp_path, "run", "compile=fastest"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_machine_that_has_no_compiler(tmp_path):
    """In a process of its own, where no compiler was looked for yet."""
    program = (
        "import torch; from transkd.training.compilation import check_compiler; check_compiler(torch.device('cpu'))"
    )
    missing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": ""}
    environment = {"PYTHONPATH": ":".join(sys.path), **missing}
    done = subprocess.run(  # in a session of its own, so that no signal of one reaches the other's group
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert "UserError: compile=true needs a C++ compiler" in done.stderr


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tmp_path):
    """With generated code, whose random numbers are others, and with gradients taken twice."""
    settings = ["distill=kd", "trainer.max_epochs=1", "gradients_every=2", *SMALL]
    settings += ["student.network.encoder.drop_path_rate=0"]
    run(composed(tmp_path, "plain", *settings))
    run(composed(tmp_path, "compiled", *settings, "compile=true"))
    plain, compiled = student(tmp_path, "plain"), student(tmp_path, "compiled")
    assert plain.keys() == compiled.keys()
    checkpoints = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].keys()
        for name in ("plain", "compiled")
    ]
    assert checkpoints[0] == checkpoints[1]
    for name, tensor in plain.items():  # Adam's first steps move by the rate whatever the gradient's size
        torch.testing.assert_close(compiled[name].double(), tensor.double(), rtol=1e-2, atol=1e-3)
    assert results(tmp_path, "compiled")["mIoU"] == pytest.approx(results(tmp_path, "plain")["mIoU"], abs=0.02)
    load_segmenter(tmp_path / "compiled" / "student.safetensors")


def test_channels_last_gives_the_same_loss(tmp_path):
    held, networks = criterion_of(tmp_path, "transkd_ea"), (network(), network("teacher"))
    image, target = batch()

    def loss(image):
        ours, theirs = networks
        return held(ours(image), FrozenTeacher(theirs)(image), target).total

    held.eval(), networks[0].eval()  # the same statistics twice, no dropout
    expected = loss(image)
    Device.choose(channels_last=True).lay_out(*networks)
    weight = networks[0].encoder.patch_embed1.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss(image.to(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-5)


def test_channels_last_by_itself_is_for_a_cpu(monkeypatch):
    assert Device.choose("cpu").channels_last
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert not Device.choose().channels_last
    for given in (True, False):
        assert Device.choose(channels_last=given).channels_last == given
    assert Device.choose("cpu").kind.type == "cpu"


def test_a_run_in_channels_last(tmp_path):
    settings = ["distill=transkd_base", "trainer.max_epochs=1", *SMALL]
    run(composed(tmp_path, "plain", *settings, "channels_last=false"))
    run(composed(tmp_path, "last", *settings, "channels_last=true"))
    plain, last = student(tmp_path, "plain"), student(tmp_path, "last")
    assert plain.keys() == last.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(last[name].double(), tensor.double(), rtol=1e-2, atol=1e-3)
    load_segmenter(tmp_path / "last" / "student.safetensors")
