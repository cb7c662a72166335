import golden
import pytest
import torch

from transkd.errors import UserError
from transkd.losses.shared.checks import check_positive, check_stages
from transkd.losses.shared.grids import connected_zero, feature_pairs, labels_on_grid, on_grid
from transkd.outputs import SegmentationOutput


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("maps", "size", "key"), [("x", (8, 12), "up_8x12_ac_false"), ("x_large", (5, 7), "down_5x7_ac_false")]
)
def test_golden_resizing(maps, size, key):
    vectors = golden.load("common")
    like = torch.zeros(2, 1, *size, dtype=torch.float64)
    resized, kept = on_grid(None, vectors[maps], like, "teacher")
    close(resized, vectors[f"expected.{key}"])
    assert torch.equal(kept, like)
    kept, resized = on_grid(None, like, vectors[maps], "student")
    close(resized, vectors[f"expected.{key}"])
    assert torch.equal(kept, like)


def test_golden_labels():
    vectors = golden.load("common")
    expected = vectors["expected.labels_7x11"]
    labels, valid = labels_on_grid(vectors["labels"], (7, 11))
    assert torch.equal(valid, expected != 255)
    assert torch.equal(labels, expected.masked_fill(expected == 255, 0))


def test_a_label_below_zero_is_ignored():
    labels, valid = labels_on_grid(torch.tensor([[[-1, 3]]]), (1, 2))
    assert (labels.tolist(), valid.tolist()) == ([[[0, 3]]], [[[False, True]]])


def test_the_labels_may_be_the_grid():
    maps = on_grid(None, torch.rand(1, 2, 4, 6), torch.rand(1, 3, 8, 12), "labels", torch.zeros(1, 16, 24))
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 24), (16, 24)]
    with pytest.raises(UserError, match="reads the labels: call it with target=labels"):
        on_grid(None, torch.rand(1, 2, 4, 6), torch.rand(1, 3, 8, 12), "labels")


def test_unlike_batches_are_named():
    with pytest.raises(UserError, match="got 1 images from the student and 2 from the teacher"):
        on_grid(None, torch.rand(1, 2, 4, 6), torch.rand(2, 2, 4, 6))


def test_the_teacher_takes_no_gradient():
    teacher = torch.rand(1, 2, 4, 6, requires_grad=True)
    maps = on_grid(None, torch.rand(1, 2, 8, 12, requires_grad=True), teacher, "student")
    (maps[0] - maps[1]).sum().backward()
    assert teacher.grad is None


def test_nothing_is_a_differentiable_zero():
    tensors = [torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True), torch.ones(2, requires_grad=True)]
    value = connected_zero(*tensors)
    value.backward()
    assert value == 0
    assert all(tensor.grad.tolist() == [0.0] * len(tensor) for tensor in tensors)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_what_must_be_positive(value):
    with pytest.raises(UserError, match=r"the temperature must be a number greater than 0; got"):
        check_positive(None, "temperature", value)


@pytest.mark.parametrize("stages", [(), (0,), (1, 1), (-1, 2)])
def test_stages(stages):
    with pytest.raises(UserError, match="stages must be distinct numbers from 1, at least one"):
        check_stages(None, stages)


def test_a_stage_that_a_network_does_not_have():
    output = SegmentationOutput(None, (torch.rand(1, 2, 4, 4),), (), torch.rand(1, 3, 16, 16))
    assert len(feature_pairs(None, (1,), output, output)) == 1
    with pytest.raises(UserError, match=r"reads stage 4, but the student returns 1 stages of features; choose among"):
        feature_pairs(None, (4,), output, output)
