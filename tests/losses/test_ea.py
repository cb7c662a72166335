import pytest
import torch
from drawn import STUDENT, TEACHER, gradients, make_output, make_pair

from transkd.errors import UserError
from transkd.losses import EALoss

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}


def test_shares_at_the_start():
    term = EALoss(**CHANNELS)
    torch.testing.assert_close(term.student_share.detach(), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(term.assistant_share.detach(), torch.tensor([0.5, 0.6, 0.7, 0.8]))


def test_what_it_reads_of_the_student():
    """The image, every embedding, and every stage's features but the deepest's."""
    student, teacher, _ = make_pair()
    EALoss(**CHANNELS)(student, teacher).backward()
    assert student.logits.grad is None
    assert student.features[-1].grad is None
    assert len(gradients(student)) == 1 + 4 + 3


def test_stage_weights_weigh_the_stages():
    student, teacher, _ = make_pair()
    one_by_one = []
    for stage in range(4):
        torch.manual_seed(0)
        term = EALoss(**CHANNELS, stage_weights=[float(stage == other) for other in range(4)])
        one_by_one.append(term(student, teacher))
    torch.manual_seed(0)
    weighed = EALoss(**CHANNELS)(student, teacher)
    expected = sum(weight * value for weight, value in zip((0.1, 0.1, 0.5, 1.0), one_by_one, strict=True))
    torch.testing.assert_close(weighed, expected)


def test_assistants_start_as_mit_does():
    """Normal with σ = sqrt(2 / (k·k·out)), zero biases."""
    torch.manual_seed(0)
    layer = EALoss((32, 64), (64, 128), stage_weights=(1.0, 1.0)).assistants["1"].proj
    assert layer.weight.std().item() == pytest.approx((2 / (7 * 7 * 64)) ** 0.5, rel=0.05)
    assert layer.bias.abs().max() == 0


def test_other_strides_are_named():
    student = make_output()._replace(image=torch.rand(2, 3, 128, 192))
    with pytest.raises(UserError, match="at stage 1 it makes 32 x 48 tokens, but the student has 384"):
        EALoss(**CHANNELS)(student, make_output(TEACHER))


def test_number_of_stage_weights_is_checked():
    with pytest.raises(UserError, match=r"got 2 weights .* for 4 stages"):
        EALoss(**CHANNELS, stage_weights=(1.0, 1.0))
