import pytest
import torch
import torch.nn.functional as F
from memory import peak_memory

from transkd.layers import upsampling
from transkd.layers.upsampling import add_upsampled, resize_gradient, resize_matrix, upsampled, upsampled_argmax


def plain(logits, size):
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).argmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(24, 32), (47, 59), (180, 240), (6, 8), (4, 3), (1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_equal_to_the_plain_way(batch, size, dtype):
    logits = torch.randn(batch, 7, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    classes = upsampled_argmax(logits, size)
    assert classes.dtype == torch.int64
    assert torch.equal(classes, plain(logits, size))


def test_of_equal_scores_the_first_class():
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0]).view(1, 4, 1, 1)
    assert upsampled_argmax(logits, (2, 2)).tolist() == [[[1, 1], [1, 1]]]


def test_a_single_class():
    assert not upsampled_argmax(torch.randn(2, 1, 3, 3), (6, 6)).any()


def test_memory():
    logits = torch.randn(2, 19, 64, 128)
    assert 4 * peak_memory(lambda: upsampled_argmax(logits, (256, 512))) <= peak_memory(
        lambda: plain(logits, (256, 512))
    )


@pytest.mark.parametrize("size", [(12, 16), (11, 17), (6, 8)])
def test_maps_and_their_gradient_are_those_of_interpolate_compiled_too(size):
    upstream = torch.rand(2, 5, *size)

    def outcome(function):
        maps = torch.rand(2, 5, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        grown = function(maps, size)
        grown.backward(upstream)
        return grown, maps.grad

    expected = outcome(lambda maps, size: F.interpolate(maps, size=size, mode="bilinear", align_corners=False))
    compiled = torch.compile(upsampled, backend="aot_eager", fullgraph=True)
    for function in (upsampled, compiled):
        torch.testing.assert_close(outcome(function), expected, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [(12, 16), (11, 17), (6, 8)])
@pytest.mark.parametrize("learns", [True, False])
def test_a_sum_in_place(monkeypatch, size, learns, channels_last):
    monkeypatch.setattr(upsampling, "AT_ONCE", 1)  # 32 of the 70 channels at a time
    layout = torch.channels_last if channels_last else torch.contiguous_format
    total, maps = (torch.rand(2, 70, *side).to(memory_format=layout) for side in (size, (6, 8)))
    expected = total + F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    address, maps = total.data_ptr(), maps.requires_grad_(learns)
    add_upsampled(total, maps)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert total.data_ptr() == address
    assert total.requires_grad == learns
    if learns:
        total.sum().backward()
        torch.testing.assert_close(maps.grad.sum(), torch.tensor(float(total.numel())))


def test_without_a_gradient_a_sum_takes_the_memory_of_a_part(monkeypatch):
    total, maps = torch.rand(1, 256, 64, 128), torch.rand(1, 256, 32, 64)
    monkeypatch.setattr(upsampling, "AT_ONCE", total.numel() // 8)
    assert peak_memory(lambda: add_upsampled(total, maps)) <= total.nbytes / 4


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ((6, 8), (24, 32)),
        ((12, 15), (47, 59)),
        ((19, 21), (7, 10)),
        ((5, 7), (33, 3)),
        ((1, 1), (4, 5)),
        ((3, 4), (3, 4)),
    ],
)
def test_the_gradient_as_products(monkeypatch, small, large, channels_last):
    """As a GPU computes it, against PyTorch's in float64."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = torch.randn(2, 5, *small, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, *large, dtype=torch.float64).to(memory_format=layout)
    grown = F.interpolate(maps, size=large, mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad(grown, maps, upstream)
    found = resize_gradient(upstream, small)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=layout) or found.is_contiguous()
    monkeypatch.setattr(upsampling, "products_pay", lambda maps: True)
    (through,) = torch.autograd.grad(upsampled(maps, large), maps, upstream)
    assert torch.equal(through, found)


def test_the_gradient_as_products_has_a_gradient(monkeypatch):
    monkeypatch.setattr(upsampling, "products_pay", lambda maps: True)
    maps = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda maps: upsampled(maps, (7, 9)), maps)
    assert torch.autograd.gradgradcheck(lambda maps: upsampled(maps, (7, 9)), maps)


def test_a_matrix_resizes_as_interpolate_does():
    for small, large in ((3, 11), (11, 3), (5, 20), (1, 4), (7, 7)):
        row = torch.randn(small, dtype=torch.float64)
        expected = F.interpolate(row[None, None], size=large, mode="linear", align_corners=False)[0, 0]
        matrix = resize_matrix(small, large, row)
        torch.testing.assert_close(matrix @ row, expected)
        assert matrix is resize_matrix(small, large, row)
        torch.testing.assert_close(resize_matrix(small, large, row.bfloat16()).double(), matrix, rtol=2**-8, atol=0)


def test_autocast_leaves_the_products_as_precise_as_the_gradient(monkeypatch):
    upstream = torch.randn(2, 5, 24, 33)
    expected = resize_gradient(upstream, (6, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_gradient(upstream, (6, 8)), expected)


def test_autocast_is_on_again_behind_a_compiled_gradient(monkeypatch):
    """A layer behind it must be traced in half precision."""
    monkeypatch.setattr(upsampling, "products_pay", lambda maps: True)  # as on a GPU
    layer, maps = torch.nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 6)

    def head(maps):
        return layer(upsampled(layer(maps), (8, 12))), torch.is_autocast_enabled("cpu")

    with torch.autocast("cpu", torch.bfloat16):
        logits, enabled = torch.compile(head, backend="eager", fullgraph=True)(maps)
        torch.testing.assert_close(logits, head(maps)[0])
    torch.compiler.reset()
    assert enabled
