"""What every term in conf/term must hold to; a new yaml is picked up by itself."""

import copy
import re
from pathlib import Path

import pytest
import torch
from drawn import CLASSES, STUDENT, TEACHER, gradients, make_pair, redrawn
from hydra.utils import instantiate
from omegaconf import OmegaConf

from transkd.losses import Criterion
from transkd.outputs import EVERYTHING

FOLDER = Path(__file__).parents[2] / "conf" / "term"
# a student and the teacher that it is copied from have the same widths
SAME_WIDTHS = {"wecolora"}
FILES = sorted(FOLDER.rglob("*.yaml"))


# the pairs drawn here see images of one size, where isrd's file is for a teacher whose image is twice the student's,
# and logits of 16×24, where skd_adversarial takes 64×64 at least
FOR_THE_DRAWN = {"isrd": {"ratio": 4}, "skd_adversarial": {"grid": "labels"}}
# a discriminator's attention starts as the identity, and its hinge moves both scores alike: these learn from step 2 on
ASLEEP_AT_FIRST = r"discriminator\.(layers\.attention\d\.(query|key|value)|score\.bias)"


def load(path):
    """One file, fit for the pairs drawn here."""
    return OmegaConf.merge(OmegaConf.load(path), {"term": FOR_THE_DRAWN.get(path.stem, {})})


def entry(path, student=STUDENT, teacher=TEACHER):
    """One file as the criterion gets it."""
    config = load(path)
    channels = {"student": list(student), "teacher": list(teacher)}
    return OmegaConf.create({"channels": channels, "data": {"num_classes": CLASSES}, "entry": config}).entry


def called(term, *arguments):
    """The term's value; what draws at random, such as mgd, draws alike each time."""
    torch.manual_seed(5)
    return term(*arguments)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def widths(path):
    return (STUDENT, STUDENT if path.stem in SAME_WIDTHS else TEACHER)


@pytest.fixture
def term(path):
    torch.manual_seed(0)
    return instantiate(entry(path)).term


def test_there_are_terms():
    assert {"csf", "pea", "pea_shallow", "gl_mixer", "ea", "cwd"} <= {path.stem for path in FILES}


def test_the_file_names_its_place(path):
    header = path.read_text().splitlines()[0]
    assert header.startswith("# @package criterion.terms.")
    assert path.stem.startswith(header.rsplit(".", 1)[1])
    assert set(OmegaConf.load(path)) == {"term", "weight"}


def test_needs_are_declared_by_the_class(term):
    assert isinstance(type(term).needs, frozenset)
    assert term.needs <= EVERYTHING


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_reach_the_student_and_the_term_alone(term, batch, widths):
    student, teacher, target = make_pair(*widths, batch=batch)
    value = term(student, teacher, target)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    assert any(gradient.abs().sum() > 0 for gradient in gradients(student))
    assert not gradients(teacher)
    unreached = [name for name, p in term.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unreached
    idle = [name for name, p in term.named_parameters() if p.grad.abs().sum() == 0]
    assert all(re.match(ASLEEP_AT_FIRST, name) for name in idle), idle


def test_reads_of_the_teacher_only_what_it_needs(term, widths):
    student, teacher, target = make_pair(*widths)
    expected = called(copy.deepcopy(term), student, teacher, target)
    absent = {"logits": None, "features": (), "embeddings": ()}
    rest = teacher._replace(**{kind: absent[kind] for kind in EVERYTHING - term.needs})
    assert called(term, student, rest, target) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(term, dtype, widths):
    student, teacher, target = make_pair(*widths)
    expected = called(copy.deepcopy(term), student, teacher, target)
    with torch.autocast("cpu", dtype=dtype):
        value = called(term, student, teacher, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    value.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(student))
    assert all(parameter.grad.isfinite().all() for parameter in term.parameters())


def test_half_precision_outputs_under_autocast(term, widths):
    """What networks under autocast show is half precision itself."""
    student, teacher, target = make_pair(*widths)
    expected = called(copy.deepcopy(term), student, teacher, target)
    halves = [
        output._replace(
            features=tuple(maps.bfloat16() for maps in output.features),
            embeddings=tuple(tokens.bfloat16() for tokens in output.embeddings),
        )
        for output in (student, teacher)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = called(term, *halves, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


def test_gradcheck(path):
    if path.stem == "skd_adversarial":
        pytest.skip("its value holds the discriminator's own loss, for which the logits are constants")
    narrow = (1, 1, 2, 8), (1, 1, 2, 8) if path.stem in SAME_WIDTHS else (1, 2, 1, 2)
    student, teacher, target = make_pair(*narrow, size=(32, 32), dtype=torch.float64)
    term = redrawn(instantiate(entry(path, *narrow)).term)

    def compute(logits, *rest):
        drawn = student._replace(logits=logits, features=rest[:4], embeddings=rest[4:])
        return called(copy.deepcopy(term), drawn, teacher, target)  # a memory is as it was at each call

    leaves = (student.logits, *student.features, *student.embeddings)
    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


def test_state_dict_round_trip(path, term, widths):
    pair = make_pair(*widths)
    expected = called(copy.deepcopy(term), *pair)
    torch.manual_seed(1)
    other = instantiate(entry(path)).term
    if list(term.parameters()):  # else there is nothing by which another start could differ
        assert called(copy.deepcopy(other), *pair) != expected
    other.load_state_dict(term.state_dict(), strict=True)
    assert called(other, *pair) == expected


def test_survives_evaluation_without_gradients(term, widths):
    with torch.no_grad():
        assert term.eval()(*make_pair(*widths, batch=1)).isfinite()


def test_all_together_in_a_criterion():
    """As the configuration builds it: one criterion node with every term below it."""
    terms = {path.stem: load(path) for path in FILES if path.stem not in SAME_WIDTHS}
    node = {"_target_": "transkd.losses.Criterion", "terms": terms}
    channels = {"student": list(STUDENT), "teacher": list(TEACHER)}
    config = {"channels": channels, "data": {"num_classes": CLASSES}, "criterion": node}
    criterion = instantiate(OmegaConf.create(config).criterion)
    assert isinstance(criterion, Criterion)
    total, values = criterion(*make_pair())
    assert set(values) == set(terms)
    expected = sum(terms[name].weight * value for name, value in values.items())
    torch.testing.assert_close(total, expected)
