import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import make_output

from transkd.errors import UserError
from transkd.losses import CWDLoss
from transkd.outputs import SegmentationOutput


def output(logits):
    return SegmentationOutput(logits, (), (), torch.zeros(len(logits), 3, 4, 4))


@pytest.mark.parametrize("temperature", [1, 4])
def test_golden(temperature):
    vectors = golden.load("cwd_logits")
    logits = vectors["logits_s"].requires_grad_()
    value = CWDLoss(temperature)(output(logits), output(vectors["logits_t"]))
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.channel_T{temperature}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        logits.grad, vectors[f"expected.grad.channel_T{temperature}.logits_s"], rtol=1e-8, atol=1e-12
    )


def test_grid_of_the_labels_upsamples_both():
    student, teacher = make_output(seed=1), make_output(seed=2)
    target = torch.zeros(2, 64, 96, dtype=torch.int64)
    pair = [F.interpolate(o.logits, (64, 96), mode="bilinear", align_corners=False) for o in (student, teacher)]
    enlarged = [output(logits) for logits in pair]
    torch.testing.assert_close(CWDLoss(grid="labels")(student, teacher, target), CWDLoss()(*enlarged))


def test_grid_of_the_teacher_resizes_the_student():
    student, teacher = make_output(seed=1), make_output(size=(128, 192), seed=2)
    enlarged = output(F.interpolate(student.logits, (32, 48), mode="bilinear", align_corners=False))
    torch.testing.assert_close(CWDLoss()(student, teacher), CWDLoss()(enlarged, teacher))


def test_errors():
    student = make_output()
    with pytest.raises(UserError, match=r"grid must be one of .*'pixels'"):
        CWDLoss(grid="pixels")
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="temperature must be greater than 0"):
            CWDLoss(temperature)
    with pytest.raises(UserError, match="student has 5 classes, the teacher 4"):
        CWDLoss()(student, output(torch.zeros(2, 4, 16, 24)))
    with pytest.raises(UserError, match="target=labels"):
        CWDLoss(grid="labels")(student, student)
