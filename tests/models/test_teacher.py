import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transkd.errors import UserError
from transkd.layers.token_linear import TokenLinear
from transkd.losses import CSFLoss, PEALoss
from transkd.models import FrozenTeacher
from transkd.outputs import EVERYTHING, SegmentationOutput

IMAGE = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    """What a LightningModule does to it: holds it beside something to train."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher
        self.student = nn.Linear(1, 1)


@pytest.fixture
def holder(b0):
    return Holder(FrozenTeacher(b0))


def test_no_gradient(holder):
    output = holder.teacher(IMAGE)
    for tensor in (output.logits, *output.features, *output.embeddings, output.image):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    assert not any(parameter.requires_grad for parameter in holder.teacher.network.parameters())


def test_stays_in_eval(holder):
    expected = holder.teacher(IMAGE).logits
    statistics = holder.teacher.network.head.linear_fuse.bn.running_mean.clone()
    holder.train()
    assert holder.student.training
    assert not holder.teacher.training
    assert not any(module.training for module in holder.teacher.network.modules())
    assert torch.equal(holder.teacher(IMAGE).logits, expected)  # no dropout, no stochastic depth
    assert torch.equal(holder.teacher.network.head.linear_fuse.bn.running_mean, statistics)
    holder.eval().train()
    assert not holder.teacher.network.training


def test_is_in_no_checkpoint_and_no_optimizer(holder):
    assert list(holder.state_dict()) == ["student.weight", "student.bias"]
    assert [name for name, _ in holder.named_parameters()] == ["student.weight", "student.bias"]
    assert not list(holder.buffers())
    assert not any(isinstance(module, type(holder.teacher.network)) for module in holder.modules())
    holder.load_state_dict(holder.state_dict(), strict=True)


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.double(), lambda m: m.to("meta")])
def test_dtype_and_device_reach_it(holder, move):
    move(holder)
    mark = (holder.student.weight.dtype, holder.student.weight.device)
    tensors = (*holder.teacher.network.parameters(), holder.teacher.network.mean)
    assert {(t.dtype, t.device) for t in tensors} == {mark}
    if mark[1].type != "meta":
        assert holder.teacher(IMAGE).logits.dtype == mark[0]


@pytest.mark.parametrize("needs", [set(), {"features"}, {"logits"}, EVERYTHING])
def test_computes_no_more_than_is_read(b0, needs):
    heads = []
    b0.head.register_forward_hook(lambda *_: heads.append(1))
    output = FrozenTeacher(b0, needs)(IMAGE)
    assert (output.logits is not None) == bool(heads) == ("logits" in needs)


def test_terms_can_run_backward_through_its_outputs(holder, b0):
    teacher = holder.teacher(IMAGE)
    assert not any(t.is_inference() for t in (teacher.logits, *teacher.features, *teacher.embeddings))
    channels = {"student_channels": b0.channels, "teacher_channels": b0.channels}
    terms = nn.ModuleList([CSFLoss(**channels, mid_channels=8), PEALoss(**channels)])
    student = teacher._replace(
        features=tuple(f.clone().requires_grad_() for f in teacher.features),
        embeddings=tuple(e.clone().requires_grad_() for e in teacher.embeddings),
    )
    # a teacher map as a factor of a product is saved for backward, which inference tensors refuse
    product = (student.features[0] * teacher.features[0]).mean()
    (sum(term(student, teacher) for term in terms) + product).backward()
    assert all(p.grad is not None for p in terms.parameters())
    assert all(f.grad is not None for f in student.features)


def test_calling_it_leaves_gradients_on(holder):
    holder.teacher(IMAGE)
    assert torch.is_grad_enabled()


# Under autocast


class Casts(TorchDispatchMode):
    """Counts what is cast from float32 to a half type."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten._to_copy and args[0].dtype == torch.float32:
            self.count += (kwargs or {}).get("dtype") in (torch.bfloat16, torch.float16)
        return function(*args, **(kwargs or {}))


def seen(network, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        output = network(IMAGE)
    return [output.logits, *output.features, *output.embeddings]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_sees_the_same(b0, dtype):
    with torch.no_grad():
        expected = seen(b0.eval(), dtype)
    teacher = FrozenTeacher(b0)
    for _ in range(2):
        assert all(map(torch.equal, seen(teacher, dtype), expected))
    with torch.no_grad():
        assert all(map(torch.equal, seen(b0, dtype), expected))


def test_under_autocast_weights_are_cast_once_and_stay_as_they_are(b0):
    teacher = FrozenTeacher(b0)
    before = dict(b0.named_parameters())
    values = {name: weight.clone() for name, weight in before.items()}
    counts = []
    for _ in range(3):
        with Casts() as casts:
            seen(teacher)
        counts.append(casts.count)
    layers = [layer for layer in b0.modules() if type(layer) in (nn.Linear, TokenLinear, nn.Conv2d)]
    weights = sum(1 for layer in layers for _ in layer.parameters(recurse=False))
    assert counts[0] - counts[1] == weights > 100
    assert counts[1] == counts[2]
    for name, weight in b0.named_parameters():
        assert weight is before[name]
        assert torch.equal(weight, values[name])


@pytest.mark.parametrize("change", ["loaded", "in place", "moved", "another type"])
def test_under_autocast_it_follows_its_weights(b0, change):
    teacher = FrozenTeacher(b0)
    seen(teacher)
    dtype = torch.bfloat16
    if change == "loaded":
        b0.load_state_dict({name: value * 0.9 for name, value in b0.state_dict().items()})
    elif change == "in place":
        with torch.no_grad():
            b0.encoder.patch_embed1.proj.weight.mul_(0.5)
    elif change == "moved":
        teacher.double().float()
        b0.encoder.patch_embed1.proj.weight.data = b0.encoder.patch_embed1.proj.weight.data * 2
    else:
        dtype = torch.float16
    with torch.no_grad():
        expected = seen(b0, dtype)
    assert all(map(torch.equal, seen(teacher, dtype), expected))


def test_a_mistake_under_autocast_leaves_the_weights(b0):
    teacher = FrozenTeacher(b0)
    with pytest.raises(UserError), torch.autocast("cpu", torch.bfloat16):
        teacher(IMAGE[:, :1])
    assert {weight.dtype for weight in b0.parameters()} == {torch.float32}


class HalfWeight(nn.Conv2d):
    """A layer that looks at its weight before it uses it, as weight standardisation does."""

    def forward(self, image):
        assert self.weight.dtype == torch.float32
        return nn.functional.conv2d(image, self.weight / self.weight.norm())


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = HalfWeight(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False)

    def forward(self, image, needs):
        assert self.second.weight.dtype == torch.bfloat16
        return SegmentationOutput(self.second(self.first(image / 255)), (), (), image)


def test_a_layer_of_another_kind_keeps_its_weight():
    with torch.autocast("cpu", torch.bfloat16):
        FrozenTeacher(Odd())(IMAGE)


class Raw(nn.Module):
    """Shows features of another scale in each channel."""

    def __init__(self, scales):
        super().__init__()
        self.scales = nn.Parameter(torch.tensor(scales))

    def forward(self, image, needs=EVERYTHING):
        feature = image[:, :1].float() * self.scales[:, None, None] + 7.0
        return SegmentationOutput(None, (feature,), (), image)


def noise(seed):
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_raw_features_are_standardised_once():
    teacher = FrozenTeacher(Raw([10.0, 40.0]), needs={"features"})
    scales = teacher.standardise([noise(0), noise(1)])
    assert scales == pytest.approx([25.0], rel=0.05)
    (feature,) = teacher(torch.cat([noise(0), noise(1)])).features
    values = feature.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert not list(teacher.state_dict())


def test_features_of_a_usual_scale_are_left_alone(b0):
    teacher = FrozenTeacher(Raw([0.5, 1.5]), needs={"features"})
    before = teacher(noise(0)).features[0]
    assert teacher.standardise([noise(0)]) == []
    assert teacher.standardise([noise(0)], when=False) == []
    assert torch.equal(teacher(noise(0)).features[0], before)
    assert FrozenTeacher(Raw([10.0]), needs={"logits"}).standardise([noise(0)]) == []  # nothing reads features
    assert teacher.standardise([noise(0)], when=True) == pytest.approx([1.0], rel=0.1)
    assert FrozenTeacher(b0).standardise([IMAGE]) == []


def test_a_channel_that_never_changes_stays_finite():
    teacher = FrozenTeacher(Raw([0.0, 30.0]), needs={"features"})
    teacher.standardise([noise(0)])
    assert teacher(noise(1)).features[0].isfinite().all()
