import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import make_output, make_pair

from transkd.errors import UserError
from transkd.losses.dkd import DKDLoss, decoupled
from transkd.outputs import SegmentationOutput

VARIANTS = {"a1_b8_T4": (1, 8, 4), "a05_b05_T1": (0.5, 0.5, 1), "extreme_a1_b8_T1": (1, 8, 1)}
IGNORED = 255


def output(logits):
    return SegmentationOutput(logits, (), (), torch.zeros(len(logits), 3, 4, 4))


def place(*labels):
    """Labels of the positions of one image with a single row, all valid."""
    return torch.tensor([[labels]]), torch.ones(1, 1, len(labels), dtype=torch.bool)


def scores(*rows):
    """Logits of one image with a single row, float64; one tuple a position."""
    return torch.tensor(rows, dtype=torch.float64).T[None, :, None]


def upsampled(given, size):
    return output(F.interpolate(given.logits, size, mode="bilinear", align_corners=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant):
    vectors = golden.load("dkd")
    name = "logits_s_extreme" if variant.startswith("extreme") else "logits_s"
    logits = vectors[name].requires_grad_()
    value = DKDLoss(*VARIANTS[variant])(output(logits), output(vectors["logits_t"]), vectors["labels"])
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, vectors[f"expected.grad.{variant}.{name}"], rtol=1e-8, atol=1e-12)
    labels = vectors["labels_grid"]
    valid = labels != IGNORED
    place = labels.masked_fill(~valid, 0), valid
    for part, got in zip(
        ("tckd", "nckd"), decoupled(logits, vectors["logits_t"], *place, VARIANTS[variant][2]), strict=True
    ):
        torch.testing.assert_close(got, vectors[f"expected.loss.{variant}.{part}"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_in_float32(variant):
    vectors = golden.load("dkd")
    name = "logits_s_extreme" if variant.startswith("extreme") else "logits_s"
    logits = vectors[name].float().requires_grad_()
    value = DKDLoss(*VARIANTS[variant])(output(logits), output(vectors["logits_t"].float()), vectors["labels"])
    value.backward()
    gradient = vectors[f"expected.grad.{variant}.{name}"]
    torch.testing.assert_close(value.double(), vectors[f"expected.loss.{variant}"], rtol=2e-4, atol=0)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=0, atol=2e-4 * gradient.abs().max().item())


def test_by_hand():
    """Label 0. Teacher: shares (1/2, 1/2), others (1/3, 2/3); student: shares (1/4, 3/4), others (1/2, 1/2)."""
    teacher, student = scores((math.log(3), 0, math.log(2))), scores((math.log(2 / 3), 0, 0))
    tckd, nckd = decoupled(student, teacher, *place(0))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3)
    torch.testing.assert_close((tckd.item(), nckd.item()), expected)
    tckd, nckd = decoupled(student * 3, teacher * 3, *place(0), temperature=3)
    torch.testing.assert_close((tckd.item(), nckd.item()), tuple(9 * value for value in expected))


def test_plain_distillation_is_a_sum_of_both():
    """At each position KL(p_t ‖ p_s) = TCKD + (1 − p_t[label])·NCKD."""
    teacher, student = (torch.randn(8, 6, 1, 1, dtype=torch.float64) for _ in range(2))
    for t, s, label in zip(teacher.split(1), student.split(1), range(8), strict=True):
        tckd, nckd = decoupled(s, t, *place(label % 6))
        expected = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True)
        torch.testing.assert_close(tckd + (1 - t.softmax(1)[0, label % 6, 0, 0]) * nckd, expected, rtol=1e-12, atol=0)


def test_two_classes_have_no_ranking():
    student = scores((1.3, -0.7), (100.1, 3)).requires_grad_()
    _, nckd = decoupled(student, scores((0.2, 0.9), (7, -50)), *place(0, 1))
    nckd.backward()
    assert nckd == 0
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_label_is_left_out_however_sure(dtype):
    student = scores((9e4, 1, 0), (-9e4, 0, 1)).to(dtype).requires_grad_()
    teacher = scores((-9e4, 0, 1), (9e4, 1, 0)).to(dtype)
    tckd, nckd = decoupled(student, teacher, *place(0, 0))
    sure = 1 / (1 + math.e)
    torch.testing.assert_close(nckd.item(), 1 - 2 * sure)  # KL between (σ, 1 − σ) and (1 − σ, σ), σ = 1/(1+e)
    torch.testing.assert_close(tckd.item(), 9e4, rtol=1e-4, atol=0)
    (tckd + nckd).backward()
    assert student.grad.isfinite().all()


def test_equal_logits_give_zero():
    mine, _, target = make_pair(dtype=torch.float64)
    value = DKDLoss()(mine, mine, target)
    value.backward()
    torch.testing.assert_close(value.item(), 0.0, rtol=0, atol=1e-13)
    torch.testing.assert_close(mine.logits.grad, torch.zeros_like(mine.logits), rtol=0, atol=1e-15)


def test_what_stands_at_ignored_positions_does_not_count():
    student, teacher, _ = make_pair()
    target = torch.randint(0, 5, (2, 16, 24))
    target[0, :3], target[1, :, 5] = IGNORED, -1
    expected = DKDLoss()(student, teacher, target)
    ignored = ((target == IGNORED) | (target < 0))[:, None].expand_as(student.logits)
    for junk in (1e30, math.inf, math.nan):
        logits = student.logits.detach().masked_fill(ignored, junk).requires_grad_()
        value = DKDLoss()(output(logits), output(teacher.logits.detach().masked_fill(ignored, junk)), target)
        value.backward()
        assert value == expected
        assert logits.grad.isfinite().all()
        assert not logits.grad[ignored].any()


def test_nothing_to_learn_from():
    student, teacher, target = make_pair()
    value = DKDLoss()(student, teacher, torch.full_like(target, IGNORED))
    value.backward()
    assert value == 0
    assert torch.equal(student.logits.grad, torch.zeros_like(student.logits))


def test_mean_is_over_the_batch():
    """An image with one valid position does not weigh as much as one with many."""
    student, teacher, target = make_pair(dtype=torch.float64)
    target[1, 4:] = IGNORED  # of image 1 one row of logits is left, of image 0 all 16
    both = DKDLoss()(student, teacher, target)
    one, other = (
        DKDLoss()(output(student.logits[i, None]), output(teacher.logits[i, None]), target[i, None]) for i in range(2)
    )
    torch.testing.assert_close(both, (16 * one + other) / 17)


def test_grids():
    student, teacher = make_output(size=(32, 48), seed=1), make_output(seed=2)
    target = torch.randint(0, 5, (2, 64, 96))
    small, large = target[:, ::4, ::4], (64, 96)
    expected = {
        "teacher": (upsampled(student, (16, 24)), teacher, small),
        "student": (student, upsampled(teacher, (8, 12)), target[:, ::8, ::8]),
        "labels": (upsampled(student, large), upsampled(teacher, large), target),
    }
    for grid, resized in expected.items():
        torch.testing.assert_close(DKDLoss(grid=grid)(student, teacher, target), DKDLoss()(*resized))


@pytest.mark.parametrize("grid", ["teacher", "student", "labels"])
def test_gradcheck(grid):
    student, teacher = (make_output(batch=1, size=size, dtype=torch.float64) for size in ((8, 12), (16, 16)))
    target = torch.tensor([[[0, 255, 4], [3, 1, 1]]])
    term = DKDLoss(1.5, 0.7, 2.0, grid)
    assert torch.autograd.gradcheck(lambda z: term(output(z), teacher, target), student.logits)


def test_keeps_two_maps_for_the_gradient():
    """Of [B, K, h, w]: at the labels' resolution each is large."""
    student, teacher, target = make_pair()
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        DKDLoss(grid="labels")(student, teacher, target)
    one = 2 * 5 * 64 * 96 * 4
    assert sum(size >= one for size, _ in sizes.values()) <= 2


def test_errors():
    mine, other, target = make_pair()
    for settings in ({"alpha": -1.0}, {"beta": math.nan}, {"alpha": math.inf}):
        with pytest.raises(UserError, match=f"DKDLoss: {next(iter(settings))} must be a number of at least 0"):
            DKDLoss(**settings)
    with pytest.raises(UserError, match="temperature must be a number greater than 0; got 0"):
        DKDLoss(temperature=0)
    with pytest.raises(UserError, match="grid must be one of 'teacher', 'student', 'labels'; got 'pixels'"):
        DKDLoss(grid="pixels")
    with pytest.raises(UserError, match="DKDLoss reads the labels: call it with target=labels"):
        DKDLoss()(mine, other)
    with pytest.raises(UserError, match="student has 5 classes, the teacher 4"):
        DKDLoss()(mine, output(torch.zeros(2, 4, 16, 24)), target)
    with pytest.raises(UserError, match="single class"):
        DKDLoss()(*[output(torch.zeros(2, 1, 16, 24))] * 2, target)
    with pytest.raises(UserError, match="student returns none"):
        DKDLoss()(mine._replace(logits=None), other, target)
