import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import STUDENT, TEACHER, make_output, make_pair

from transkd.errors import UserError
from transkd.losses.fitnet import FitNetLoss
from transkd.outputs import SegmentationOutput

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}


def features(*maps):
    return SegmentationOutput(None, maps, (), torch.zeros(len(maps[0]), 3, 4, 4))


@pytest.mark.parametrize(("variant", "student"), [("mse", "feat_s"), ("mse_resized", "feat_s_small")])
def test_golden(variant, student):
    vectors = golden.load("fitnet")
    term = FitNetLoss((6,), (10,), stages=(1,)).double()
    weight = term.adapters["1"].weight
    with torch.no_grad():
        weight.copy_(vectors["param.adapter.weight"])
    maps = vectors[student].requires_grad_()
    value = term(features(maps), features(vectors["feat_t"]))
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    for tensor, name in ((maps, student), (weight, "param.adapter.weight")):
        torch.testing.assert_close(tensor.grad, vectors[f"expected.grad.{variant}.{name}"], rtol=1e-8, atol=1e-12)


def test_by_hand():
    # Regressor (1, 2): 1·3 + 2·(-1) = 1 at the first position, 0 at the second; the teacher shows 3 and 4.
    term = FitNetLoss((2,), (1,), stages=(1,))
    with torch.no_grad():
        term.adapters["1"].weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
    maps = torch.tensor([[3.0, 0.0], [-1.0, 0.0]]).view(1, 2, 1, 2)
    value = term(features(maps), features(torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)))
    assert value.item() == pytest.approx((2**2 + 4**2) / 2)


def test_identical_features_without_an_adapter_give_0():
    student, _, _ = make_pair()
    term = FitNetLoss(STUDENT, STUDENT, stages=(1, 2, 3, 4), adapter=None)
    assert not list(term.parameters())
    assert term(student, student) == 0


def test_the_regressor_is_there_for_equal_channels_too():
    term = FitNetLoss(STUDENT, STUDENT, stages=(2, 4))
    assert {name: tuple(parameter.shape) for name, parameter in term.named_parameters()} == {
        "adapters.2.weight": (16, 16, 1, 1),
        "adapters.4.weight": (32, 32, 1, 1),
    }


def test_stages_are_summed():
    student, teacher, _ = make_pair()
    term = FitNetLoss(**CHANNELS, stages=(1, 3))
    expected = sum(
        F.mse_loss(term.adapters[str(stage)](student.features[stage - 1]), teacher.features[stage - 1])
        for stage in (1, 3)
    )
    torch.testing.assert_close(term(student, teacher), expected)


@pytest.mark.parametrize(("grid", "scales"), [("teacher", (2, 1)), ("student", (1, 0.5)), ("labels", (4, 2))])
def test_grids(grid, scales):
    student, teacher = make_output(seed=1), make_output(TEACHER, size=(128, 192), seed=2)
    target = torch.zeros(2, 8, 12, dtype=torch.int64)  # stage 4 is 2×3 and 4×6
    resized = [
        F.interpolate(o.features[3], scale_factor=scale, mode="bilinear", align_corners=False)
        for o, scale in zip((student, teacher), scales, strict=True)
    ]
    term = FitNetLoss(**CHANNELS, grid=grid)
    expected = F.mse_loss(term.adapters["4"](resized[0]), resized[1])
    torch.testing.assert_close(term(student, teacher, target), expected)


def test_labels_are_not_read():
    student, teacher, target = make_pair()
    term = FitNetLoss(**CHANNELS)
    assert term(student, teacher) == term(student, teacher, torch.full_like(target, 255))


def test_errors():
    student, teacher, _ = make_pair()
    for adapter in ("conv_bn_relu", "linear"):
        with pytest.raises(UserError, match=f"FitNetLoss: adapter must be one of 'conv', None; got '{adapter}'"):
            FitNetLoss(**CHANNELS, adapter=adapter)
    with pytest.raises(UserError, match=r"at stage 4 the student has 32 channels, the teacher 40\. Set adapter"):
        FitNetLoss(**CHANNELS, adapter=None)
    with pytest.raises(UserError, match=r"grid must be one of .*'pixels'"):
        FitNetLoss(**CHANNELS, grid="pixels")
    with pytest.raises(UserError, match=r"stages must be from 1 to 4; got \[5\]"):
        FitNetLoss(**CHANNELS, stages=(5,))
    with pytest.raises(UserError, match="stages must be distinct numbers from 1"):
        FitNetLoss(**CHANNELS, stages=(4, 4))
    with pytest.raises(UserError, match="target=labels"):
        FitNetLoss(**CHANNELS, grid="labels")(student, teacher)
    with pytest.raises(UserError, match=r"student_channels=.* but the student's features have"):
        FitNetLoss(**CHANNELS)(teacher, teacher)
    with pytest.raises(UserError, match="2 images from the student and 1 from the teacher"):
        FitNetLoss(**CHANNELS)(student, make_output(TEACHER, batch=1))
