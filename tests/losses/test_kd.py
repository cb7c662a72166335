import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import make_output, make_pair

from transkd.errors import UserError
from transkd.losses.kd import KDLoss
from transkd.outputs import SegmentationOutput

LABELS = torch.tensor([[[0, 255], [1, -1]]])  # of four pixels, the left column counts


def output(logits):
    return SegmentationOutput(logits, (), (), torch.zeros(len(logits), 3, 4, 4))


@pytest.mark.parametrize(
    ("variant", "student", "settings"),
    [
        ("T1", "logits_s", {}),
        ("T4", "logits_s", {"temperature": 4.0}),
        ("T4_masked", "logits_s", {"temperature": 4.0, "mask_ignored": True}),
        ("T4_resized", "logits_s_small", {"temperature": 4.0}),
    ],
)
def test_golden(variant, student, settings):
    vectors = golden.load("kd")
    logits = vectors[student].requires_grad_()
    value = KDLoss(**settings)(output(logits), output(vectors["logits_t"]), vectors["labels"])
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, vectors[f"expected.grad.{variant}.{student}"], rtol=1e-8, atol=1e-12)


def test_by_hand():
    # Teacher (1/2, 1/2) everywhere. Student: (3/4, 1/4) at one of two pixels, as the teacher at the other.
    student = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert KDLoss()(output(student), output(torch.zeros(1, 2, 1, 2))).item() == pytest.approx(expected)


def test_temperature_by_hand():
    # At τ = 2 the same distributions come from logits twice as large, and the value is 4 times as large.
    student, teacher = (output(torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(i))) for i in (1, 2))
    doubled = [output(2 * o.logits) for o in (student, teacher)]
    torch.testing.assert_close(KDLoss(2.0)(*doubled), 4 * KDLoss(1.0)(student, teacher))


@pytest.mark.parametrize("mask_ignored", [False, True])
def test_identical_logits_give_0(mask_ignored):
    student, _, target = make_pair()
    assert KDLoss(mask_ignored=mask_ignored)(student, student, target) == 0


def test_labels_are_not_read_unless_asked():
    student, teacher, target = make_pair()
    assert KDLoss()(student, teacher) == KDLoss()(student, teacher, torch.full_like(target, 255))


def test_the_mean_is_over_valid_pixels_of_the_whole_batch():
    student, teacher = (make_output(size=(8, 8), seed=seed) for seed in (1, 2))  # two images, logits 2×2
    target = torch.cat((LABELS, torch.full_like(LABELS, 3)))  # 2 valid pixels in one image, 4 in the other
    column = [output(o.logits[:1, :, :, :1]) for o in (student, teacher)]
    image = [output(o.logits[1:]) for o in (student, teacher)]
    expected = (2 * KDLoss()(*column) + 4 * KDLoss()(*image)) / 6
    torch.testing.assert_close(KDLoss(mask_ignored=True)(student, teacher, target), expected)


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_ignored_pixels_do_not_count(value):
    student, teacher, _ = make_pair(size=(8, 8), batch=1)
    term = KDLoss(mask_ignored=True)
    expected = term(student, teacher, LABELS)
    changed = [o.logits.detach().clone() for o in (student, teacher)]
    for logits in changed:
        logits[..., 1] = value
        logits.requires_grad_()
    result = term(output(changed[0]), output(changed[1]), LABELS)
    result.backward()
    assert result == expected
    assert changed[0].grad.isfinite().all()
    assert (changed[0].grad[..., 1] == 0).all()
    assert changed[0].grad[..., 0].abs().sum() > 0


def test_nothing_valid_is_a_differentiable_0():
    student, teacher, target = make_pair()
    value = KDLoss(mask_ignored=True)(student, teacher, torch.full_like(target, 255))
    value.backward()
    assert value == 0
    assert (student.logits.grad == 0).all()


@pytest.mark.parametrize(("grid", "size"), [("teacher", (32, 48)), ("student", (16, 24)), ("labels", (64, 96))])
def test_grids(grid, size):
    student, teacher = make_output(seed=1), make_output(size=(128, 192), seed=2)
    resized = [output(F.interpolate(o.logits, size, mode="bilinear", align_corners=False)) for o in (student, teacher)]
    target = torch.zeros(2, 64, 96, dtype=torch.int64)
    torch.testing.assert_close(KDLoss(grid=grid)(student, teacher, target), KDLoss()(*resized))


def test_large_logits_stay_finite():
    student, teacher, _ = make_pair()
    student = output((student.logits.detach() * 1e4).requires_grad_())
    value = KDLoss()(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.logits.grad.isfinite().all()


def test_half_precision_logits_are_compared_in_float32():
    student, teacher, _ = make_pair()
    halves = [output(o.logits.half()) for o in (student, teacher)]
    value = KDLoss()(*halves)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, KDLoss()(student, teacher), rtol=1e-2, atol=0)


def test_errors():
    student, teacher, _ = make_pair()
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="KDLoss: the temperature must be a number greater than 0"):
            KDLoss(temperature)
    with pytest.raises(UserError, match=r"grid must be one of .*'pixels'"):
        KDLoss(grid="pixels")
    with pytest.raises(UserError, match="have a single class"):
        KDLoss()(output(torch.zeros(1, 1, 2, 2)), output(torch.zeros(1, 1, 2, 2)))
    with pytest.raises(UserError, match="student has 5 classes, the teacher 4"):
        KDLoss()(student, output(torch.zeros(2, 4, 16, 24)))
    for term in (KDLoss(mask_ignored=True), KDLoss(grid="labels")):
        with pytest.raises(UserError, match="target=labels"):
            term(student, teacher)
    with pytest.raises(UserError, match="no teacher"):
        KDLoss()(student, None)
    with pytest.raises(UserError, match="the teacher returns none"):
        KDLoss()(student, teacher._replace(logits=None))
