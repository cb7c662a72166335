import pytest
import torch
from torch import nn

from transkd.losses import gradient_statistics


def test_by_hand():
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))
    frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    values = {"task": a.sum() + 2 * b, "kd": 3 * a[0], "against": -b, "nothing": 0 * a.sum()}
    found = gradient_statistics(values, [a, b, frozen])
    expected = {
        "task/norm": 6**0.5,
        "kd/norm": 3.0,
        "against/norm": 1.0,
        "nothing/norm": 0.0,
        "kd/cosine": 1 / 6**0.5,
        "against/cosine": -2 / 6**0.5,
        "nothing/cosine": 0.0,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_the_graph_stays_for_the_backward_pass():
    a = nn.Parameter(torch.tensor([1.0, 2.0]))
    values = {"task": a.square().sum(), "kd": a.sum()}
    gradient_statistics(values, [a])
    assert a.grad is None
    sum(values.values()).backward()
    assert a.grad.tolist() == [3.0, 5.0]


def test_without_a_task_there_are_norms_alone():
    a = nn.Parameter(torch.tensor(1.0))
    assert list(gradient_statistics({"kd": 2 * a}, [a])) == ["kd/norm"]
