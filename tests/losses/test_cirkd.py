import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import gradients, make_pair
from largest import Largest

from transkd.errors import UserError
from transkd.losses.cirkd import CIRKDMiniBatchLoss, cross_image_kl, pool_positions
from transkd.losses.shared.pieces import BUDGET
from transkd.outputs import SegmentationOutput


def output(feature):
    return SegmentationOutput(None, (feature,), (), torch.zeros(len(feature), 3, 4, 4))


def by_definition(student, teacher, temperature):
    """Every pair of images by itself."""
    mine, other = ([F.normalize(image.flatten(1), dim=0).T for image in maps] for maps in (student, teacher))
    values = []
    for a in range(len(student)):
        for b in range(len(student)):
            p = (other[a] @ other[b].T / temperature).softmax(1)
            q = (mine[a] @ mine[b].T / temperature).softmax(1)
            values.append((p * (p.log() - q.log())).sum(1).mean())
    return torch.stack(values).mean()


@pytest.mark.parametrize(("variant", "pool"), [("tau0.1", 1), ("tau0.1", "auto"), ("tau0.1_pool2", 2)])
def test_golden(variant, pool):
    vectors = golden.load("cirkd_minibatch")
    feature = vectors["feat_s"].requires_grad_()
    value = CIRKDMiniBatchLoss(stages=(1,), pool=pool)(output(feature), output(vectors["feat_t"]))
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(feature.grad, vectors[f"expected.grad.{variant}.feat_s"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
def test_definition(batch):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(batch, c, 3, 4, generator=generator, dtype=torch.float64) for c in (5, 7)]
    torch.testing.assert_close(cross_image_kl(*pair, 0.3), by_definition(*pair, 0.3))


@pytest.mark.parametrize("budget", [1, 200, 24 * 24])
def test_pieces_equal_the_whole(budget):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, c, 3, 4, generator=generator, dtype=torch.float64) for c in (5, 7))

    def compute(budget):
        leaf = student.clone().requires_grad_()
        value = cross_image_kl(leaf, teacher, 0.1, budget=budget)
        return value, *torch.autograd.grad(value, leaf)

    torch.testing.assert_close(compute(budget), compute(BUDGET), rtol=1e-12, atol=1e-14)


def test_by_hand():
    """One image, two positions: alike in the teacher, at a right angle in the student; τ = 1 / log 3."""
    student = torch.tensor([[2.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 4.0]]).view(1, 1, 1, 2)
    # soft-max of the student's (1, 0) / τ is (3, 1) / 4
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    value = CIRKDMiniBatchLoss(stages=(1,), temperature=1 / math.log(3))(output(student), output(teacher))
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_windows_at_the_border_average_what_there_is():
    maps = torch.arange(15.0).view(1, 1, 3, 5)
    assert pool_positions(maps, 2).tolist() == [[[[3, 5, 6.5], [10.5, 12.5, 14]]]]
    assert pool_positions(maps[..., :1, :1], 4).tolist() == [[[[0]]]]


@pytest.mark.parametrize(
    ("size", "pooled"), [((64, 64), (64, 64)), ((64, 65), (32, 33)), ((128, 256), (43, 86)), ((256, 512), (43, 86))]
)
def test_automatic_pooling(size, pooled):
    assert pool_positions(torch.zeros(1, 1, *size)).shape[2:] == pooled


def test_nothing_to_learn():
    student, teacher, _ = make_pair(dtype=torch.float64)
    scaled = teacher._replace(features=tuple(3 * maps for maps in teacher.features))
    value = CIRKDMiniBatchLoss(stages=(2, 4))(teacher, scaled)
    torch.testing.assert_close(value, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    silent = student._replace(features=tuple(torch.zeros_like(maps).requires_grad_() for maps in student.features))
    CIRKDMiniBatchLoss()(silent, teacher).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(silent))


def test_the_order_of_the_batch_does_not_matter():
    student, teacher, _ = make_pair(batch=3)
    turned = [o._replace(features=tuple(maps[[2, 0, 1]] for maps in o.features)) for o in (student, teacher)]
    torch.testing.assert_close(CIRKDMiniBatchLoss()(*turned), CIRKDMiniBatchLoss()(student, teacher))


def test_other_sizes_are_resized_to_the_teachers():
    feature, other = torch.rand(2, 6, 3, 4), torch.rand(2, 6, 5, 8)
    enlarged = F.interpolate(feature, (5, 8), mode="bilinear", align_corners=False)
    term = CIRKDMiniBatchLoss(stages=(1,))
    assert term(output(feature), output(other)) == term(output(enlarged), output(other))


def test_large_maps_in_little_memory():
    maps = [torch.randn(1, 4, 128, 256).requires_grad_() for _ in range(2)]
    with Largest() as largest:
        CIRKDMiniBatchLoss(stages=(1,))(*(output(feature) for feature in maps)).backward()
    assert largest.numel <= BUDGET


def test_errors():
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature must be a number greater than 0"):
            CIRKDMiniBatchLoss(temperature=temperature)
    for pool in (0, 1.5, "best", None):
        with pytest.raises(UserError, match="pool, where it is not 'auto', must be a whole number of at least 1"):
            CIRKDMiniBatchLoss(pool=pool)
    with pytest.raises(UserError, match="reads stage 5, but the student returns 4"):
        CIRKDMiniBatchLoss(stages=(5,))(*make_pair())
