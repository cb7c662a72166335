import pytest
import torch
from torch import nn

from transkd.losses import CSFLoss, PEALoss
from transkd.models import FrozenTeacher
from transkd.outputs import EVERYTHING

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
