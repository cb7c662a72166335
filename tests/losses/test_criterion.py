import math

import pytest
import torch
from drawn import STUDENT, TEACHER, gradients, make_pair
from torch import nn

from transkd.errors import UserError
from transkd.losses import (
    Criterion,
    CSFLoss,
    EALoss,
    GLMixerLoss,
    KDLoss,
    PEALoss,
    Progress,
    Schedule,
    TaskCrossEntropy,
)

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}


class Constant(nn.Module):
    """A term of known value that counts its calls."""

    def __init__(self, value, needs=()):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))
        self.needs = frozenset(needs)
        self.calls = 0

    def forward(self, student, teacher, target=None):
        self.calls += 1
        return 1 * self.value


def criterion(**terms):
    """Criterion(name=(term, weight), …)."""
    return Criterion({name: {"term": term, "weight": weight} for name, (term, weight) in terms.items()})


def test_weighs_raw_values():
    held = criterion(a=(Constant(3), 0.5), b=(Constant(-2), 10))
    total, values = held(*make_pair())
    assert {name: value.item() for name, value in values.items()} == {"a": 3, "b": -2}
    assert total.item() == 0.5 * 3 - 10 * 2
    assert held.weights == {"a": 0.5, "b": 10.0}
    total.backward()
    assert held.terms["a"].value.grad == 0.5
    assert held.terms["b"].value.grad == 10


def test_weight_0_is_not_computed_and_takes_no_gradient():
    idle, active = Constant(math.nan, needs={"embeddings"}), Constant(1, needs={"features"})
    held = criterion(idle=(idle, 0), active=(active, 1.0))
    total, values = held(*make_pair())
    assert list(values) == ["active"]
    assert total == 1
    assert (idle.calls, active.calls) == (0, 1)
    assert not idle.value.requires_grad
    assert active.value.requires_grad
    assert held.needs == {"features"}


def test_needs_nothing_when_only_the_task_is_left():
    held = criterion(task=(TaskCrossEntropy(), 1.0), csf=(CSFLoss(**CHANNELS), 0.0))
    student, teacher, target = make_pair()
    assert held.needs == frozenset()
    total, _ = held(student, None, target)
    assert total == TaskCrossEntropy()(student, None, target)
    total.backward()
    assert not gradients(teacher)


def test_needs_are_joined():
    held = criterion(csf=(CSFLoss(**CHANNELS), 1), pea=(PEALoss(**CHANNELS), 1), kd=(Constant(1, {"logits"}), 1))
    assert held.needs == {"features", "embeddings", "logits"}


def test_terms_are_registered():
    held = criterion(pea=(PEALoss(**CHANNELS), 1.0))
    assert "terms.pea.projections.4.weight" in held.state_dict()


def test_nothing_to_compute_is_said_when_called():
    for held in (Criterion({}), criterion(a=(Constant(1), 0))):
        assert held.needs == frozenset()
        with pytest.raises(UserError, match="nothing to compute"):
            held(*make_pair())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"term": Constant(1), "wieght": 1.0}, "unknown 'wieght', missing 'weight'"),
        ({"term": Constant(1)}, "missing 'weight'"),
        ({"term": Constant(1), "weight": 1.0, "scheduel": None}, "unknown 'scheduel'"),
        (
            {"term": Constant(1), "weight": 1.0, "schedule": 0.5},
            "must be a transkd.losses.Schedule; got float",
        ),
        ({"term": Constant(1), "weight": "auto(0)"}, "auto\\(s\\) requires s > 0.*got 'auto\\(0\\)'"),
        ({"term": Constant(1), "weight": "auto(x)"}, "got 'auto\\(x\\)'"),
        ({"term": Constant(1), "weight": "auto(-1)"}, "got 'auto\\(-1\\)'"),
        (Constant(1), "unknown 'Constant\\(\\)', missing 'term', missing 'weight'"),
        ({"term": nn.Linear(1, 1), "weight": 1.0}, "attribute `needs`.*got Linear"),
        ({"term": "csf", "weight": 1.0}, "torch module.*got str"),
        ({"term": Constant(1, {"attention"}), "weight": 1.0}, "needs \\['attention'\\]"),
        ({"term": Constant(1), "weight": -1.0}, "at least 0, .*got -1.0"),
        ({"term": Constant(1), "weight": math.nan}, "got nan"),
        ({"term": Constant(1), "weight": math.inf}, "got inf"),
        ({"term": Constant(1), "weight": "1"}, "got '1'"),
        ({"term": Constant(1), "weight": True}, "got True"),
    ],
)
def test_malformed_entries_are_named(entry, message):
    with pytest.raises(UserError, match=f"^Term 'odd'.*{message}"):
        Criterion({"odd": entry})


@pytest.mark.parametrize("name", ["a.b", "keys", "training"])
def test_names_that_torch_cannot_hold(name):
    with pytest.raises(UserError, match=f"called '{name}'"):
        Criterion({name: {"term": Constant(1), "weight": 1.0}})


STAGEWISE = [
    (CSFLoss, "features"),
    (PEALoss, "embeddings"),
    (GLMixerLoss, "embeddings"),
    (EALoss, "embeddings"),
]


@pytest.fixture(params=["alone", "held"])
def called(request):
    """A term called alone and inside a criterion: the same clear error, the second with the term's name."""

    def call(term, student, teacher, message):
        start = f"^{type(term).__name__}.*" if request.param == "alone" else f"^Term 'mine': {type(term).__name__}.*"
        call = term if request.param == "alone" else criterion(mine=(term, 1.0))
        with pytest.raises(UserError, match=start + message):
            call(student, teacher)

    return call


@pytest.mark.parametrize(("term", "kind"), STAGEWISE)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_output_that_lacks_what_is_read(called, term, kind, who):
    outputs = make_pair()._asdict()
    outputs[who] = outputs[who]._replace(**{kind: ()})
    called(
        term(**CHANNELS),
        outputs["student"],
        outputs["teacher"],
        f"compares {kind}, but the {who} returns none: choose",
    )


@pytest.mark.parametrize(("term", "kind"), STAGEWISE)
def test_no_teacher(called, term, kind):
    called(term(**CHANNELS), make_pair().student, None, f"reads the teacher's {kind}, but there is no teacher")


@pytest.mark.parametrize(("term", "kind"), STAGEWISE)
def test_unequal_numbers_of_stages(called, term, kind):
    student, teacher, _ = make_pair(teacher=TEACHER[:3])
    called(term(**CHANNELS), student, teacher, f"student returns 4 stages of {kind}, the teacher 3")


@pytest.mark.parametrize(("term", "kind"), STAGEWISE)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_other_channels_than_built_for(called, term, kind, who):
    other = make_pair(**{who: (8, 16, 24, 48)})
    built = {"student": STUDENT, "teacher": TEACHER}[who]
    message = rf"built with {who}_channels=\({', '.join(map(str, built))}\).*{kind} have \(8, 16, 24, 48\)"
    called(term(**CHANNELS), other.student, other.teacher, message)


@pytest.mark.parametrize(("term", "kind"), STAGEWISE)
def test_unpaired_channels_are_named_when_built(term, kind):
    with pytest.raises(UserError, match=rf"{term.__name__} .*got 4 student_channels .* and 3 teacher_channels"):
        term(student_channels=STUDENT, teacher_channels=TEACHER[:3])


def test_a_term_of_the_users_own_is_checked_too():
    student, teacher, _ = make_pair()
    with pytest.raises(UserError, match="Term 'kd': Constant compares logits, but the teacher returns none"):
        criterion(kd=(Constant(1, {"logits"}), 1.0))(student, teacher._replace(logits=None))


# Schedules


def test_a_schedule_multiplies_the_weight_and_switches_the_teacher_off():
    kd = Constant(3, needs={"logits"})
    held = Criterion(
        {
            "task": {"term": Constant(1), "weight": 1.0},
            "kd": {"term": kd, "weight": 2.0, "schedule": Schedule(end=0.5, fall=0.5)},
        }
    )
    totals, needs = [], []
    for step in range(4):
        held.advance(Progress(step, steps=4, epochs=1))
        needs.append(held.needs)
        held.zero_grad()
        total, values = held(*make_pair())
        total.backward()
        totals.append(total.item())
        assert ("kd" in values) == (step < 2)
        assert kd.value.grad is not None  # also when it is off: data-parallel training waits for it
    assert totals == [1 + 6, 1 + 3, 1, 1]
    assert needs == [{"logits"}, {"logits"}, frozenset(), frozenset()]
    assert held.ever_needs == {"logits"}
    assert kd.calls == 2


def test_a_schedule_that_never_turns_on_in_this_run_is_named():
    late = {"term": Constant(1), "weight": 1.0, "schedule": Schedule(start=20, unit="epoch")}
    with pytest.raises(UserError, match=r"Term 'late': Schedule: it never turns on: start=20 .*the run has 20 epochs"):
        Criterion({"late": late}).advance(Progress(0, steps=100, epochs=20))


# Automatic weights


class Scaled(nn.Module):
    """A term whose gradient on the student's logits has a known norm."""

    needs = frozenset()

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher, target=None):
        return self.scale * student.logits.sum()


def auto(share=0.3, scale=5.0):
    return Criterion(
        {"task": {"term": Scaled(2.0), "weight": 4.0}, "kd": {"term": Scaled(scale), "weight": f"auto({share})"}}
    )


def outputs(weight):
    student, teacher, target = make_pair()
    return student._replace(logits=weight * torch.ones(2, 5, 4, 4)), teacher, target


def test_an_automatic_weight_gives_the_share_of_the_tasks_gradient():
    held, weight = auto(), nn.Parameter(torch.tensor(1.0))
    assert held.weights == {"task": 4.0, "kd": None}
    assert held.calibrating
    total, values = held(*outputs(weight), parameters=[weight])
    assert held.weights["kd"] == pytest.approx(0.3 * 4 * 2 / 5)
    torch.testing.assert_close(total, 4 * values["task"] + 0.3 * 4 * 2 / 5 * values["kd"])


def test_an_automatic_weight_is_a_mean_then_fixed_and_saved():
    held, weight = auto(), nn.Parameter(torch.tensor(1.0))
    for scale in (1.0, 2.0, *[4.0] * 8):
        held.terms["kd"].scale = scale
        held(*outputs(weight), parameters=[weight])
    expected = 0.3 * 4 * 2 * (1 + 1 / 2 + 8 / 4) / 10
    assert held.weights["kd"] == pytest.approx(expected)
    assert not held.calibrating
    held.terms["kd"].scale = 100.0
    held(*outputs(weight))  # nothing looks at gradients any more
    assert held.weights["kd"] == pytest.approx(expected)
    again = auto()
    again.load_state_dict(held.state_dict(), strict=True)
    assert again.weights == held.weights
    assert not again.calibrating


def test_automatic_weights_say_what_they_lack():
    with pytest.raises(UserError, match="the term 'task' must have a weight"):
        Criterion({"kd": {"term": Scaled(1.0), "weight": "auto(0.3)"}})
    with pytest.raises(UserError, match="parameters=the student's"):
        auto()(*outputs(torch.tensor(1.0)))


def test_a_batch_without_a_gradient_sets_no_weight():
    held, weight = auto(scale=0.0), nn.Parameter(torch.tensor(1.0))
    total, _ = held(*outputs(weight), parameters=[weight])
    assert total.isfinite()
    assert held.weights["kd"] is None


def test_a_term_that_never_has_a_gradient_is_named_once(caplog):
    entries = {"kd": {"term": Scaled(0.0), "weight": "auto(0.3)"}, "at": {"term": Scaled(1.0), "weight": "auto(0.1)"}}
    held = Criterion({"task": {"term": Scaled(2.0), "weight": 4.0}, **entries})
    weight = nn.Parameter(torch.tensor(1.0))
    for step in range(25):
        held(*outputs(weight), parameters=[weight])
        assert len(caplog.messages) == (step >= 9)
    assert "in 10 steps, so all of them are 0: the gradient on the student is zero or not finite for kd." in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"start": 0.999}, {"start": 0.9, "rise": 0.05}, {"rise": 0.5, "end": 0.05}, {"start": 0.51, "end": 0.55},
     {"start": 9.5, "unit": "epoch"}],
)  # fmt: skip
def test_a_schedule_that_is_on_at_no_step_is_named(settings):
    entry = {"term": KDLoss(), "weight": 1.0, "schedule": Schedule(**settings)}
    criterion = Criterion({"task": {"term": TaskCrossEntropy(), "weight": 1.0}, "kd": entry})
    with pytest.raises(UserError, match=r"Term 'kd': .*never turns on at a step of a run of 10 epochs and 10 steps"):
        criterion.check_schedules(steps=10, epochs=10)
    criterion.check_schedules(steps=10_000, epochs=10)


def test_an_automatic_weight_needs_its_term_at_the_first_step():
    entry = {"term": KDLoss(), "weight": "auto(0.3)", "schedule": Schedule(start=0.5)}
    criterion = Criterion({"task": {"term": TaskCrossEntropy(), "weight": 1.0}, "kd": entry})
    with pytest.raises(UserError, match=r"Term 'kd': auto.* must be on there"):
        criterion.check_schedules(steps=10, epochs=1)
