import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import CLASSES, gradients, make_pair
from largest import Largest

from transkd.errors import UserError
from transkd.losses.ifvd import IFVDLoss, prototype_similarity
from transkd.losses.shared.grids import class_members
from transkd.outputs import SegmentationOutput


def output(feature):
    return SegmentationOutput(None, (feature,), (), torch.zeros(len(feature), 3, 4, 4))


def by_definition(features, labels):
    """Every position by itself: its cosine with the mean of its class; [B, h, w]."""
    cosines = torch.zeros(labels.shape, dtype=features.dtype)
    for b, y, x in (labels != 255).nonzero().tolist():
        alike = labels[b] == labels[b, y, x]
        mean = features[b][:, alike].mean(1)
        cosines[b, y, x] = F.cosine_similarity(features[b, :, y, x], mean, dim=0, eps=1e-8)
    return cosines


@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_golden(denominator):
    vectors = golden.load("ifvd")
    feature = vectors["feat_s"].requires_grad_()
    term = IFVDLoss(num_classes=5, stages=(1,), denominator=denominator)
    value = term(output(feature), output(vectors["feat_t"]), vectors["labels"])
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{denominator}_pixels"], rtol=1e-9, atol=0)
    expected = vectors[f"expected.grad.{denominator}_pixels.feat_s"]
    torch.testing.assert_close(feature.grad, expected, rtol=1e-8, atol=1e-12)


def test_definition():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (3, 4, 5), generator=generator)
    labels[0, 1], labels[1] = 255, 2
    members = class_members(labels.masked_fill(labels == 255, 0), labels != 255, 4).to(features.dtype)
    similarity = prototype_similarity(features, members).view(labels.shape)
    torch.testing.assert_close(similarity, by_definition(features, labels))


def test_by_hand():
    """Two positions at a right angle: each is at 45° from their mean; the teacher's are alike."""
    student = torch.tensor([[2.0, 0.0, 5.0], [0.0, 2.0, 1.0]]).view(1, 2, 1, 3)
    teacher = torch.tensor([[1.0, 4.0, 0.0]]).view(1, 1, 1, 3)
    labels = torch.tensor([[[1, 1, 255]]])
    error = (1 - math.sqrt(0.5)) ** 2
    for denominator, expected in (("valid", error), ("all", error * 2 / 3)):
        term = IFVDLoss(num_classes=3, stages=(1,), denominator=denominator)
        assert term(output(student), output(teacher), labels).item() == pytest.approx(expected, rel=1e-6)


def test_prototypes_are_of_each_image():
    student, teacher, target = make_pair(dtype=torch.float64)
    term = IFVDLoss(CLASSES, denominator="all")
    halves = []
    for i in range(2):
        parts = [o._replace(features=tuple(maps[i : i + 1] for maps in o.features)) for o in (student, teacher)]
        halves.append(term(*parts, target[i : i + 1]))
    torch.testing.assert_close(sum(halves) / 2, term(student, teacher, target))


def test_one_position_of_a_class_says_nothing():
    feature = torch.randn(1, 6, 1, 3).requires_grad_()
    value = IFVDLoss(3, stages=(1,))(output(feature), output(torch.randn(1, 4, 1, 3)), torch.tensor([[[0, 1, 2]]]))
    value.backward()
    torch.testing.assert_close(value.detach(), torch.zeros(()), rtol=0, atol=1e-12)
    torch.testing.assert_close(feature.grad, torch.zeros_like(feature), rtol=0, atol=1e-6)


@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_nothing_to_learn(denominator):
    student, teacher, target = make_pair()
    term = IFVDLoss(CLASSES, stages=(1, 4), denominator=denominator)
    assert term(student, student, target) == 0
    value = term(student, teacher, torch.full_like(target, 255))
    value.backward()
    assert value == 0
    assert len(gradients(student)) == 2
    assert all((gradient == 0).all() for gradient in gradients(student))
    silent = student._replace(features=tuple(torch.zeros_like(maps).requires_grad_() for maps in student.features))
    term(silent, teacher, target).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(silent))


@pytest.mark.parametrize("ignored", [255, -1, CLASSES])
def test_ignored_positions_do_not_matter(ignored):
    student, teacher, target = make_pair(dtype=torch.float64)
    target[:, :, 48:] = ignored  # the right half: columns 12 and on at stage 1
    changed = [o._replace(features=(o.features[0].detach().clone(), *o.features[1:])) for o in (student, teacher)]
    for o in changed:
        o.features[0][..., 12:] = 7
    term = IFVDLoss(CLASSES, stages=(1,))
    torch.testing.assert_close(term(*changed, target), term(student, teacher, target))
    alone = [o._replace(features=(o.features[0][..., :12],)) for o in (student, teacher)]
    torch.testing.assert_close(term(*alone, target[:, :, :48]), term(student, teacher, target))


def test_other_sizes_are_resized_to_the_teachers():
    feature, other, labels = torch.rand(2, 6, 3, 4), torch.rand(2, 6, 5, 8), torch.randint(0, 4, (2, 20, 32))
    enlarged = F.interpolate(feature, (5, 8), mode="bilinear", align_corners=False)
    term = IFVDLoss(4, stages=(1,))
    assert term(output(feature), output(other), labels) == term(output(enlarged), output(other), labels)


def test_large_maps_in_little_memory():
    maps, labels = [torch.randn(1, 32, 128, 256).requires_grad_() for _ in range(2)], torch.randint(19, (1, 512, 1024))
    with Largest() as largest:
        IFVDLoss(19, stages=(1,))(*(output(feature) for feature in maps), labels).backward()
    assert largest.numel <= maps[0].numel()


def test_errors():
    with pytest.raises(UserError, match=r"denominator must be one of 'valid', 'all'; got 'mean'"):
        IFVDLoss(5, denominator="mean")
    with pytest.raises(UserError, match="num_classes must be a whole number of at least 1"):
        IFVDLoss(0)
    with pytest.raises(UserError, match="target=labels"):
        IFVDLoss(5)(*make_pair()[:2])
    with pytest.raises(UserError, match="reads stage 5, but the student returns 4"):
        IFVDLoss(5, stages=(5,))(*make_pair())
