import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import make_output, make_pair

from transkd.errors import UserError
from transkd.losses.dist import DISTLoss, relations
from transkd.outputs import SegmentationOutput

VARIANTS = {"tau1": (1, False), "tau4": (4, False), "tau1_masked": (1, True)}
IGNORED = 255


def output(logits):
    return SegmentationOutput(logits, (), (), torch.zeros(len(logits), 3, 4, 4))


def scores(*rows):
    """Logits of one image with a single row, float64, whose soft-max is these rows; one a position."""
    return torch.tensor(rows, dtype=torch.float64).log().T[None, :, None]


def direct(student, teacher, valid=None, temperature=1.0):
    """The drawn-out formula, on rows of positions."""
    rows = [(z / temperature).softmax(1).movedim(1, -1).flatten(0, -2) for z in (student, teacher)]
    if valid is not None:
        rows = [p[valid.flatten()] for p in rows]

    def correlation(a, b):
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        return ((a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt() + 1e-8)).mean()

    return tuple(temperature**2 * (1 - correlation(*pair)) for pair in (rows, [p.T for p in rows]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant):
    vectors = golden.load("dist")
    temperature, masked = VARIANTS[variant]
    logits = vectors["logits_s"].requires_grad_()
    term = DISTLoss(temperature=temperature, mask_ignored=masked)
    value = term(output(logits), output(vectors["logits_t"]), vectors["labels"])
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, vectors[f"expected.grad.{variant}.logits_s"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_in_float32(variant):
    vectors = golden.load("dist")
    temperature, masked = VARIANTS[variant]
    logits = vectors["logits_s"].float().requires_grad_()
    term = DISTLoss(temperature=temperature, mask_ignored=masked)
    value = term(output(logits), output(vectors["logits_t"].float()), vectors["labels"])
    value.backward()
    gradient = vectors[f"expected.grad.{variant}.logits_s"]
    torch.testing.assert_close(value.double(), vectors[f"expected.loss.{variant}"], rtol=2e-4, atol=0)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=0, atol=2e-4 * gradient.abs().max().item())


def test_golden_parts():
    vectors = golden.load("dist")
    inter, intra = relations(vectors["logits_s"], vectors["logits_t"])
    torch.testing.assert_close(inter, vectors["expected.loss.tau1.inter"], rtol=1e-9, atol=0)
    torch.testing.assert_close(intra, vectors["expected.loss.tau1.intra"], rtol=1e-9, atol=0)
    both = output(vectors["logits_s"]), output(vectors["logits_t"])
    torch.testing.assert_close(DISTLoss(beta=0.3, gamma=2)(*both), 0.3 * inter + 2 * intra)


def test_by_hand():
    """Along the classes: 1/2 and 1. Along the positions: (−½, ½), (½, 0), (0, −½) in parts of what is moved."""
    student = scores((0.5, 0.3, 0.2), (0.2, 0.3, 0.5))
    teacher = scores((0.5, 0.2, 0.3), (0.2, 0.3, 0.5))
    # centred: student (5, −1, −4)/30, teacher (5, −4, −1)/30: 33/42; the second position is equal
    # classes: 0 is equal (1); 1 is the same everywhere in the student (0); 2: both grow (1)
    inter, intra = relations(student, teacher)
    torch.testing.assert_close(inter.item(), 1 - (33 / 42 + 1) / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(intra.item(), 1 / 3, rtol=1e-5, atol=0)


def test_image_by_image_is_the_direct_form():
    for batch, temperature in ((3, 1.0), (1, 2.5)):
        student, teacher, _ = make_pair(batch=batch, dtype=torch.float64)
        valid = torch.rand(batch, 16, 24) > 0.3
        valid[-1, 4:] = False
        for mask in (None, valid):
            results = []
            for form in (relations, direct):
                parts = form(student.logits, teacher.logits.detach(), mask, temperature)
                weighed = 0.7 * parts[0] + 1.3 * parts[1]
                results.append((*parts, *torch.autograd.grad(weighed, student.logits)))
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-13)


def test_gradients_can_be_asked_for_twice():
    student, teacher, _ = make_pair()
    value = DISTLoss()(student, teacher)
    first, second = (torch.autograd.grad(value, student.logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_alike_is_zero_whatever_the_scores_start_from():
    mine, _, target = make_pair(dtype=torch.float64)
    shifted = output(mine.logits.detach() + torch.randn(2, 1, 16, 24, dtype=torch.float64))
    value = DISTLoss()(mine, shifted, target)
    value.backward()
    torch.testing.assert_close(value.item(), 0.0, rtol=0, atol=1e-6)  # 1e-8 in the denominator
    torch.testing.assert_close(mine.logits.grad, torch.zeros_like(mine.logits), rtol=0, atol=1e-6)


def test_one_position_has_no_relation_to_others():
    student = torch.randn(1, 5, 1, 1, dtype=torch.float64).requires_grad_()
    inter, intra = relations(student, torch.randn(1, 5, 1, 1, dtype=torch.float64), temperature=2.0)
    intra.backward(retain_graph=True)
    assert intra == 4
    assert not student.grad.any()
    inter.backward()
    assert student.grad.isfinite().all()
    assert student.grad.any()


def test_undecided_networks():
    """All probabilities are the same: no correlation, and nothing infinite."""
    student = torch.zeros(2, 4, 3, 3, requires_grad=True)
    for teacher in (torch.zeros(2, 4, 3, 3), torch.randn(2, 4, 3, 3)):
        inter, intra = relations(student, teacher)
        assert (inter, intra) == (1, 1)
        (gradient,) = torch.autograd.grad(inter + intra, student)
        assert gradient.isfinite().all()


def test_a_class_that_never_occurs():
    """Its probability is 0 everywhere, in float32 exactly."""
    mine, other = (o.logits.detach().clone() for o in make_pair()[:2])
    mine[:, 4] = other[:, 4] = -1e4
    mine.requires_grad_()
    inter, intra = relations(mine, other)
    (gradient,) = torch.autograd.grad(inter + intra, mine)
    assert gradient.isfinite().all()
    _, without = relations(mine[:, :4], other[:, :4])
    torch.testing.assert_close(intra, (4 * without + 1) / 5)


def test_what_stands_at_ignored_positions_does_not_count():
    student, teacher, _ = make_pair()
    target = torch.randint(0, 5, (2, 16, 24))
    target[0, :3], target[1, :, 5] = IGNORED, -1
    term = DISTLoss(mask_ignored=True)
    expected = term(student, teacher, target)
    assert DISTLoss()(student, teacher, target) != expected
    ignored = ((target == IGNORED) | (target < 0))[:, None].expand_as(student.logits)
    for junk in (1e30, math.inf, math.nan):
        logits = student.logits.detach().masked_fill(ignored, junk).requires_grad_()
        value = term(output(logits), output(teacher.logits.detach().masked_fill(ignored, junk)), target)
        value.backward()
        assert value == expected
        assert logits.grad.isfinite().all()
        assert not logits.grad[ignored].any()


def test_nothing_to_learn_from():
    student, teacher, target = make_pair()
    value = DISTLoss(mask_ignored=True)(student, teacher, torch.full_like(target, IGNORED))
    value.backward()
    assert value == 0
    assert torch.equal(student.logits.grad, torch.zeros_like(student.logits))


def test_an_image_without_labels_in_a_batch():
    student, teacher, target = make_pair(dtype=torch.float64)
    target[1] = IGNORED
    first = [output(o.logits[:1]) for o in (student, teacher)]
    term = DISTLoss(mask_ignored=True)
    torch.testing.assert_close(term(student, teacher, target), DISTLoss()(*first))


def test_grids():
    student, teacher = make_output(size=(32, 48), seed=1), make_output(seed=2)
    target = torch.randint(0, 5, (2, 64, 96))

    def resized(given, *size):
        return output(F.interpolate(given.logits, size, mode="bilinear", align_corners=False))

    expected = {
        "teacher": (resized(student, 16, 24), teacher),
        "student": (student, resized(teacher, 8, 12)),
        "labels": (resized(student, 64, 96), resized(teacher, 64, 96)),
    }
    for grid, pair in expected.items():
        torch.testing.assert_close(DISTLoss(grid=grid)(student, teacher, target), DISTLoss()(*pair))


@pytest.mark.parametrize("mask_ignored", [False, True])
def test_gradcheck(mask_ignored):
    student, teacher = (make_output(size=size, dtype=torch.float64) for size in ((8, 12), (16, 16)))
    target = torch.tensor([[[0, 255, 4], [3, 1, 1]], [[2, 2, 0], [255, 255, 1]]])
    term = DISTLoss(1.5, 0.7, 2.0, "labels", mask_ignored)
    assert torch.autograd.gradcheck(lambda z: term(output(z), teacher, target), student.logits)


def test_errors():
    mine, other, target = make_pair()
    for settings in ({"beta": -1.0}, {"gamma": math.nan}):
        with pytest.raises(UserError, match=f"DISTLoss: {next(iter(settings))} must be a number of at least 0"):
            DISTLoss(**settings)
    with pytest.raises(UserError, match="temperature must be a number greater than 0; got -1"):
        DISTLoss(temperature=-1)
    with pytest.raises(UserError, match="grid must be one of 'teacher', 'student', 'labels'; got 'pixels'"):
        DISTLoss(grid="pixels")
    for settings in ({"mask_ignored": True}, {"grid": "labels"}):
        with pytest.raises(UserError, match="DISTLoss reads the labels: call it with target=labels"):
            DISTLoss(**settings)(mine, other)
    with pytest.raises(UserError, match="student has 5 classes, the teacher 4"):
        DISTLoss()(mine, output(torch.zeros(2, 4, 16, 24)), target)
    with pytest.raises(UserError, match="single class"):
        DISTLoss()(*[output(torch.zeros(2, 1, 16, 24))] * 2, target)
