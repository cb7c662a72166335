import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import TEACHER, make_output, make_pair

from transkd.errors import UserError
from transkd.losses.manifold import ManifoldLoss, inter_error, intra_error, random_error
from transkd.outputs import SegmentationOutput

ERRORS = {"intra": intra_error, "inter": inter_error, "random": random_error}


def output(*features):
    return SegmentationOutput(None, features, (), torch.zeros(len(features[0]), 3, 4, 4))


def golden_tokens():
    """The student has a class token more, the first, which is no patch."""
    vectors = golden.load("manifold")
    return vectors["tokens_s"].requires_grad_(), vectors["tokens_t"].requires_grad_(), vectors["rand_index"]


def check(value, student, variant):
    torch.testing.assert_close(value, golden.load("manifold", f"expected.loss.{variant}")[""], rtol=1e-9, atol=0)
    value.backward()
    expected = golden.load("manifold", f"expected.grad.{variant}.tokens_s")[""]
    torch.testing.assert_close(student.grad, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("part", ERRORS)
def test_golden_parts(part):
    student, teacher, index = golden_tokens()
    value = ERRORS[part](student[:, 1:], teacher, **({"index": index} if part == "random" else {}))
    check(value, student, part)
    assert teacher.grad is None


def test_golden_total(monkeypatch):
    student, teacher, index = golden_tokens()
    drawn = torch.cat((index, torch.arange(192)))  # what lies behind the sample must not count
    monkeypatch.setattr(torch, "randperm", lambda count, device: drawn)
    features = [tokens.mT.reshape(2, -1, 8, 12) for tokens in (student[:, 1:], teacher)]
    value = ManifoldLoss(stages=(1,), samples=24)(*map(output, features))
    check(value, student, "total_4_0.1_0.2")


def test_by_hand():
    """Two images of two positions. Student: all alike; teacher: the second image is orthogonal to the first."""
    student = torch.tensor([[[2.0], [3.0]], [[1.0], [5.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [7.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]])
    assert intra_error(student, teacher).item() == 0
    assert inter_error(student, teacher).item() == 0.5  # of 2×2 images, two pairs differ by 1
    assert random_error(student, teacher).item() == 0.5  # of 4×4 positions, eight
    assert random_error(student, teacher, index=torch.tensor([0, 1])).item() == 0
    assert random_error(student, teacher, index=torch.tensor([1, 2])).item() == 0.5
    teacher[1, 1] = -teacher[1, 1]
    assert intra_error(student, teacher).item() == 1  # of one image's 2×2 positions, two differ by 2


@pytest.mark.parametrize("part", ERRORS)
def test_only_directions_count(part):
    student, teacher, _ = make_pair(dtype=torch.float64)
    first, second = (o.features[3].flatten(2).mT for o in (student, teacher))
    lengths = torch.rand(2, 6, 1, dtype=torch.float64) + 0.5
    turned = first @ torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    expected = ERRORS[part](first, second)
    torch.testing.assert_close(ERRORS[part](lengths * turned, second), expected)
    torch.testing.assert_close(ERRORS[part](first.flip(0), second.flip(0)), expected)
    torch.testing.assert_close(ERRORS[part](turned, first).item(), 0.0, rtol=0, atol=1e-12)


def test_the_teachers_features_give_nothing_to_learn():
    same = make_output()
    value = ManifoldLoss()(same, make_output())
    value.backward()
    assert value.abs() < 1e-10
    assert max(feature.grad.abs().max() for feature in same.features) < 1e-6


def test_a_batch_of_one_has_no_other_images():
    student, teacher, _ = make_pair(batch=1)
    value = ManifoldLoss(intra_weight=0, random_weight=0)(student, teacher)
    value.backward()
    assert value.abs() < 1e-10
    assert max(feature.grad.abs().max() for feature in student.features) < 1e-6


def test_the_mean_over_stages():
    student, teacher, _ = make_pair(dtype=torch.float64)
    parts = {"intra_weight": 4.0, "inter_weight": 0.1, "random_weight": 0.0}
    single = [ManifoldLoss(stages=(i,), **parts)(student, teacher) for i in (1, 3)]
    torch.testing.assert_close(ManifoldLoss(stages=(1, 3), **parts)(student, teacher), (single[0] + single[1]) / 2)


def test_sizes_that_differ():
    student, teacher = make_output(seed=1), make_output(TEACHER, size=(128, 192), seed=2)
    enlarged = output(*(F.interpolate(f, scale_factor=2, mode="bilinear") for f in student.features))
    values = []
    for shown in (student, enlarged):
        torch.manual_seed(0)
        values.append(ManifoldLoss()(shown, teacher))
    torch.testing.assert_close(*values)


def test_the_sample_is_drawn_from_torchs_generator_without_replacement():
    tokens, other = torch.randn(2, 50, 4), torch.randn(2, 50, 6)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(random_error(tokens, other, samples=10).item())
    assert values[0] == values[1] != values[2]
    torch.manual_seed(0)
    index = torch.randperm(100)[:10]
    assert random_error(tokens, other, index=index).item() == values[0]
    everything = random_error(tokens, other, index=torch.arange(100))
    for samples in (100, 101):  # a draw of all is all
        torch.testing.assert_close(random_error(tokens, other, samples=samples), everything)


def test_large_maps_need_no_matrix_of_all_pairs():
    student = torch.randn(2, 4, 256, 256).requires_grad_()  # its similarities would be 17 GB an image
    ManifoldLoss(stages=(1,))(output(student), output(torch.randn(2, 6, 256, 256))).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("part", ERRORS)
def test_tokens_that_cannot_be_paired(part):
    """In the published code a teacher with more tokens is compared at wrong positions, and nothing is said."""
    for student, teacher in ((9, 8), (8, 9)):
        with pytest.raises(UserError, match=rf"positions\] \[2, {student}\], the teacher \[2, {teacher}\]"):
            ERRORS[part](torch.rand(2, student, 4), torch.rand(2, teacher, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ()}, "stages must be distinct numbers"),
        ({"stages": (1, 1)}, "stages must be distinct numbers"),
        ({"intra_weight": -1}, "intra_weight must be a number of at least 0; got -1"),
        ({"random_weight": math.inf}, "random_weight must be a number of at least 0; got inf"),
        ({"intra_weight": 0, "inter_weight": 0, "random_weight": 0}, "no part to compute"),
        ({"samples": 0}, "samples must be"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        ManifoldLoss(**settings)
    assert "\n" not in str(caught.value)


def test_stages_that_are_not_there():
    student, teacher, _ = make_pair()
    with pytest.raises(UserError, match="reads stage 5, but the student returns 4"):
        ManifoldLoss(stages=(5,))(student, teacher)
    with pytest.raises(UserError, match="2 images from the student and 3"):
        ManifoldLoss()(student, make_output(TEACHER, batch=3))
