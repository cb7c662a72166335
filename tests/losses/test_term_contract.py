"""What every term in conf/term must hold to; a new yaml is picked up by itself."""

import copy
import re
from pathlib import Path

import pytest
import torch
from drawn import CLASSES, STUDENT, TEACHER, gradients, images_of, make_output, make_pair, redrawn, tensors
from hydra.utils import instantiate
from omegaconf import OmegaConf

from transkd.errors import UserError
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


# Labels, sizes and batches


# takes the labels' size alone
LABELS_AS_A_GRID = {"SKDAdversarialLoss"}


def reads_labels(term, pair):
    """Whether the values of labels matter to a term; it then asks for them."""
    try:
        called(copy.deepcopy(term), pair.student, pair.teacher)
    except UserError as error:
        return "labels" in str(error) and type(term).__name__ not in LABELS_AS_A_GRID
    return False


def test_a_batch_without_a_valid_label(term, widths):
    pair = make_pair(*widths)
    value = called(term, pair.student, pair.teacher, torch.full_like(pair.target, 255))
    assert value.isfinite()
    value.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(pair.student))
    assert all(p.grad is None or p.grad.isfinite().all() for p in term.parameters())
    if reads_labels(term, pair):
        assert value == 0
        assert not any(gradient.any() for gradient in gradients(pair.student))


def test_ignored_positions_teach_nothing(term, widths):
    """What the student gives on the left half, where every label is 255, matters to no term that reads labels."""
    pair = make_pair(*widths)
    if not reads_labels(term, pair):
        pytest.skip("reads no labels")
    target = pair.target.clone()
    target[:, :, :48] = 255
    term = term.eval()  # batch statistics see every position
    expected = called(copy.deepcopy(term), pair.student, pair.teacher, target)

    def changed(maps):
        columns = maps.shape[3] // 2
        edge = max(columns - 2, 0) if term_grid(term) == "labels" else columns  # interpolation looks over the edge
        return torch.cat([maps[..., :edge] + 3 * torch.rand_like(maps[..., :edge]), maps[..., edge:]], dim=3)

    student = pair.student._replace(
        logits=changed(pair.student.logits), features=tuple(changed(maps) for maps in pair.student.features)
    )
    torch.testing.assert_close(called(term, student, pair.teacher, target), expected)


def term_grid(term):
    return getattr(term, "grid", "teacher")


def test_networks_of_other_sizes_are_aligned_or_refused(term, widths):
    """A teacher that sees the image at twice the size."""
    student, _, target = make_pair(*widths)
    teacher = make_output(widths[1], size=(128, 192), seed=2)
    refused = ""
    try:
        value = called(term, student, teacher, target)
    except UserError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert re.search("tokens|positions|image", refused)
        return
    assert value.isfinite()
    value.backward()
    assert any(gradient.abs().sum() > 0 for gradient in gradients(student))


# terms whose value is a mean over positions, by their method: four copies of the image beside each other change nothing
PER_POSITION = {"kd", "dkd", "fitnet", "cwd", "cwd_feature", "dist", "pea", "pea_shallow", "ifvd"}


@pytest.mark.parametrize("name", sorted(PER_POSITION))
def test_a_value_does_not_grow_with_the_image(name):
    torch.manual_seed(0)
    term = instantiate(entry(FOLDER / f"{name}.yaml")).term.eval()
    student, teacher, target = make_pair()

    def tiled(output):
        return output._replace(
            logits=output.logits.repeat(1, 1, 2, 2),
            features=tuple(maps.repeat(1, 1, 2, 2) for maps in output.features),
            embeddings=tuple(tokens.repeat(1, 4, 1) for tokens in output.embeddings),
            image=output.image.repeat(1, 1, 2, 2),
        )

    small = term(student, teacher, target)
    torch.testing.assert_close(term(tiled(student), tiled(teacher), target.repeat(1, 2, 2)), small)


def test_a_student_that_is_the_teacher_has_the_least(term):
    """Where a term owns nothing and reads no labels, equal networks are its minimum, 0."""
    _, teacher, target = make_pair(TEACHER, TEACHER)
    pair = make_pair(TEACHER, TEACHER)
    if list(term.parameters()) or reads_labels(term, pair):
        pytest.skip("owns parameters or reads labels")
    same = called(term, teacher, teacher, target)
    other = called(term, pair.student, teacher, target)
    assert abs(same) < 1e-5 * other


# terms whose value for a batch is by their method no mean over its images; their documentation says so
ACROSS_THE_BATCH = {"cirkd", "cirkd_memory", "csf", "dist", "manifold", "reviewkd", "skd_adversarial", "vlfd"}
AT_RANDOM = {"mgd"}


def test_processes_give_the_gradient_of_the_joined_batch(term, path, widths):
    """Data-parallel training averages gradients: those of two halves must average to those of the whole.

    In earnest, with two processes: test_two_processes.py.
    """
    if path.stem in AT_RANDOM:
        pytest.skip("draws anew for each process")
    if path.stem in ACROSS_THE_BATCH:
        assert "batch" in (type(term).__doc__ or "").lower()
        return
    student, teacher, target = make_pair(*widths, batch=4)
    called(term, student, teacher, target).backward()
    whole = [p.grad.clone() for p in term.parameters()] + [g.clone() for g in gradients(student)]
    for tensor in [*term.parameters(), *tensors(student)]:
        tensor.grad = None
    parts = slice(0, 2), slice(2, 4)
    halves = [called(term, images_of(student, part), images_of(teacher, part), target[part]) for part in parts]
    (torch.stack(halves).sum() / 2).backward()
    averaged = [p.grad for p in term.parameters()] + gradients(student)
    for one, other in zip(averaged, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
