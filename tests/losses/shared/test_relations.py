import pytest
import torch

from transkd.errors import UserError
from transkd.losses.shared.relations import direct_error, factored_error, relation_error, unit


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_by_hand():
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # S·Sᵀ = [[1, 0], [0, 4]]
    teacher = torch.tensor([[[1.0], [1.0]]])  # all 1
    assert relation_error(student, teacher).item() == (0 + 1 + 1 + 9) / 4


@pytest.mark.parametrize("channels", [(3, 3), (3, 5), (7, 2)])
def test_factored_equals_direct(channels):
    student, teacher = draw(4, 11, channels[0], seed=1).requires_grad_(), draw(4, 11, channels[1], seed=2)
    gradients = []
    for function in (direct_error, factored_error, relation_error):
        value = function(student, teacher)
        torch.testing.assert_close(value, direct_error(student, teacher), rtol=1e-12, atol=0)
        gradients += torch.autograd.grad(value, student)
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("budget", [1, 4 * 11 * 3, 10_000])
def test_pieces(budget):
    student, teacher = draw(4, 11, 3, seed=1).requires_grad_(), draw(4, 11, 5, seed=2)
    expected = (student @ student.mT - teacher @ teacher.mT).square().mean()
    value = direct_error(student, teacher, budget=budget)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(v, student)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_many_rows_need_no_matrix_of_all_pairs():
    student = draw(1, 200_000, 3, dtype=torch.float32).requires_grad_()  # all pairs would be 160 GB
    value = relation_error(student, torch.zeros(1, 200_000, 3))
    value.backward()
    # of normal rows, ‖SᵀS‖² / R² is 3 + O(1/√R)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.item(), 3.0, rtol=0.02, atol=0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("rows", [50, 400])
def test_float32_close_to_the_teacher(rows):
    """What the factored form subtracts is 1e6 times larger than what is left."""
    teacher = unit(draw(1, rows, 16, seed=1)).float()
    student = teacher + 1e-3 * draw(1, rows, 16, seed=2).float() / 16
    expected = direct_error(student.double(), teacher.double())
    torch.testing.assert_close(relation_error(student, teacher).double(), expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("rows", [3, 100])
def test_autocast_is_left_out(rows):
    student, teacher = draw(1, rows, 8, seed=1).float(), draw(1, rows, 8, seed=2).float()
    expected = relation_error(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relation_error(student, teacher) == expected


def test_unit_rows():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit(rows).square().sum(1).dot(torch.tensor([1.0, 1.0])).backward()
    assert unit(rows).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert rows.grad[1].tolist() == [0.0, 0.0]
    assert rows.grad.isfinite().all()


def test_rows_that_cannot_be_paired():
    for shape in ((2, 4, 3), (1, 5, 3)):
        with pytest.raises(UserError, match=r"positions\] \[1, 4\], the teacher \["):
            relation_error(torch.zeros(1, 4, 3), torch.zeros(shape))
