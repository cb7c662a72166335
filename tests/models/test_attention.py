"""Attention without a gradient is attention, whatever computes it."""

import pytest
import torch
import torch.nn.functional as F

from transkd.models import attention


def drawn(batch=2, heads=3, queries=35, keys=7, width=4):
    """Queries, keys and values as linear layers give them: heads side by side in memory."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, count, heads, width) for count in (queries, keys, keys)]
    return [torch.randn(size, generator=generator).transpose(1, 2) for size in sizes]


def expected(query, key, value):
    """From the formula, in float64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2).float()


@pytest.mark.parametrize("rows", [4096, 10, 35])
@pytest.mark.parametrize(
    "sizes", [{}, {"batch": 1}, {"heads": 1}, {"keys": 1}, {"queries": 1}, {"width": 64, "heads": 5}]
)
def test_value(monkeypatch, sizes, rows):
    monkeypatch.setattr(attention, "ROWS", rows)
    tensors = drawn(**sizes)
    torch.testing.assert_close(attention.attend(*tensors), expected(*tensors), rtol=1e-5, atol=1e-5)


def test_large_scores_stay_finite():
    query, key, value = drawn()
    tensors = (100 * query, 100 * key, value)
    torch.testing.assert_close(attention.attend(*tensors), expected(*tensors), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ["gradient", "float64", "bfloat16"])
def test_all_else_is_pytorch_s_own(monkeypatch, change):
    tensors = drawn()
    if change == "gradient":
        tensors[1].requires_grad_()
    else:
        tensors = [tensor.to(getattr(torch, change)) for tensor in tensors]
    monkeypatch.setattr(attention, "_convolved", lambda *image: pytest.fail("convolved"))
    attended = attention.attend(*tensors)
    assert torch.equal(attended, F.scaled_dot_product_attention(*tensors).transpose(1, 2).flatten(2))
    assert attended.requires_grad == (change == "gradient")


def test_a_weight_that_learns_reaches_its_gradient_and_no_grad_does_not(monkeypatch):
    seen = []
    convolved = attention._convolved
    monkeypatch.setattr(attention, "_convolved", lambda *image: seen.append(1) or convolved(*image))
    tensors = [tensor.requires_grad_() for tensor in drawn()]
    with torch.no_grad():
        attention.attend(*tensors)
    assert seen == [1, 1]
