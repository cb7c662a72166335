import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transkd.errors import UserError
from transkd.models.inherit.activations import Activations
from transkd.models.inherit.fits import Gram, Solving, fit_linear, fit_norm

EXACT = Solving(ridge=0.0)


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def batches():
    activations = Activations()
    yield activations
    activations.close()


def test_a_line_by_hand():
    """Rows (0, 1), (1, 4), (2, 7) lie on y = 3 x + 1; a ridge of r adds r · var(x) to var(x) = 2/3."""
    gram, x = Gram(), torch.tensor([[0.0], [1.0], [2.0]])
    gram.add(x[:1], 3 * x[:1] + 1)
    gram.add(x[1:], 3 * x[1:] + 1)
    assert gram.count == 3
    for ridge, prior, slope in ((0.0, None, 3.0), (1.0, None, 1.5), (1.0, 5.0, 4.0), (1e9, 5.0, 5.0)):
        weight, bias = gram.solve(ridge, None if prior is None else torch.tensor([[prior]]))
        assert weight.item() == pytest.approx(slope, rel=1e-6)
        assert bias.item() == pytest.approx(4 - slope)  # through the means (1, 4) whatever the ridge


def test_without_a_bias():
    gram, x = Gram(), torch.tensor([[1.0], [2.0]])
    gram.add(x, torch.tensor([[1.0], [3.0]]))
    weight, bias = gram.solve(0.0, bias=False)
    assert weight.item() == pytest.approx(7 / 5)
    assert bias.item() == 0


def test_a_row_that_counts_twice_is_a_row_that_is_there_twice():
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    once, twice = Gram(), Gram()
    once.add(x, y, torch.tensor([1.0, 1, 2, 1, 1, 1]))
    twice.add(torch.cat([x, x[2:3]]), torch.cat([y, y[2:3]]))
    for mine, its in zip(once.solve(0.1), twice.solve(0.1), strict=True):
        torch.testing.assert_close(mine, its)


def test_an_input_that_never_varies_takes_the_prior():
    gram = Gram()
    gram.add(torch.tensor([[0.0, 2.0], [1.0, 2.0], [2.0, 2.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    weight, bias = gram.solve(1e-6, torch.tensor([[9.0, 4.0]]))
    torch.testing.assert_close(weight.flatten(), torch.tensor([1.0, 4.0], dtype=torch.float64), atol=1e-4, rtol=0)
    assert bias.item() == pytest.approx(1 - 8, abs=1e-3)


def test_memory_does_not_grow_with_the_rows():
    def numbers(gram):
        return sum(x.numel() for x in vars(gram).values() if isinstance(x, torch.Tensor))

    small, large = Gram(), Gram()
    small.add(torch.randn(5, 4), torch.randn(5, 3))
    for _ in range(20):
        large.add(torch.randn(50, 4), torch.randn(50, 3))
    assert numbers(small) == numbers(large)
    assert large.xx.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_found(batches, bias):
    true, found = nn.Linear(5, 3, bias=bias), nn.Linear(5, 3, bias=bias)
    for _ in range(3):
        batches.append(x=torch.randn(2, 7, 5))
    fit_linear(batches, found, lambda b: b["x"], lambda b: true(b["x"]), EXACT)
    torch.testing.assert_close(found.weight, true.weight)
    assert not bias or torch.allclose(found.bias, true.bias, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(7, 4, 3, 1), (3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 2, 2)]
)
def test_a_strided_convolution_is_found(batches, kernel, stride, padding, dilation):
    true, found = (nn.Conv2d(3, 4, kernel, stride, padding, dilation) for _ in range(2))
    for _ in range(4):
        batches.append(x=torch.randn(2, 3, 40, 33))
    fit_linear(batches, found, lambda b: b["x"], lambda b: true(b["x"]), EXACT)
    torch.testing.assert_close(found.weight, true.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias, true.bias, atol=1e-5, rtol=1e-4)


def test_a_norms_gain_and_bias_are_found(batches):
    true, found = nn.LayerNorm(4), nn.LayerNorm(4)
    true.weight.copy_(torch.tensor([2.0, -1.0, 0.5, 0.0]))
    true.bias.copy_(torch.tensor([0.0, 1.0, -3.0, 4.0]))
    for _ in range(2):
        batches.append(x=3 + torch.randn(2, 30, 4))
    fit_norm(batches, found, lambda b: b["x"], lambda b: true(b["x"]))
    torch.testing.assert_close(found.weight, true.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, true.bias, atol=1e-5, rtol=0)


def test_a_norms_gain_by_hand(batches):
    """Two channels: LayerNorm gives ±1; the targets 5 and 1 where it gives 1 and −1 are 2 · (±1) + 3."""
    batches.append(x=torch.tensor([[[9.0, 1.0], [2.0, 6.0]]]), y=torch.tensor([[[5.0, 0.0], [1.0, 0.0]]]))
    norm = nn.LayerNorm(2, eps=0.0)
    fit_norm(batches, norm, lambda b: b["x"], lambda b: b["y"])
    torch.testing.assert_close(norm.weight, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(norm.bias, torch.tensor([3.0, 0.0]))


def test_a_channel_that_never_varies_keeps_its_gain(batches):
    batches.append(x=torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]]))
    norm = nn.LayerNorm(3)
    fit_norm(batches, norm, lambda b: b["x"], lambda b: torch.full((1, 2, 3), 7.0))
    assert norm.weight.tolist() == [1, 1, 1]
    torch.testing.assert_close(norm(torch.tensor([1.0, 2.0, 3.0])), torch.full((3,), 7.0))


def test_too_few_positions_are_noted_and_the_prior_holds(batches):
    layer = nn.Linear(6, 2)
    solving = Solving(ridge=1e-3, names={layer: "some.layer"})
    prior = torch.randn(2, 6)
    batches.append(x=torch.randn(1, 4, 6))
    fit_linear(batches, layer, lambda b: b["x"], lambda b: F.linear(b["x"], prior), solving, prior)
    torch.testing.assert_close(layer.weight, prior)
    assert solving.shortages == [("some.layer", 4, 7)]
    (warning,) = solving.warnings(images=3)
    assert "some.layer is solved from 4 image positions for 7 unknowns" in warning
    assert warning.endswith("Better give 6 images than 3")


def test_nan_is_refused_by_name(batches):
    layer = nn.Linear(2, 2)
    batches.append(x=torch.full((1, 4, 2), float("nan")))
    with pytest.raises(UserError, match=r"^solve: the activations around some\.layer hold NaN or infinity, expected"):
        fit_linear(batches, layer, lambda b: b["x"], lambda b: b["x"], Solving(names={layer: "some.layer"}))


def test_activations_lie_on_disk_and_are_computed_when_asked_for(batches):
    asked = []

    def rule(batch):
        asked.append(1)
        return 2 * batch["x"]

    batches.append(x=torch.ones(3), trace=[torch.zeros(1), torch.ones(1)], grid=(2, 3))
    batches.define(y=rule, z=lambda b: b["y"] + b["y"])
    for batch in batches:
        assert not list(batch)
        assert batch["z"].tolist() == [4, 4, 4]
        assert batch["grid"] == (2, 3)
        assert len(batch["trace"]) == 2
    assert len(asked) == 1
    batches.store(x="z")
    (batch,) = batches
    assert batch["x"].tolist() == [4, 4, 4]
    with pytest.raises(FileNotFoundError):
        batch["y"]  # rules are forgotten


def test_nothing_is_left_on_disk():
    batches = Activations()
    batches.append(x=torch.ones(3))
    (folder,) = batches._folders
    assert folder.is_dir()
    batches.close()
    assert not folder.exists()
