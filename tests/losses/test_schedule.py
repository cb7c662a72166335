import golden
import pytest
import torch

from transkd.errors import UserError
from transkd.losses import Progress, Schedule

KINDS = {"hard": {}, "linear": {"fall": 0.1}, "cosine": {"fall": 0.1, "shape": "cosine"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", [0.5, 0.8])
def test_golden(kind, off):
    vectors = golden.load("dearkd_schedule")
    total = int(vectors["total_steps"])
    schedule = Schedule(end=off, **KINDS[kind])
    got = torch.tensor([schedule(Progress(int(step), total, 1)) for step in vectors["step"]], dtype=torch.float64)
    torch.testing.assert_close(got, vectors[f"expected.weight.{kind}_f{off}"], rtol=1e-9, atol=1e-12)


def test_by_hand():
    def factors(schedule, at):
        return [schedule(Progress(step, steps=100, epochs=10)) for step in at]

    assert factors(Schedule(), [0, 50, 99]) == [1, 1, 1]
    assert factors(Schedule(rise=5, unit="epoch"), [0, 20, 50, 99]) == [0, 0.4, 1, 1]  # min(epoch / 5, 1)
    assert factors(Schedule(start=10, end=20, unit="step"), [9, 10, 19, 20]) == [0, 1, 1, 0]
    assert factors(Schedule(start=2, end=4, unit="epoch"), [19, 20, 39, 40]) == [0, 1, 1, 0]
    assert factors(Schedule(start=0.1, rise=0.2, end=0.7, fall=0.4), [10, 20, 30, 50]) == pytest.approx(
        [0, 0.5, 1, 0.5]
    )
    cosine = Schedule(rise=0.4, shape="cosine")
    assert factors(cosine, [0, 20, 40]) == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.5, "end": 0.5}, "never turns on"),
        ({"start": 1.0}, "never turns on"),
        ({"end": 0}, "never turns on"),
        ({"start": float("nan")}, "must be 0 or more"),
        ({"rise": -1}, "must be 0 or more"),
        ({"end": float("nan")}, "never turns on"),
        ({"shape": "square"}, "shape must be one of linear, cosine; got 'square'"),
        ({"unit": "hour"}, "unit must be one of run, epoch, step; got 'hour'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Schedule(**settings)


@pytest.mark.parametrize(("on", "unit"), [(10, "epoch"), (100, "step")])
def test_never_on_in_a_short_run(on, unit):
    with pytest.raises(UserError, match=rf"never turns on: start={on} in units of a {unit}, but the run has 10 epochs"):
        Schedule(start=on, unit=unit)(Progress(0, steps=100, epochs=10))
