"""Against the plain way: interpolate all of the logits, then PyTorch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from band_ways import take_way
from largest import Largest
from memory import peak_memory
from torch.utils.checkpoint import checkpoint

from transkd.layers import bands
from transkd.layers.upsampled_cross_entropy import upsampled_cross_entropy

CLASSES = 5
SIZES = [
    ((6, 8), (24, 32)),  # a whole scale, as from a network of stride 4
    ((12, 15), (47, 59)),  # an odd image
    ((23, 30), (180, 240)),
    ((5, 7), (33, 3)),  # up and down
    ((19, 21), (7, 10)),
    ((40, 9), (40, 27)),  # one side alone
    ((1, 1), (17, 5)),
    ((9, 11), (9, 11)),
    ((3, 4), (1, 1)),
]


def plain(logits, target, weights):
    size = target.shape[-2:]
    upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, target.masked_fill(target < 0, 255), weights, ignore_index=255)


@pytest.fixture(params=["bands of a CPU", "of a CPU, many", "of a GPU", "of a GPU, many"])
def way(request, monkeypatch):
    """Of computing it, each of them here."""
    take_way(request.param, monkeypatch)
    return request.param


def drawn(batch, small, large, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, CLASSES, *small, generator=generator, dtype=dtype)
    target = torch.randint(0, CLASSES, (batch, *large), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[torch.rand(target.shape, generator=generator) < 0.1] = -1
    target[0, 0, 0] = 1
    return logits.requires_grad_(), target


def value_and_gradient(compute, logits, *arguments):
    value = compute(logits, *arguments)
    (gradient,) = torch.autograd.grad(3 * value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_value_and_gradient(way, small, large, batch, weighted):
    logits, target = drawn(batch, small, large)
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0, 0.0] if weighted else [1.0] * CLASSES, dtype=torch.float64)
    value, gradient = value_and_gradient(upsampled_cross_entropy, logits, target, weights, 255)
    expected = value_and_gradient(plain, logits, target, weights)
    assert value.dtype == torch.float64
    torch.testing.assert_close((value, gradient), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_single_precision(way, layout):
    logits, target = drawn(2, (45, 60), (180, 240), torch.float32)
    weights = torch.ones(CLASSES)
    logits = logits.detach().to(memory_format=layout).requires_grad_()
    got = value_and_gradient(upsampled_cross_entropy, logits, target, weights, 255)
    expected = value_and_gradient(plain, logits.double(), target, weights.double())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9, check_dtype=False)


def test_scores_far_apart(way):
    logits, target = drawn(1, (6, 8), (24, 32), torch.float32)
    logits = (1e4 * logits.detach()).requires_grad_()
    value, gradient = value_and_gradient(upsampled_cross_entropy, logits, target, torch.ones(CLASSES), 255)
    torch.testing.assert_close(value, plain(logits.detach(), target, torch.ones(CLASSES)))
    assert gradient.isfinite().all()


def test_the_logits_stay_as_they_are(way):
    logits, target = drawn(1, (9, 11), (9, 22))
    before = logits.detach().clone()
    upsampled_cross_entropy(logits, target, torch.ones(CLASSES, dtype=torch.float64), 255).backward()
    assert torch.equal(logits, before)


def test_a_label_that_is_no_class_is_refused(way):
    logits, target = drawn(1, (6, 8), (24, 32))
    target[0, 3, 3] = CLASSES
    with pytest.raises(IndexError):
        upsampled_cross_entropy(logits, target, torch.ones(CLASSES, dtype=torch.float64), 255)


def test_second_derivatives_are_refused(way):
    logits, target = drawn(1, (6, 8), (24, 32))
    value = upsampled_cross_entropy(logits, target, torch.ones(CLASSES, dtype=torch.float64), 255)
    (gradient,) = torch.autograd.grad(value.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_value_alone(way, context):
    logits, target = drawn(2, (6, 8), (24, 32))
    weights = torch.ones(CLASSES, dtype=torch.float64)
    expected = upsampled_cross_entropy(logits, target, weights, 255)
    with context():
        value = upsampled_cross_entropy(logits, target, weights, 255)
    assert not value.requires_grad
    assert value == expected


@pytest.mark.slow
def test_compiles_as_one_graph_for_varying_sizes(monkeypatch):
    monkeypatch.setattr(bands, "AT_ONCE_ON_GPU", 10_000)  # up to three bands
    torch._dynamo.reset()
    compute = torch.compile(upsampled_cross_entropy, backend="aot_eager", fullgraph=True)
    weights = torch.ones(CLASSES, dtype=torch.float64)
    for batch, small, large in ((2, (5, 6), (20, 24)), (3, (10, 12), (41, 47))):
        logits, target = drawn(batch, small, large)
        got = value_and_gradient(compute, logits, target, weights, 255)
        torch.testing.assert_close(got, value_and_gradient(plain, logits, target, weights))


def test_memory(monkeypatch):
    monkeypatch.setattr(bands, "AT_ONCE", 2**17)  # a large image would take longer
    logits, target = drawn(2, (64, 128), (256, 512), torch.float32)

    def step(compute, *arguments):
        torch.autograd.grad(compute(logits, target, torch.ones(CLASSES), *arguments), logits)

    assert 4 * peak_memory(lambda: step(upsampled_cross_entropy, 255)) <= peak_memory(lambda: step(plain))
    with Largest() as seen:
        step(upsampled_cross_entropy, 255)
    assert seen.numel < CLASSES * target.numel() / 4


def test_without_a_valid_label(way):
    logits, target = drawn(2, (6, 8), (24, 32))
    value, gradient = value_and_gradient(
        upsampled_cross_entropy, logits, torch.full_like(target, 255), torch.ones(CLASSES, dtype=torch.float64), 255
    )
    assert value == 0
    assert not gradient.any()


def test_autocast_changes_nothing(way):
    logits, target = drawn(2, (6, 8), (24, 32), torch.float32)
    expected = value_and_gradient(upsampled_cross_entropy, logits, target, torch.ones(CLASSES), 255)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradient(upsampled_cross_entropy, logits, target, torch.ones(CLASSES), 255)
    assert all(map(torch.equal, got, expected))


def test_bands_of_a_gpu_are_few_and_bounded(monkeypatch):
    monkeypatch.setattr(bands, "products_pay", lambda maps: True)
    for batch, size, count in ((8, (512, 1024), 1), (8, (1024, 2048), 4), (2, (512, 1024), 1)):
        logits = torch.empty(batch, 19, size[0] // 4, size[1] // 4, device="meta")
        assert len(list(bands._bands(logits, torch.Size(size)))) == count
    logits = torch.empty(1, 19, 2, 2**26, device="meta")  # a row is too much already
    assert len(list(bands._bands(logits, torch.Size((8, 2**26))))) == 8


def test_within_checkpointing():
    logits, target = drawn(1, (6, 8), (24, 32))
    weights = torch.ones(CLASSES, dtype=torch.float64)
    expected = value_and_gradient(plain, logits, target, weights)

    def recomputed(*arguments):
        return checkpoint(upsampled_cross_entropy, *arguments, use_reentrant=False)

    torch.testing.assert_close(value_and_gradient(recomputed, logits, target, weights, 255), expected)
