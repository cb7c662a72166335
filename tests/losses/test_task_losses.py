"""Focal, Dice and OHEM: against other libraries, by hand, and against the cross-entropy that they reduce to."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import CLASSES, make_pair
from segmentation_models_pytorch.losses import DiceLoss
from torchvision.ops import sigmoid_focal_loss

from transkd.errors import UserError
from transkd.losses import TaskCrossEntropy, TaskDice, TaskFocal, TaskOHEM
from transkd.outputs import SegmentationOutput

WEIGHTS = (1.0, 2.0, 0.5, 4.0, 0.0)
TERMS = (TaskFocal, TaskDice, TaskOHEM)
IGNORED = (255, -1)


@pytest.fixture
def pair():
    """Labels of 24×32 for logits of 6×8, some of them not to be learnt, and class 3 in none."""
    student, _, target = make_pair(size=(24, 32), student=(8,), teacher=(8,))
    target[target == 3] = 2
    target[0, :8] = 255
    target[1, :, 5] = -1
    return student, target


def at_labels(student):
    return F.interpolate(student.logits, (24, 32), mode="bilinear", align_corners=False)


def output(logits):
    """Logits of one pixel a column, [K, n]."""
    return SegmentationOutput(logits[None, :, None, :], (), (), torch.rand(1, 3, 1, logits.shape[1]))


@pytest.mark.parametrize("make", [TaskCrossEntropy, *TERMS])
@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.float32])
def test_labels_of_another_type_are_refused_in_one_line(pair, make, kind):
    student, target = pair
    with pytest.raises(UserError, match=rf"reads labels as int64, got {str(kind)[6:]}: give target\.long\(\)\.$"):
        make()(student, None, target.to(kind))


# Focal


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_of_two_classes_is_torchvisions(gamma):
    score = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    label = (torch.arange(200) % 3 == 0).long()
    expected = sigmoid_focal_loss(score, label.double(), alpha=-1, gamma=gamma, reduction="mean")
    value = TaskFocal(gamma)(output(torch.stack([torch.zeros_like(score), score])), None, label[None, None])
    torch.testing.assert_close(value, expected)


def test_focal_by_hand():
    # p of the labels: 1/4 and 3/4; weights 1 and 3
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(3)]])
    value = TaskFocal(2.0, [1.0, 3.0])(output(logits), None, torch.tensor([[[0, 1]]]))
    expected = ((3 / 4) ** 2 * math.log(4) + 3 * (1 / 4) ** 2 * math.log(4 / 3)) / 4
    assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("resolution", ["labels", "logits"])
@pytest.mark.parametrize("make", [lambda *a: TaskFocal(0.0, *a), lambda *a: TaskOHEM(0.7, 1.0, *a)])
def test_cross_entropy_as_a_special_case(pair, make, weights, resolution):
    student, target = pair
    expected = TaskCrossEntropy(weights, resolution)(student, None, target)
    (expected_gradient,) = torch.autograd.grad(expected, student.logits)
    value = make(weights, resolution)(student, None, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, student.logits)[0], expected_gradient)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_a_pixel_that_is_surely_right_has_a_gradient_of_0(gamma):
    logits = torch.tensor([[200.0], [0.0]]).requires_grad_()
    TaskFocal(gamma)(output(logits), None, torch.zeros(1, 1, 1, dtype=torch.int64)).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 1e-6


# Dice


def test_dice_is_that_of_segmentation_models(pair):
    """Theirs divides by all classes, ours by those that occur."""
    student, target = pair
    expected = DiceLoss("multiclass", ignore_index=255)(at_labels(student), target.masked_fill(target < 0, 255))
    torch.testing.assert_close(TaskDice()(student, None, target), expected * CLASSES / (CLASSES - 1))


def test_dice_by_hand():
    # p of class 0 is 3/4 and 1/4; labels 0 and 1: Dice is 2 · 3/4 / (1 + 1) of both classes
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    assert TaskDice()(output(logits), None, torch.tensor([[[0, 1]]])).item() == pytest.approx(1 / 4)
    # (2 · 3/4 + 1) / (2 + 1) with a smoothing of 1
    assert TaskDice(1.0)(output(logits), None, torch.tensor([[[0, 1]]])).item() == pytest.approx(1 / 6)
    # labels 0 and 0: 2 · 1 / (1 + 2) of class 0 alone
    assert TaskDice()(output(logits), None, torch.tensor([[[0, 0]]])).item() == pytest.approx(1 / 3)


def test_dice_weighs_classes():
    logits = torch.tensor([[math.log(3), 0.0, 0.0], [0.0, math.log(3), math.log(3)]])
    # class 0: p = 3/4, 1/4, 1/4 with label 1, 0, 0: 2 · 3/4 / (5/4 + 1) = 2/3; class 1: 2 · 3/2 / (7/4 + 2) = 4/5
    value = TaskDice(0.0, [3.0, 1.0])(output(logits), None, torch.tensor([[[0, 1, 1]]]))
    assert value.item() == pytest.approx((3 * (1 - 2 / 3) + (1 - 4 / 5)) / 4)


def test_dice_of_many_pixels_in_float32():
    """Half a million pixels of p = 0.985, as many as a float32 cannot add one by one."""
    logits = torch.zeros(1, 2, 8, 16)
    logits[:, 0] = math.log(0.985 / 0.015)
    target = torch.zeros(1, 512, 1024, dtype=torch.int64)
    value = TaskDice()(SegmentationOutput(logits, (), (), logits), None, target)
    assert value.item() == pytest.approx(1 - 2 * 0.985 / 1.985, abs=5e-5)


# OHEM


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("threshold", "min_share"), [(0.7, 0.0625), (0.05, 0.2), (0.02, 0.01)])
def test_ohem_pixel_by_pixel(pair, threshold, min_share, weights):
    student, target = pair
    log_p = at_labels(student).detach().double().log_softmax(1).permute(0, 2, 3, 1).reshape(-1, CLASSES).numpy()
    labels = target.flatten().numpy()
    valid = ~np.isin(labels, IGNORED)
    losses, labels = -log_p[valid, labels[valid]], labels[valid]
    order = np.argsort(-losses)
    count = max((losses >= -math.log(threshold)).sum(), math.ceil(min_share * valid.sum()))
    chosen = order[:count]
    share = np.array(weights or [1.0] * CLASSES)[labels[chosen]]
    value = TaskOHEM(threshold, min_share, weights)(student, None, target)
    assert value.item() == pytest.approx((share * losses[chosen]).sum() / share.sum(), rel=1e-5)


@pytest.mark.parametrize("min_share", [0.15, 0.3, 0.6])
def test_a_share_whose_product_with_the_pixels_is_rounded_up(min_share):
    """In float32 0.3 · 100 is just above 30; all 100 pixels are valid, and equally easy."""
    logits = torch.tensor([[5.0], [0.0]]).expand(2, 100)
    value = TaskOHEM(min_share=min_share)(output(logits), None, torch.zeros(1, 1, 100, dtype=torch.int64))
    assert value.item() == pytest.approx(math.log1p(math.exp(-5)), rel=1e-4)


def test_easy_pixels_get_no_gradient():
    logits = torch.tensor([[3.0, 0.1], [0.0, 0.0]]).requires_grad_()
    TaskOHEM()(output(logits), None, torch.zeros(1, 1, 2, dtype=torch.int64)).backward()
    assert logits.grad[:, 0].tolist() == [0, 0]
    assert logits.grad[:, 1].abs().min() > 0.1


# All


@pytest.mark.parametrize("term", TERMS)
def test_a_class_that_is_ruled_out(term):
    """Logits of the labels' own size may be −∞ where the class is not the label, ignored pixels' labels among them."""
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    target = torch.randint(1, 3, (2, 4, 4))
    target[:, 0] = 255
    expected = term()(
        SegmentationOutput(logits[:, 1:], (), (), logits), None, (target - 1).masked_fill(target > 2, 255)
    )
    ruled_out = logits.clone()
    ruled_out[:, 0] = -torch.inf
    ruled_out.requires_grad_()
    value = term()(SegmentationOutput(ruled_out, (), (), logits), None, target)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert ruled_out.grad.isfinite().all()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("label", IGNORED)
@pytest.mark.parametrize("resolution", ["labels", "logits"])
def test_nothing_to_learn_from_is_a_differentiable_0(pair, term, label, resolution):
    student, target = pair
    value = term(class_weights=WEIGHTS, resolution=resolution)(student, None, torch.full_like(target, label))
    value.backward()
    assert value.item() == 0
    assert not student.logits.grad.any()


@pytest.mark.parametrize("term", TERMS)
def test_classes_without_weight_are_nothing_to_learn_from(pair, term):
    student, target = pair
    value = term(class_weights=WEIGHTS)(student, None, torch.full_like(target, 4))
    value.backward()
    assert value.item() == 0
    assert student.logits.grad.isfinite().all()


@pytest.mark.parametrize("term", TERMS)
def test_the_right_answer_has_a_value_of_0(term):
    target = torch.randint(0, CLASSES, (1, 1, 50))
    sure = 100 * F.one_hot(target[0, 0], CLASSES).T.float()
    assert term()(output(sure), None, target).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskFocal(-1.0), r"TaskFocal: gamma must be a number of at least 0; got -1"),
        (lambda: TaskDice(math.inf), r"TaskDice: smooth must be a number of at least 0; got inf"),
        (lambda: TaskOHEM(1.0), r"TaskOHEM: threshold must be a probability between 0 and 1; got 1"),
        (lambda: TaskOHEM(min_share=0.0), r"TaskOHEM: min_share must be above 0 and at most 1; got 0"),
        (lambda: TaskDice(resolution="teacher"), r"TaskDice: resolution must be one of 'labels', 'logits'"),
        (lambda: TaskFocal(class_weights="auto"), r"TaskFocal: class_weights=auto is counted .* by transkd\.train"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("term", TERMS)
def test_what_does_not_fit(pair, term):
    student, target = pair
    name = term.__name__
    with pytest.raises(UserError, match=rf"{name} has 3 class weights, the student 5 classes"):
        term(class_weights=[1.0] * 3)(student, None, target)
    with pytest.raises(UserError, match=rf"{name} reads labels"):
        term()(student)
    with pytest.raises(UserError, match=rf"{name} .*2 images.*\[1, 24, 32\]"):
        term()(student, None, target[:1])
