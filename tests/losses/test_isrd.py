import golden
import pytest
import torch
from drawn import STUDENT, TEACHER, make_output

from transkd.errors import UserError
from transkd.losses import TaskCrossEntropy
from transkd.losses.isrd import ISRDLoss
from transkd.losses.kd import KDLoss
from transkd.outputs import SegmentationOutput


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def student_output(feature, logits=None):
    return SegmentationOutput(logits, (feature,), (), torch.zeros(len(feature), 3, 4, 4))


def teacher_output(image, logits=None):
    return SegmentationOutput(logits, (torch.zeros(len(image), 1, 1, 1),), (), image)


def make_pair(size=(64, 96), scale=2, **settings):
    """The teacher sees an image `scale` times as large as the student's."""
    large = (size[0] * scale, size[1] * scale)
    return make_output(STUDENT, size=size, seed=1, **settings), make_output(TEACHER, size=large, seed=2, **settings)


@pytest.mark.parametrize("suffix", ["", "_square"])
def test_golden(suffix):
    vectors = golden.load("pixel_distillation")
    feature, image = vectors[f"feat_s{suffix}"].requires_grad_(), vectors[f"image{suffix}"].requires_grad_()
    term = ISRDLoss((6,), ratio=2).double()
    term.load_state_dict(golden.load("pixel_distillation", "param."), strict=True)
    close(term.reconstruct(feature, image.shape[-2:]), vectors[f"expected.sr{suffix}"])
    value = term(student_output(feature), teacher_output(image))
    close(value, vectors[f"expected.loss.isrd{suffix}"])
    value.backward()
    prefix = f"expected.grad.isrd{suffix}"
    close(feature.grad, vectors[f"{prefix}.feat_s{suffix}"], rtol=1e-8)
    for name, parameter in term.named_parameters():
        close(parameter.grad, vectors[f"{prefix}.param.{name}"], rtol=1e-8)
    assert image.grad is None


def test_golden_task():
    """The method's other part: what conf/distill/pixel_distillation.yaml weighs."""
    vectors = golden.load("pixel_distillation")
    logits, target = vectors["logits_s"].requires_grad_(), vectors["labels"]
    student = student_output(logits, logits)
    teacher = teacher_output(vectors["image"], vectors["logits_t"])
    task = TaskCrossEntropy()(student, teacher, target)
    kd = KDLoss(temperature=4.0, mask_ignored=True)(student, teacher, target)
    close(task, vectors["expected.loss.task_T4_a0.9.ce"])
    close(kd, vectors["expected.loss.task_T4_a0.9.kd"])
    total = 0.1 * task + 0.9 * kd
    close(total, vectors["expected.loss.task_T4_a0.9"])
    total.backward()
    close(logits.grad, vectors["expected.grad.task_T4_a0.9.logits_s"], rtol=1e-8)


def test_by_hand():
    """One position becomes 2×2 pixels, the upper row inside; colour c at pixel ij weighs c·4 + i·2 + j − 5."""
    term = ISRDLoss((1,), ratio=2).double()
    with torch.no_grad():
        term.conv.weight.copy_((torch.arange(12.0) - 5).view(12, 1, 1, 1))
    image = term.reconstruct(torch.full((1, 1, 1, 1), 4.0).double(), (1, 2))
    # 4·(−5, −4), 4·(−1, 0) and 4·(3, 4); a quarter of what is negative
    close(image.view(3, 2), torch.tensor([[-5.0, -4.0], [-1.0, 0.0], [12.0, 16.0]]).double())
    student = student_output(torch.full((1, 1, 1, 1), 4.0).double())
    close(term(student, teacher_output(torch.ones(1, 3, 1, 2).double())), torch.tensor(40 / 6, dtype=torch.float64))
    assert term(student, teacher_output(image)) == 0  # the minimum


@pytest.mark.parametrize(("stage", "scale", "ratio"), [(1, 1, 4), (1, 2, 8), (1, 4, 16), (2, 2, 16)])
def test_ratio_is_the_stride_times_the_scale(stage, scale, ratio):
    student, teacher = make_pair(scale=scale)
    ISRDLoss(STUDENT, stage=stage, ratio=ratio)(student, teacher).backward()
    reached = [feature.grad is not None for feature in student.features]
    assert reached == [i == stage for i in range(1, 5)]
    assert teacher.image.grad is None


@pytest.mark.parametrize("size", [(512, 1024), (511, 1017), (34, 130), (9, 8), (1, 7)])
def test_sides_that_are_no_multiples(size):
    """Each stride of the networks rounds up: 34 pixels, 17 for the student, a feature of 5."""
    feature = torch.randn(1, 8, -(-size[0] // 8), -(-size[1] // 8))
    term = ISRDLoss((8,))
    image = torch.randn(1, 3, *size)
    assert term.reconstruct(feature, size).shape == image.shape
    assert term(student_output(feature), teacher_output(image)).isfinite()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(batch, dtype):
    student, teacher = make_pair(batch=batch)
    term = ISRDLoss(STUDENT)
    expected = term(student, teacher)
    halves = student._replace(features=tuple(maps.to(dtype) for maps in student.features))
    with torch.autocast("cpu", dtype=dtype):
        value = term(halves, teacher._replace(image=teacher.image.to(dtype)))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    value.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in term.parameters())


def test_order_of_the_images_and_labels_do_not_matter():
    student, teacher = make_pair(dtype=torch.float64)
    term = ISRDLoss(STUDENT).double()
    value = term(student, teacher)
    flipped = student._replace(features=tuple(maps.flip(0) for maps in student.features))
    close(term(flipped, teacher._replace(image=teacher.image.flip(0))), value)
    assert term(student, teacher, torch.full((2, 128, 192), 255)) == value


def test_start():
    term = ISRDLoss((64,), ratio=4)
    assert term.conv.weight.shape == (48, 64, 1, 1)
    assert term.conv.bias is None
    assert 0.95 / 8 < term.conv.weight.abs().max() <= 1 / 8
    assert term.prelu.weight.tolist() == [0.25] * 3


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match=r"feature of 8×12 .* image of 64×96.* image is 64×96, is 16×24\. Set ratio=4,"):
        ISRDLoss(STUDENT)(*make_pair(scale=1))
    with pytest.raises(UserError, match=r"Set ratio=16,"):
        ISRDLoss(STUDENT)(*make_pair(scale=4))
    other_crop = make_output(TEACHER, size=(128, 128))
    with pytest.raises(UserError, match=r"feature of 16×16 .* image of 128×128.* multiples of 8,.* the same crop"):
        ISRDLoss(STUDENT)(make_output(), other_crop)


def test_errors():
    for ratio in (0, 2.5, "8"):
        with pytest.raises(UserError, match="ratio must be a whole number of at least 1; got"):
            ISRDLoss(STUDENT, ratio=ratio)
    with pytest.raises(UserError, match="stage must be from 1 to 4; got 0"):
        ISRDLoss(STUDENT, stage=0)
    with pytest.raises(UserError, match=r"stage must be from 1 to 4.* got 5"):
        ISRDLoss(STUDENT, stage=5)
    student, teacher = make_pair()
    with pytest.raises(
        UserError, match=r"student_channels=\(8, 16\), but the student's features have \(8, 16, 24, 32\)"
    ):
        ISRDLoss((8, 16))(student, teacher)
    with pytest.raises(UserError, match="there is no teacher"):
        ISRDLoss(STUDENT)(student, None)
    with pytest.raises(UserError, match="2 images from the student and 1 from the teacher"):
        ISRDLoss(STUDENT)(student, teacher._replace(image=teacher.image[:1]))
