import pytest
import torch

from transkd.errors import UserError
from transkd.losses.shared.checks import check_count
from transkd.losses.shared.pieces import full_precision, sum_over_rows


@pytest.mark.parametrize("budget", [1, 20, 30, 70, 1000])
def test_pieces_give_the_value_and_the_gradients_of_the_whole(budget):
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def compute(budget):
        leaves = [rows.clone().requires_grad_(), columns.clone().requires_grad_()]
        value = sum_over_rows(lambda piece: (piece @ leaves[1].T).exp().sum(), leaves[:1], columns=7, budget=budget)
        return value, torch.autograd.grad(value, leaves)

    torch.testing.assert_close(compute(budget), compute(10**9))


def test_no_rows():
    rows = torch.zeros(0, 3, requires_grad=True)
    value = sum_over_rows(lambda piece: piece.sum(), [rows], columns=5)
    value.backward()
    assert value == 0
    assert rows.grad.shape == (0, 3)


def test_full_precision_within_autocast():
    x = torch.rand(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, None])
def test_what_is_no_count(value):
    with pytest.raises(UserError, match="object: slots must be a whole number of at least 1; got"):
        check_count(object(), "slots", value)


def test_pieces_without_gradients():
    x = torch.arange(6.0, requires_grad=True)
    with torch.no_grad():
        value = sum_over_rows(lambda rows: (rows[:, None] - x).square().sum(), [x], columns=6, budget=12)
    assert value == 210
    assert not value.requires_grad
