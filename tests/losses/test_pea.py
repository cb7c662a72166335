import pytest
import torch
from drawn import STUDENT, TEACHER, make_pair
from torch import nn

from transkd.errors import UserError
from transkd.losses import PEALoss

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}


def set_to_zero(term: nn.Module) -> None:
    for parameter in term.parameters():
        nn.init.zeros_(parameter)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, {1: 0.1, 2: 0.1, 3: 0.5, 4: 1.0}),
        ({"stages": (1, 2, 3)}, {1: 0.1, 2: 0.1, 3: 0.5}),
        ({"stages": (4,)}, {4: 1.0}),
        ({"stages": (4, 2), "stage_weights": (3.0, 2.0)}, {4: 3.0, 2: 2.0}),
    ],
)
def test_weighs_the_chosen_stages(settings, weights):
    """With the projections at 0 each stage's error is the mean square of the teacher's tokens."""
    term = PEALoss(**CHANNELS, **settings)
    set_to_zero(term)
    student, teacher, _ = make_pair()
    expected = sum(weight * (teacher.embeddings[stage - 1] ** 2).mean() for stage, weight in weights.items())
    torch.testing.assert_close(term(student, teacher), expected)
    assert set(term.projections) == {str(stage) for stage in weights}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": (0, 1)}, r"distinct numbers from 1,.*got \[0, 1\]"),
        ({"stages": (5,)}, r"from 1 to 4.*got \[5\]"),
        ({"stages": (1, 1)}, r"distinct.*got \[1, 1\]"),
        ({"stages": ()}, r"at least one; got \[\]"),
        ({"stages": (1, 2), "stage_weights": (1.0,)}, r"got 1 weights \[1.0\] for 2 stages \[1, 2\]"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        PEALoss(**CHANNELS, **settings)


def test_a_fifth_stage_has_no_default_weight():
    with pytest.raises(UserError, match="set stage_weights"):
        PEALoss((8,) * 5, (8,) * 5, stages=(1, 5))
