"""Focal, Dice and OHEM against their formulas, with all of the upsampled logits and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from band_ways import take_way
from largest import Largest
from memory import peak_memory

from transkd.layers import bands
from transkd.losses import TaskCrossEntropy, TaskDice, TaskFocal, TaskOHEM
from transkd.losses.gradients import gradient_statistics
from transkd.outputs import SegmentationOutput

CLASSES = 5
WEIGHTS = (1.0, 2.0, 0.5, 4.0, 0.0)


def chosen(log_p, labels):
    return log_p.gather(1, labels[:, None])[:, 0]


def plain_focal(log_p, labels, valid, weights):
    log_p, shares = chosen(log_p, labels)[valid], weights[labels[valid]]
    return (shares * -log_p * (1 - log_p.exp()) ** 2).sum() / shares.sum()


def plain_dice(log_p, labels, valid, weights):
    p, y = log_p.exp().movedim(1, -1)[valid], F.one_hot(labels[valid], CLASSES)
    shares = weights * (y.sum(0) > 0)
    return (shares * (1 - (2 * (p * y).sum(0) + 1) / (p.sum(0) + y.sum(0) + 1))).sum() / shares.sum()


def plain_ohem(log_p, labels, valid, weights):
    losses, shares = -chosen(log_p, labels)[valid], weights[labels[valid]]
    count = max(math.ceil(len(losses) / 16), (losses >= -math.log(0.7)).sum())
    hardest = losses.detach().argsort(descending=True)[:count]
    return (shares * losses)[hardest].sum() / shares[hardest].sum()


TERMS = {plain_focal: lambda *a: TaskFocal(2.0, *a), plain_dice: lambda *a: TaskDice(1.0, *a),
         plain_ohem: lambda *a: TaskOHEM(0.7, 1 / 16, *a)}  # fmt: skip


def plain(formula, logits, target, weights=None):
    """By the formula; labels that are ignored are 255 and −1, those of class 3 none."""
    valid = (target >= 0) & (target != 255)
    wide = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    weights = torch.tensor(weights or [1.0] * CLASSES, dtype=logits.dtype)
    return formula(wide.log_softmax(1), target.masked_fill(~valid, 0), valid, weights)


def ours(formula, logits, target, *arguments):
    return TERMS[formula](*arguments)(SegmentationOutput(logits, (), (), logits), None, target)


def value_and_gradient(compute, formula, logits, *arguments):
    value = compute(formula, logits, *arguments)
    return value.detach(), *torch.autograd.grad(3 * value, logits)


def drawn(small=(6, 8), large=(24, 32), easy=False, dtype=torch.float64):
    """Logits and labels; if easy, all but a row of each image are what the logits say."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, CLASSES, *small, generator=generator, dtype=dtype)
    if easy:
        logits *= 1000
        logits[:, 3] = -10000
    target = torch.randint(0, CLASSES, (3, *large), generator=generator)
    if easy:
        said = F.interpolate(logits, large, mode="bilinear", align_corners=False).argmax(1)
        target[:, 1:] = said[:, 1:]
    target[target == 3] = 2
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[torch.rand(target.shape, generator=generator) < 0.1] = -1
    return logits.requires_grad_(), target


@pytest.fixture(params=["bands of a CPU", "of a CPU, many", "of a GPU, many"])
def way(request, monkeypatch):
    take_way(request.param, monkeypatch)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("easy", [False, True])  # then fewer than 1/16 of the pixels are hard
@pytest.mark.parametrize(("small", "large"), [((6, 8), (24, 32)), ((5, 7), (33, 17)), ((9, 11), (9, 11))])
@pytest.mark.parametrize("formula", TERMS)
def test_value_and_gradient(way, formula, small, large, easy, weights):
    logits, target = drawn(small, large, easy)
    value, gradient = value_and_gradient(ours, formula, logits, target, weights)
    expected = value_and_gradient(plain, formula, logits, target, weights)
    torch.testing.assert_close((value, gradient), expected, rtol=1e-9, atol=1e-12)


def test_few_of_the_easy_are_hard():
    logits, target = drawn(easy=True)
    valid = (target >= 0) & (target != 255)
    wide = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    losses = -chosen(wide.log_softmax(1), target.masked_fill(~valid, 0))[valid]
    assert 0 < (losses >= -math.log(0.7)).sum() < len(losses) / 16


@pytest.mark.parametrize("formula", TERMS)
def test_in_single_precision_and_under_autocast(formula):
    logits, target = drawn((45, 60), (180, 240), dtype=torch.float32)
    expected = value_and_gradient(plain, formula, logits.detach().double().requires_grad_(), target)
    got = value_and_gradient(ours, formula, logits, target)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-9, check_dtype=False)
    with torch.autocast("cpu", torch.bfloat16):
        under = value_and_gradient(ours, formula, logits, target)
    assert all(map(torch.equal, under, got))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("formula", TERMS)
def test_half_precision_logits(formula, dtype):
    logits, target = drawn(dtype=torch.float32)
    logits = logits.detach().to(dtype).requires_grad_()
    value, gradient = value_and_gradient(ours, formula, logits, target)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    exact = value_and_gradient(plain, formula, logits.detach().double().requires_grad_(), target)
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, exact[1].to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("formula", TERMS)
def test_memory(formula, monkeypatch):
    monkeypatch.setattr(bands, "AT_ONCE", 2**15)  # a large image would take longer
    logits, target = drawn((32, 64), (128, 256), dtype=torch.float32)
    used, other = (peak_memory(lambda f=f: value_and_gradient(f, formula, logits, target)) for f in (ours, plain))
    assert 3 * used <= other
    with Largest() as seen:
        value_and_gradient(ours, formula, logits, target)
    assert seen.numel <= target.numel()  # what is stored at the labels' size has no classes


def test_gradients_of_several_terms():
    """As automatic weights take them: one term after the other, with respect to what the logits come from."""
    scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    logits, target = drawn()
    values = {"task": TaskCrossEntropy()(SegmentationOutput(scale * logits, (), (), logits), None, target)}
    expected = {}
    for formula in TERMS:
        values[formula.__name__] = ours(formula, scale * logits, target)
        expected[formula.__name__] = torch.autograd.grad(plain(formula, scale * logits, target), scale)[0].abs()
    for _ in range(2):
        found = gradient_statistics(values, [scale])
        for name, norm in expected.items():
            torch.testing.assert_close(found[f"{name}/norm"].double(), norm, rtol=1e-5, atol=0)
    sum(values.values()).backward()
    assert scale.grad.isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("formula", TERMS)
def test_compiles_as_one_graph_for_varying_sizes(formula, monkeypatch):
    monkeypatch.setattr(bands, "AT_ONCE_ON_GPU", 10_000)  # some bands
    torch._dynamo.reset()
    compute = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for small, large, easy in (((5, 6), (20, 24), False), ((10, 12), (41, 47), True)):
        logits, target = drawn(small, large, easy)
        got = value_and_gradient(compute, formula, logits, target, WEIGHTS)
        torch.testing.assert_close(got, value_and_gradient(plain, formula, logits, target, WEIGHTS))
