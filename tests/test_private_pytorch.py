"""Private names of PyTorch and timm that src/ uses: which ones, and that each still does what we rely on."""

import ast
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import nn
from torch._dynamo.utils import counters

from transkd.models import FrozenTeacher
from transkd.training.compilation import VARIANTS, compile_in_place

SOURCE = Path(__file__).parents[1] / "src" / "transkd"
LIBRARIES = {"torch", "timm", "lightning"}
ROOTS = {*LIBRARIES, "nn", "F", "L"}  # the names that src/ imports them by
ALLOWED = {
    ("layers/upsampling.py", "torch.ops.aten.upsample_bilinear2d_backward"): "the gradient without another forward",
    ("models/encoders/mit.py", "timm.models._features"): "timm's rule for feature indices, exported nowhere else",
    ("models/tapped.py", "_version"): "the only trace of a write in place that also holds for values left unchanged",
    ("models/teacher.py", "_apply"): "the one method behind to, cuda, half, …, also where a parent module is moved",
    ("models/teacher.py", "_version"): "the only trace of a write in place into a weight",
    ("training/compilation.py", "torch._dynamo.config.recompile_limit"): "torch.compiler.config lacks it in 2.8",
    ("training/compilation.py", "torch._functorch.config.donated_buffer"): "the switch that PyTorch's own error names",
}


def private_members():
    """Names with one underscore of the objects that src/ subclasses or holds."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda tick: 1.0)
    owners = [nn.Module(), torch.zeros(()), optimizer, scheduler, torch.autograd.Function, L.LightningModule()]
    return {name for owner in owners for name in dir(owner) if name.startswith("_") and not name.startswith("__")}


def dotted(node):
    """``a.b.c`` of a chain of attributes that starts with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def is_private(name):
    return name.startswith("torch.ops.") or any(
        part.startswith("_") and not part.endswith("__") for part in name.split(".")
    )


def private_names(text, members):
    """The private names of the libraries that a module uses or overrides, of a chain the longest."""
    found, inner = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {next(filter(is_private, names))} if any(map(is_private, names)) else set()
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names if alias.name.split(".")[0] in LIBRARIES]
            found |= set(filter(is_private, imported))
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            name = dotted(node)
            if name.split(".")[0] in ROOTS and is_private(name):
                found.add(name)
                inner |= {id(part) for part in ast.walk(node)}
            elif node.attr in members:
                found.add(node.attr)
        elif isinstance(node, ast.FunctionDef) and node.name in members:
            found.add(node.name)
    return found


def test_no_other_private_name_is_used():
    members = private_members()
    used = {
        (path.relative_to(SOURCE).as_posix(), name)
        for path in sorted(SOURCE.rglob("*.py"))
        for name in private_names(path.read_text(encoding="utf-8"), members)
    }
    assert used == ALLOWED.keys()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("torch._dynamo.config.x = 1", "torch._dynamo.config.x"),
        ("y = torch.ops.aten.relu(x)", "torch.ops.aten.relu"),
        ("from torch._inductor import list_mode_options", "torch._inductor"),
        ("from torch.nn.modules.dropout import _DropoutNd", "torch.nn.modules.dropout._DropoutNd"),
        ("import torch._dynamo", "torch._dynamo"),
        ("nn.modules.dropout._DropoutNd", "nn.modules.dropout._DropoutNd"),
        ("self.encoder._modules['a']", "_modules"),
        ("class A(nn.Module):\n    def _load_from_state_dict(self): ...", "_load_from_state_dict"),
    ],
)
def test_a_private_name_is_found(line, name):
    assert private_names(line, private_members()) == {name}


class Recorder(nn.Module):
    """Writes down what it is applied with, as FrozenTeacher hands it to its network."""

    def __init__(self):
        super().__init__()
        self.applied = []

    def _apply(self, fn, recurse=True):
        self.applied.append(fn(torch.zeros(1)))
        return super()._apply(fn, recurse)


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (lambda module: module.to(torch.float64), (torch.float64, "cpu")),
        (lambda module: module.half(), (torch.float16, "cpu")),
        (lambda module: module.bfloat16(), (torch.bfloat16, "cpu")),
        (lambda module: module.to("meta"), (torch.float32, "meta")),
    ],
)
def test_apply_is_called_whenever_a_parent_is_moved(move, expected):
    recorder = Recorder()
    move(nn.Sequential(nn.Linear(1, 1), nn.ModuleList([recorder])))
    assert [(tensor.dtype, tensor.device.type) for tensor in recorder.applied] == [expected]


def test_version_counts_writes_into_a_weight():
    layer = nn.Linear(2, 2)
    versions = [layer.weight._version]
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight._version == versions[0]  # reading is none
    with torch.no_grad():
        layer.weight.mul_(0.5)
    versions.append(layer.weight._version)
    layer.load_state_dict(layer.state_dict())
    versions.append(layer.weight._version)
    torch.optim.SGD(layer.parameters()).step()
    versions.append(layer.weight._version)
    assert versions == sorted(set(versions))
    before = layer.weight.data_ptr()
    layer.weight.data = layer.weight.data * 2  # keeps the counter; the teacher compares the address, too
    assert layer.weight.data_ptr() != before


def test_version_counts_writes_that_change_no_value_and_those_through_views():
    tensor = torch.ones(2, 3)
    versions = [tensor._version]
    F.relu(tensor, inplace=True)
    versions.append(tensor._version)
    tensor.flatten().add_(0)
    versions.append(tensor._version)
    assert versions == sorted(set(versions))
    with torch.inference_mode():
        unversioned = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors do not track version counter"):
        _ = unversioned._version


class Product(nn.Module):
    """Saves a product, an intermediate tensor, for the backward pass: a buffer that can be donated."""

    def forward(self, x):
        return (x @ x).sin().sum()


@pytest.fixture
def compiler(monkeypatch):
    """Compile without generating code by the backend that is set, and restore PyTorch's settings."""
    backend = {"backend": "eager"}
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode, dynamic: plain(module, **backend, dynamic=dynamic))
    donated, limit = torch._functorch.config.donated_buffer, torch._dynamo.config.recompile_limit
    yield backend
    torch._functorch.config.donated_buffer, torch._dynamo.config.recompile_limit = donated, limit
    torch.compiler.reset()


@pytest.mark.parametrize("keep_graph", [True, False])
def test_donated_buffers_forbid_keeping_the_graph(compiler, keep_graph):
    compiler["backend"] = "aot_eager"
    module, x = Product(), torch.rand(3, 3, requires_grad=True)
    compile_in_place(module, keep_graph=keep_graph)
    module(x).backward()  # compiled for a graph that is freed
    loss = module(x)
    if keep_graph:
        first, second = (torch.autograd.grad(loss, x, retain_graph=True) for _ in range(2))
        assert torch.equal(*first, *second)
    else:
        with pytest.raises(RuntimeError, match="donated"):
            torch.autograd.grad(loss, x, retain_graph=True)


class Region(nn.Module):
    """Calls a layer; PyTorch 2.8 does not compile a bare nn.Linear."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, x):
        return self.layer(x)


def test_recompile_limit_admits_a_variant_for_each_region(compiler):
    default = 8
    layers = [Region(n) for n in range(1, 13)]
    compile_in_place(*layers)
    counters.clear()
    for layer in layers:
        layer(torch.ones(2, 4))
    assert default < counters["stats"]["unique_graphs"] == len(layers) < VARIANTS


@pytest.mark.parametrize("size", [(12, 16), (11, 17), (3, 4)])
def test_upsample_bilinear2d_backward_is_the_gradient_of_interpolate(size):
    maps = torch.rand(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.rand(2, 3, *size, dtype=torch.float64)
    F.interpolate(maps, size=size, mode="bilinear", align_corners=False).backward(upstream)
    found = torch.ops.aten.upsample_bilinear2d_backward(upstream, size, maps.shape, False, None, None)
    torch.testing.assert_close(found, maps.grad)


@pytest.mark.parametrize(
    ("indices", "selected", "deepest"),
    [(None, [0, 1, 2, 3], 3), (2, [2, 3], 3), ([0, -2], [0, 2], 2), ([1], [1], 1)],
)
def test_feature_take_indices(indices, selected, deepest):
    assert feature_take_indices(4, indices) == (selected, deepest)


def test_the_teacher_notices_each_kind_of_change():
    """By its own cache: the state that it compares differs after every change, and only then."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    network = Network()
    teacher = FrozenTeacher(network)

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            return teacher._cast_weights("cpu")

    before = cast()
    assert cast() is before
    with torch.no_grad():
        network.layer.weight.add_(1)
    changed = cast()
    assert changed is not before
    nn.ModuleList([teacher]).double().float()
    assert cast() is not changed
