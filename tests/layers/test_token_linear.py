"""Linear layers of tokens are F.linear, whatever computes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transkd.layers.token_linear import TokenLinear, token_linear

SHAPES = [(2, 35, 12), (1, 7, 12), (3, 12), (12,), (2, 5, 7, 12), (1, 1, 12), (0, 4, 12)]


def drawn(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (20, 12), (20,))
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_are_those_of_linear(shape, with_bias, dtype):
    found, expected = drawn(shape, dtype), drawn(shape, dtype)
    ours = token_linear(*(found if with_bias else found[:2]))
    plain = F.linear(*(expected if with_bias else expected[:2]))
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, plain, **tolerance)
    upstream = torch.linspace(-1, 1, plain.numel()).view(plain.shape).to(dtype)
    ours.backward(upstream), plain.backward(upstream)
    for mine, other in zip(found, expected, strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, **tolerance)


def test_tokens_in_any_memory_layout():
    x, weight, bias = (tensor.detach() for tensor in drawn((2, 35, 12)))
    expected = F.linear(x, weight, bias)
    strided = torch.stack((x, x), dim=3)[..., 0]
    for same in (x.transpose(1, 2).contiguous().transpose(1, 2), strided):
        torch.testing.assert_close(token_linear(same, weight, bias), expected, rtol=1e-5, atol=1e-5)


def test_autocast_gives_what_linear_gives():
    tensors = drawn((2, 35, 12))
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = token_linear(*tensors), F.linear(*tensors)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=5e-2)


def test_the_module_is_a_linear_layer_whose_hooks_fire():
    layer, plain, seen = TokenLinear(12, 20), nn.Linear(12, 20), []
    plain.load_state_dict(layer.state_dict())
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    x = torch.rand(2, 5, 12)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    assert seen == [(2, 5, 20)]
