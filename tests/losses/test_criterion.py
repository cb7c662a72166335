import math

import pytest
import torch
from drawn import STUDENT, TEACHER, gradients, make_pair
from torch import nn

from transkd.errors import UserError
from transkd.losses import Criterion, CSFLoss, EALoss, GLMixerLoss, PEALoss, TaskCrossEntropy

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
        ({"term": Constant(1), "weight": 1.0, "schedule": None}, "unknown 'schedule'"),
        (Constant(1), "unknown 'Constant\\(\\)', missing 'term', missing 'weight'"),
        ({"term": nn.Linear(1, 1), "weight": 1.0}, "attribute `needs`.*got Linear"),
        ({"term": "csf", "weight": 1.0}, "torch module.*got str"),
        ({"term": Constant(1, {"attention"}), "weight": 1.0}, "needs \\['attention'\\]"),
        ({"term": Constant(1), "weight": -1.0}, "at least 0; got -1.0"),
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
        f"compares {kind}, but the {who} shows none: choose",
    )


@pytest.mark.parametrize(("term", "kind"), STAGEWISE)
def test_no_teacher(called, term, kind):
    called(term(**CHANNELS), make_pair().student, None, f"reads the teacher's {kind}, but there is no teacher")


@pytest.mark.parametrize(("term", "kind"), STAGEWISE)
def test_unequal_numbers_of_stages(called, term, kind):
    student, teacher, _ = make_pair(teacher=TEACHER[:3])
    called(term(**CHANNELS), student, teacher, f"student shows 4 stages of {kind}, the teacher 3")


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
    with pytest.raises(UserError, match="Term 'kd': Constant compares logits, but the teacher shows none"):
        criterion(kd=(Constant(1, {"logits"}), 1.0))(student, teacher._replace(logits=None))
