import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import make_output, make_pair

from transkd.errors import UserError
from transkd.losses.dkd import DKDLoss
from transkd.losses.pdd import PDDLoss, mixture_divergence
from transkd.outputs import SegmentationOutput

VARIANTS = {"a05_b05": (0.5, 0.5), "a1_b025": (1, 0.25)}
IGNORED = 255


def output(logits):
    return SegmentationOutput(logits, (), (), torch.zeros(len(logits), 3, 4, 4))


def place(*labels):
    """Labels of the positions of one image with a single row, all valid."""
    return torch.tensor([[labels]]), torch.ones(1, 1, len(labels), dtype=torch.bool)


def scores(*rows):
    """Logits of one image with a single row, float64; one tuple a position."""
    return torch.tensor(rows, dtype=torch.float64).T[None, :, None]


def check(value, logits, loss, gradient):
    value.backward()
    torch.testing.assert_close(value, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant):
    vectors = golden.load("pdd")
    logits = vectors["logits_s"].requires_grad_()
    term = PDDLoss(*VARIANTS[variant], grid="teacher")
    value = term(output(logits), output(vectors["logits_t"]), vectors["labels"])
    check(value, logits, vectors[f"expected.loss.{variant}"], vectors[f"expected.grad.{variant}.logits_s"])


def test_golden_of_the_other_variant():
    vectors = golden.load("dkd")
    logits = vectors["logits_s"].requires_grad_()
    value = PDDLoss(variant="dkd")(output(logits), output(vectors["logits_t"]), vectors["labels_grid"])
    check(value, logits, vectors["expected.loss.a05_b05_T1"], vectors["expected.grad.a05_b05_T1.logits_s"])


def test_golden_in_float32():
    vectors = golden.load("pdd")
    logits = vectors["logits_s"].float().requires_grad_()
    value = PDDLoss()(output(logits), output(vectors["logits_t"].float()), vectors["labels_grid"])
    value.backward()
    gradient = vectors["expected.grad.a05_b05.logits_s"]
    torch.testing.assert_close(value.double(), vectors["expected.loss.a05_b05"], rtol=2e-4, atol=0)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=0, atol=2e-4 * gradient.abs().max().item())


def test_by_hand():
    """Label 1. The teacher gives it 1/3, so the mixture is (2/3, 1/3); the student gives it 1/2."""
    student, teacher = scores((0, math.log(2), 0)), scores((0, 0, 0))
    expected = 0.5 * math.log(3 / 4), 0.5 * math.log(3 / 2)
    torch.testing.assert_close(
        tuple(value.item() for value in mixture_divergence(student, teacher, *place(1))), expected
    )


def test_least_halfway_between_teacher_and_label():
    teacher = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    label = torch.randint(0, 5, (2, 4, 6))
    share = (1 + teacher.softmax(1).gather(1, label[:, None])) / 2
    student = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    rest = student.scatter(1, label[:, None], -math.inf).logsumexp(1, keepdim=True)
    best = student.scatter(1, label[:, None], share.logit() + rest).requires_grad_()
    value = PDDLoss()(output(best), output(teacher), label)
    value.backward()
    torch.testing.assert_close(value.item(), 0.0, rtol=0, atol=1e-14)
    torch.testing.assert_close(best.grad, torch.zeros_like(best), rtol=0, atol=1e-14)
    assert PDDLoss()(output(student), output(teacher), label) > 0


def test_the_ranking_of_the_others_is_for_the_other_variant():
    teacher, student = scores((0, 1, 2)), scores((0, 2, 1))
    label = place(0)[0]
    ranked = [PDDLoss(variant="dkd")(output(student), output(t), label) for t in (teacher, student)]
    shares = [PDDLoss()(output(student), output(t), label) for t in (teacher, student)]
    assert ranked[0] > ranked[1] == 0
    torch.testing.assert_close(shares[0], shares[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["mixture", "dkd"])
def test_finite_however_sure(variant, dtype):
    student = scores((9e4, 1, 0), (-9e4, 0, 1)).to(dtype).requires_grad_()
    teacher = scores((9e4, 1, 0), (9e4, 1, 0)).to(dtype)
    value = PDDLoss(variant=variant)(output(student), output(teacher), place(0, 0)[0])
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    if variant == "mixture":  # one of two positions is surely wrong where the teacher is surely right
        torch.testing.assert_close(value.item(), 0.5 * (100 + math.log(2)) / 2)


@pytest.mark.parametrize("variant", ["mixture", "dkd"])
def test_what_stands_at_ignored_positions_does_not_count(variant):
    student, teacher, _ = make_pair()
    target = torch.randint(0, 5, (2, 16, 24))
    target[0, :3], target[1, :, 5] = IGNORED, -1
    term = PDDLoss(variant=variant)
    expected = term(student, teacher, target)
    ignored = ((target == IGNORED) | (target < 0))[:, None].expand_as(student.logits)
    for junk in (1e30, math.inf, math.nan):
        logits = student.logits.detach().masked_fill(ignored, junk).requires_grad_()
        value = term(output(logits), output(teacher.logits.detach().masked_fill(ignored, junk)), target)
        value.backward()
        assert value == expected
        assert logits.grad.isfinite().all()
        assert not logits.grad[ignored].any()


@pytest.mark.parametrize("variant", ["mixture", "dkd"])
def test_nothing_to_learn_from(variant):
    student, teacher, target = make_pair()
    value = PDDLoss(variant=variant)(student, teacher, torch.full_like(target, IGNORED))
    value.backward()
    assert value == 0
    assert torch.equal(student.logits.grad, torch.zeros_like(student.logits))


def test_compares_at_the_labels_unless_told_otherwise():
    student, teacher = make_output(size=(32, 48), seed=1), make_output(seed=2)
    target = torch.randint(0, 5, (2, 64, 96))
    large = [
        output(F.interpolate(o.logits, (64, 96), mode="bilinear", align_corners=False)) for o in (student, teacher)
    ]
    torch.testing.assert_close(PDDLoss()(student, teacher, target), PDDLoss(grid="teacher")(*large, target))
    torch.testing.assert_close(
        PDDLoss(0.3, 2.0, "dkd", "student")(student, teacher, target),
        DKDLoss(0.3, 2.0, 1.0, "student")(student, teacher, target),
    )


@pytest.mark.parametrize("variant", ["mixture", "dkd"])
def test_gradcheck(variant):
    student, teacher = (make_output(batch=1, size=size, dtype=torch.float64) for size in ((8, 12), (16, 16)))
    target = torch.tensor([[[0, 255, 4], [3, 1, 1]]])
    term = PDDLoss(1.5, 0.7, variant)
    assert torch.autograd.gradcheck(lambda z: term(output(z), teacher, target), student.logits)


def test_errors():
    mine, other, target = make_pair()
    for settings in ({"alpha": -1.0}, {"beta": math.nan}):
        with pytest.raises(UserError, match=f"PDDLoss: {next(iter(settings))} must be a number of at least 0"):
            PDDLoss(**settings)
    with pytest.raises(UserError, match="variant must be one of 'mixture', 'dkd'; got 'kd'"):
        PDDLoss(variant="kd")
    with pytest.raises(UserError, match="grid must be one of 'teacher', 'student', 'labels'; got 'pixels'"):
        PDDLoss(grid="pixels")
    with pytest.raises(UserError, match="PDDLoss reads the labels: call it with target=labels"):
        PDDLoss()(mine, other)
    with pytest.raises(UserError, match="student has 5 classes, the teacher 4"):
        PDDLoss()(mine, output(torch.zeros(2, 4, 16, 24)), target)
    with pytest.raises(UserError, match="single class"):
        PDDLoss()(*[output(torch.zeros(2, 1, 16, 24))] * 2, target)
