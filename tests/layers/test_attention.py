"""Attention is attention, whatever computes it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from transkd.layers import attention


def drawn(batch=2, heads=3, queries=35, keys=7, width=4):
    """Queries, and keys beside values, as linear layers give them."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, queries, heads * width, generator=generator)
    return query, torch.randn(batch, keys, 2 * heads * width, generator=generator), heads


def expected(query, pair, heads):
    """From the formula, head by head, in float64."""
    key, value = pair.double().chunk(2, dim=2)
    attended = []
    for q, k, v in zip(query.double().chunk(heads, 2), key.chunk(heads, 2), value.chunk(heads, 2), strict=True):
        attended.append((q @ k.mT / q.shape[2] ** 0.5).softmax(2) @ v)
    return torch.cat(attended, dim=2)


@pytest.fixture
def convolved(monkeypatch):
    """Counts the images that go the way of convolutions, which every size now pays for; 300 queries at once."""
    seen, original = [], attention._convolved
    monkeypatch.setattr(attention, "SCORES", 1)
    monkeypatch.setattr(attention, "_convolved", lambda *image: seen.append(image) or original(*image))
    return seen


SIZES = [{}, {"batch": 1}, {"heads": 1}, {"keys": 1}, {"queries": 1}, {"width": 64, "heads": 5}, {"queries": 600}]


@pytest.mark.parametrize("sizes", SIZES)
def test_value_by_convolutions(convolved, sizes):
    inputs = drawn(**sizes)
    torch.testing.assert_close(attention.attend(*inputs), expected(*inputs).float(), rtol=1e-5, atol=1e-5)
    assert len(convolved) == len(inputs[0])


@pytest.mark.parametrize("sizes", SIZES)
def test_value_by_pytorch(sizes):
    query, pair, heads = drawn(**sizes)
    inputs = query.double(), pair.double(), heads
    torch.testing.assert_close(attention.attend(*inputs), expected(*inputs))


def test_large_scores_stay_finite(convolved):
    query, pair, heads = drawn()
    inputs = 100 * query, 100 * pair, heads
    torch.testing.assert_close(attention.attend(*inputs), expected(*inputs).float(), rtol=1e-3, atol=1e-2)
    assert convolved


@pytest.mark.parametrize("change", ["gradient", "float64", "bfloat16", "few scores"])
def test_all_else_is_pytorch_s_own(convolved, monkeypatch, change):
    query, pair, heads = drawn()
    if change == "gradient":
        pair.requires_grad_()
    elif change == "few scores":
        monkeypatch.setattr(attention, "SCORES", 35 * 7 * 3 + 1)
    else:
        query, pair = query.to(getattr(torch, change)), pair.to(getattr(torch, change))
    attended = attention.attend(query, pair, heads)
    assert not convolved
    assert attended.requires_grad == (change == "gradient")
    parts = [query, *pair.chunk(2, dim=2)]
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    assert torch.equal(attended, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def trace(module, *inputs):
    return torch.jit.trace(module, inputs, check_trace=False)  # which would run the module once more, as it is


def export(module, *inputs):
    return torch.export.export(module, inputs).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("written", [trace, export])
def test_code_that_is_written_out_is_pytorch_s_own(convolved, written):
    class Module(torch.nn.Module):
        def forward(self, query, pair):
            return attention.attend(query, pair, 3)

    query, pair, heads = drawn()
    with torch.no_grad():
        attended = written(Module(), query, pair)(query, pair)
        assert not convolved
        torch.testing.assert_close(attended, attention.attend(query, pair, heads), rtol=1e-5, atol=1e-5)
    assert convolved


def test_a_weight_that_learns_is_no_reason_under_no_grad(convolved):
    query, pair, heads = drawn()
    with torch.no_grad():
        attention.attend(query.requires_grad_(), pair.requires_grad_(), heads)
    assert len(convolved) == 2


@pytest.mark.parametrize(
    ("shape", "heads", "keys", "parts"),
    [
        ((2, 32768, 32), 1, 512, 16),  # 2 · 1 · 8 = 16 blocks
        ((8, 32768, 32), 1, 512, 4),
        ((2, 8192, 64), 2, 512, 8),
        ((8, 2048, 160), 5, 512, 1),  # 320 blocks are enough
        ((1, 12, 32), 1, 70, 4),  # 12 = 4 · 3
        ((1, 35, 32), 1, 64, 1),
    ],
)
def test_queries_are_cut_where_a_gpu_would_wait(shape, heads, keys, parts):
    query = {"device": torch.device("cuda"), "dtype": torch.float32, "requires_grad": True, "shape": shape}

    def cut(**changes):
        class Query(SimpleNamespace):
            def __len__(self):
                return self.shape[0]

        return attention.query_parts(Query(**{**query, **changes}), heads, keys)

    assert cut() == parts
    for change in ({"device": torch.device("cpu")}, {"dtype": torch.bfloat16}, {"requires_grad": False}):
        assert cut(**change) == 1


def test_cut_queries_give_the_same_attention_and_gradients(monkeypatch):
    query, pair, heads = drawn(queries=48)
    upstream = torch.rand_like(query).double()

    def outcome(parts):
        monkeypatch.setattr(attention, "query_parts", lambda query, heads, keys: parts)
        inputs = [tensor.double().requires_grad_() for tensor in (query, pair)]
        attended = attention.attend(*inputs, heads)
        return attended, torch.autograd.grad(attended, inputs, upstream)

    torch.testing.assert_close(outcome(4), outcome(1))
