import pytest
import torch

from transkd.errors import UserError
from transkd.training.learning_rate import warmup_poly
from transkd.training.optimization import follow_schedule, groups_of


def rates(ticks, lr=1.0, **settings):
    """The rate at each tick, as a training loop sees it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = warmup_poly(optimizer, **settings)
    seen = []
    for _ in range(ticks):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("settings", "expected"),  # by hand
    [
        ({"total": 4}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"total": 4, "power": 2.0}, [1, 0.5625, 0.25, 0.0625, 0, 0]),
        ({"total": 5, "warmup": 3}, [0.25, 0.5, 0.75, 1, 0.5, 0]),
        ({"total": 2, "warmup": 4}, [0.2, 0.4, 0.6, 0.8, 1, 0]),  # the warm-up is the run: no division by 0
        ({"total": 3, "warmup": 3}, [0.25, 0.5, 0.75, 1, 0, 0]),
    ],
)
def test_by_hand(settings, expected):
    assert rates(len(expected), **settings) == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{"warmup": -1}, {"power": -1.0}, {"power": float("inf")}])
def test_what_is_out_of_range(settings):
    with pytest.raises(UserError, match="expected numbers of at least 0"):
        rates(1, total=4, **settings)


def test_a_warm_up_as_long_as_the_run_is_said(caplog):
    rates(1, total=4, warmup=3)
    assert caplog.text == ""
    rates(1, total=4, warmup=4)
    assert "optim.scheduler.warmup=4 is at least the length of the whole schedule, 4 (steps" in caplog.text


def test_a_longer_run_follows_its_own_schedule_from_where_it_stopped():
    """Six of six ticks are done; of nine the seventh has 1 - 6/9 of the rate, and other settings are this run's."""

    def made(total, lr, decay):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, weight_decay=decay)
        return optimizer, warmup_poly(optimizer, total=total)

    first, schedule = made(6, 1.0, 0.1)
    for _ in range(6):
        first.step()
        schedule.step()
    assert first.param_groups[0]["lr"] == 0
    second, longer = made(9, 3.0, 0.2)
    configured = groups_of({"optimizer": second})
    second.load_state_dict(first.state_dict())
    longer.load_state_dict(schedule.state_dict())
    follow_schedule(second, longer, configured)
    assert second.param_groups[0]["lr"] == pytest.approx(3.0 / 3)
    assert second.param_groups[0]["weight_decay"] == 0.2
    second.step()
    longer.step()
    assert second.param_groups[0]["lr"] == pytest.approx(3.0 * 2 / 9)


def test_the_published_recipe():
    # spec, section 6: linear decay once an epoch towards 0 at epoch 1500, 1000 epochs run
    seen = rates(1000, lr=6e-5, total=1500)
    assert seen[0] == pytest.approx(6e-5)
    assert seen[750] == pytest.approx(3e-5)
    assert seen[999] == pytest.approx(6e-5 * 501 / 1500)


def test_resumes_where_it_stopped():
    settings = {"total": 10, "warmup": 2, "power": 0.9}
    expected = rates(8, **settings)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    first = warmup_poly(optimizer, **settings)
    for _ in range(5):
        optimizer.step()
        first.step()
    resumed = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    second = warmup_poly(resumed, **settings)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()
    second.step()
    assert resumed.param_groups[0]["lr"] == pytest.approx(expected[6])
