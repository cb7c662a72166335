import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import CLASSES, make_output, make_pair

from transkd.errors import UserError
from transkd.losses import TaskCrossEntropy

WEIGHTS = (1.0, 2.0, 0.5, 4.0, 0.0)


def by_hand(logits, target, weights):
    """The formula, pixel by pixel; both [B, …] of equal height and width."""
    total = mass = 0.0
    for image, label in np.ndindex(len(target), target[0].numel()):
        y = int(target[image].flatten()[label])
        if 0 <= y < logits.shape[1]:
            scores = logits[image].flatten(1)[:, label].double()
            total += weights[y] * (scores.logsumexp(0) - scores[y]).item()
            mass += weights[y]
    return total / mass


@pytest.fixture
def pair():
    """Labels of 24×32 for logits of 6×8, some of them not to be learnt."""
    student, _, target = make_pair(size=(24, 32), student=(8,), teacher=(8,))
    target[0, :8] = 255
    target[1, :, 5] = -1
    return student, target


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_at_the_labels_resolution(pair, weights):
    student, target = pair
    upsampled = F.interpolate(student.logits.detach(), (24, 32), mode="bilinear", align_corners=False)
    value = TaskCrossEntropy(weights)(student, None, target)
    assert value.item() == pytest.approx(by_hand(upsampled, target, weights or [1.0] * CLASSES), rel=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_at_the_logits_resolution(pair, weights):
    student, target = pair
    value = TaskCrossEntropy(weights, resolution="logits")(student, None, target)
    nearest = target[:, ::4, ::4]
    assert value.item() == pytest.approx(
        by_hand(student.logits.detach(), nearest, weights or [1.0] * CLASSES), rel=1e-5
    )


@pytest.mark.parametrize("size", [(24, 32), (25, 37), (3, 5)])
def test_nearest_labels_are_those_of_torch(size):
    student = make_output((8,), size=(24, 32))  # logits 6×8
    target = torch.randint(0, CLASSES, (2, *size))
    nearest = F.interpolate(target[:, None].double(), (6, 8), mode="nearest")[:, 0].long()
    value = TaskCrossEntropy(resolution="logits")(student, None, target)
    torch.testing.assert_close(value, F.cross_entropy(student.logits, nearest))


@pytest.mark.parametrize("resolution", ["labels", "logits"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("label", [255, -1])
def test_nothing_to_learn_from_is_a_differentiable_0(pair, resolution, weights, label):
    student, target = pair
    value = TaskCrossEntropy(weights, resolution)(student, None, torch.full_like(target, label))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.logits.grad, torch.zeros_like(student.logits))


def test_classes_without_weight_are_nothing_to_learn_from(pair):
    student, target = pair
    value = TaskCrossEntropy(WEIGHTS)(student, None, torch.full_like(target, 4))
    value.backward()
    assert value.item() == 0
    assert student.logits.grad.isfinite().all()


def test_ignored_pixels_get_no_gradient(pair):
    student, target = pair
    TaskCrossEntropy(resolution="logits")(student, None, target).backward()
    ignored = (target[:, ::4, ::4] == 255) | (target[:, ::4, ::4] < 0)
    reached = student.logits.grad.abs().sum(1) > 0
    assert torch.equal(reached, ~ignored)


def test_logits_of_the_labels_own_size(pair):
    student, target = pair
    logits = torch.randn(2, CLASSES, 24, 32)
    logits[:, 3] = -torch.inf  # a class that is ruled out
    target[target == 3] = 255
    value = TaskCrossEntropy()(student._replace(logits=logits), None, target)
    assert value.item() == pytest.approx(by_hand(logits, target, [1.0] * CLASSES), rel=1e-5)


def test_another_ignored_label(pair):
    student, target = pair
    value = TaskCrossEntropy(ignore_index=0)(student, None, target.clamp(0, 4))
    expected = TaskCrossEntropy()(student, None, torch.where(target.clamp(0, 4) == 0, 255, target.clamp(0, 4)))
    assert value == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(pair, dtype):
    student, target = pair
    half = student._replace(logits=student.logits.detach().to(dtype))
    value = TaskCrossEntropy(WEIGHTS)(half, None, target)
    assert value.dtype == torch.float32
    assert value == TaskCrossEntropy(WEIGHTS)(half._replace(logits=half.logits.float()), None, target)


def test_gradcheck(pair):
    student, target = pair
    logits = student.logits.detach().double().requires_grad_()
    term = TaskCrossEntropy(WEIGHTS)
    assert torch.autograd.gradcheck(
        lambda scores: term(student._replace(logits=scores), None, target), (logits,), fast_mode=True
    )


def test_uniform_scores_give_log_k(pair):
    student, target = pair
    uniform = student._replace(logits=torch.zeros_like(student.logits))
    assert TaskCrossEntropy()(uniform, None, target).item() == pytest.approx(math.log(CLASSES))


def test_reads_nothing_of_the_teacher_and_saves_nothing():
    term = TaskCrossEntropy(WEIGHTS)
    assert term.needs == frozenset()
    assert not term.state_dict()
    assert torch.equal(term.class_weights, torch.tensor(WEIGHTS))


def test_errors(pair):
    student, target = pair
    with pytest.raises(UserError, match=r"3 class weights, the student 5 classes"):
        TaskCrossEntropy((1.0, 1.0, 1.0))(student, None, target)
    with pytest.raises(UserError, match=r"'labels', 'logits'.*got 'teacher'"):
        TaskCrossEntropy(resolution="teacher")
    with pytest.raises(UserError, match="logits"):
        TaskCrossEntropy()(student._replace(logits=None), None, target)
    with pytest.raises(UserError, match="target=labels"):
        TaskCrossEntropy()(student, None)
    with pytest.raises(UserError, match=r"2 images.*\[1, 24, 32\]"):
        TaskCrossEntropy()(student, None, target[:1])


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, float("nan")], [0.0, 0.0], [float("inf"), 1.0]])
def test_class_weights_that_cannot_be_meant(weights):
    with pytest.raises(UserError, match="class_weights must be numbers of at least 0, not all 0"):
        TaskCrossEntropy(class_weights=weights)
