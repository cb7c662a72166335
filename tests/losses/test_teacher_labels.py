"""The teacher's predictions as labels, against values computed by hand."""

import math

import pytest
import torch

from transkd.errors import UserError
from transkd.losses import KDLoss, TaskCrossEntropy, TeacherLabelsLoss
from transkd.outputs import UNLABELLED, SegmentationOutput


def output(*probabilities):
    """One image of one row with these class probabilities at each position."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().T[None, :, None, :]
    return SegmentationOutput(logits, (), (), torch.zeros(1, 3, 4, 4 * len(probabilities)))


TEACHER = output([0.95, 0.05], [0.3, 0.7], [0.08, 0.92])
STUDENT = output([0.5, 0.5], [0.9, 0.1], [0.8, 0.2])


def test_hard_labels_where_the_teacher_is_confident():
    expected = (-math.log(0.5) - math.log(0.2)) / 3  # the second position is not; it counts in the mean
    assert TeacherLabelsLoss()(STUDENT, TEACHER).item() == pytest.approx(expected)
    without = (-math.log(0.5) - math.log(0.1) - math.log(0.2)) / 3
    assert TeacherLabelsLoss(threshold=0.0)(STUDENT, TEACHER).item() == pytest.approx(without)
    assert TeacherLabelsLoss(threshold=0.99)(STUDENT, TEACHER) == 0


def test_soft_labels():
    first = 0.95 * math.log(0.95 / 0.5) + 0.05 * math.log(0.05 / 0.5)
    third = 0.08 * math.log(0.08 / 0.8) + 0.92 * math.log(0.92 / 0.2)
    assert TeacherLabelsLoss(soft=True)(STUDENT, TEACHER).item() == pytest.approx((first + third) / 3)
    everywhere = TeacherLabelsLoss(soft=True, threshold=0.0)(STUDENT, TEACHER)
    torch.testing.assert_close(everywhere, KDLoss()(STUDENT, TEACHER))


def test_ignored_positions_and_images_without_labels():
    term = TeacherLabelsLoss(mask_ignored=True, grid="labels", threshold=0.0)
    student, teacher = (each._replace(image=torch.zeros(1, 3, 1, 3)) for each in (STUDENT, TEACHER))
    value = term(student, teacher, torch.tensor([[[0, 255, 255]]]))
    assert value.item() == pytest.approx(-math.log(0.5))
    unlabelled = torch.full((1, 1, 3), UNLABELLED)
    assert term(student, teacher, unlabelled) == TeacherLabelsLoss(threshold=0.0)(student, teacher)


def test_the_task_averages_over_labelled_pixels_alone():
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    both = SegmentationOutput(logits, (), (), torch.zeros(2, 3, 12, 20))
    target = torch.randint(0, 4, (1, 12, 20), generator=torch.Generator().manual_seed(1))
    mixed = torch.cat([target, torch.full_like(target, UNLABELLED)])
    for resolution in ("labels", "logits"):
        task = TaskCrossEntropy(resolution=resolution)
        alone = task(both._replace(logits=logits[:1]), None, target)
        torch.testing.assert_close(task(both, None, mixed), alone)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_probability(threshold):
    with pytest.raises(UserError, match="threshold must be a number from 0 to 1"):
        TeacherLabelsLoss(threshold=threshold)
