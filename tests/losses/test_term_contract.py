"""What every term in conf/term must hold to; a new yaml is picked up by itself."""

import copy
from pathlib import Path

import pytest
import torch
from drawn import STUDENT, TEACHER, gradients, make_pair, redrawn
from hydra.utils import instantiate
from omegaconf import OmegaConf

from transkd.losses import Criterion
from transkd.outputs import EVERYTHING

FOLDER = Path(__file__).parents[2] / "conf" / "term"
FILES = sorted(FOLDER.rglob("*.yaml"))


def entry(path, student=STUDENT, teacher=TEACHER):
    """One file as the criterion gets it."""
    config = OmegaConf.load(path)
    channels = {"channels": {"student": list(student), "teacher": list(teacher)}, "entry": config}
    return OmegaConf.create(channels).entry


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


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
def test_gradients_reach_the_student_and_the_term_alone(term, batch):
    student, teacher, target = make_pair(batch=batch)
    value = term(student, teacher, target)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    assert any(gradient.abs().sum() > 0 for gradient in gradients(student))
    assert not gradients(teacher)
    unreached = [name for name, p in term.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unreached
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())


def test_reads_of_the_teacher_only_what_it_needs(term):
    student, teacher, target = make_pair()
    expected = copy.deepcopy(term)(student, teacher, target)
    absent = {"logits": None, "features": (), "embeddings": ()}
    rest = teacher._replace(**{kind: absent[kind] for kind in EVERYTHING - term.needs})
    assert term(student, rest, target) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(term, dtype):
    student, teacher, target = make_pair()
    expected = copy.deepcopy(term)(student, teacher, target)
    with torch.autocast("cpu", dtype=dtype):
        value = term(student, teacher, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    value.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(student))
    assert all(parameter.grad.isfinite().all() for parameter in term.parameters())


def test_half_precision_outputs_under_autocast(term):
    """What networks under autocast show is half precision itself."""
    student, teacher, target = make_pair()
    expected = copy.deepcopy(term)(student, teacher, target)
    halves = [
        output._replace(
            features=tuple(maps.bfloat16() for maps in output.features),
            embeddings=tuple(tokens.bfloat16() for tokens in output.embeddings),
        )
        for output in (student, teacher)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(*halves, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


def test_gradcheck(path):
    student, teacher, target = make_pair((1, 1, 2, 8), (1, 2, 1, 2), size=(32, 32), dtype=torch.float64)
    term = redrawn(instantiate(entry(path, (1, 1, 2, 8), (1, 2, 1, 2))).term)

    def compute(logits, *rest):
        drawn = student._replace(logits=logits, features=rest[:4], embeddings=rest[4:])
        return term(drawn, teacher, target)

    leaves = (student.logits, *student.features, *student.embeddings)
    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


def test_state_dict_round_trip(path, term):
    pair = make_pair()
    expected = copy.deepcopy(term)(*pair)
    torch.manual_seed(1)
    other = instantiate(entry(path)).term
    if list(term.parameters()):  # else there is nothing by which another start could differ
        assert copy.deepcopy(other)(*pair) != expected
    other.load_state_dict(term.state_dict(), strict=True)
    assert other(*pair) == expected


def test_survives_evaluation_without_gradients(term):
    with torch.no_grad():
        assert term.eval()(*make_pair(batch=1)).isfinite()


def test_all_together_in_a_criterion():
    """As the configuration builds it: one criterion node with every term below it."""
    terms = {path.stem: OmegaConf.load(path) for path in FILES}
    node = {"_target_": "transkd.losses.Criterion", "terms": terms}
    channels = {"student": list(STUDENT), "teacher": list(TEACHER)}
    criterion = instantiate(OmegaConf.create({"channels": channels, "criterion": node}).criterion)
    assert isinstance(criterion, Criterion)
    total, values = criterion(*make_pair())
    assert set(values) == set(terms)
    expected = sum(terms[name].weight * value for name, value in values.items())
    torch.testing.assert_close(total, expected)
