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
from transkd.outputs import EVERYTHING, UNLABELLED

FOLDER = Path(__file__).parents[2] / "conf" / "term"
# a student and the teacher that it is copied from have the same widths
SAME_WIDTHS = {"wecolora"}
FILES = sorted(FOLDER.rglob("*.yaml"))


# the pairs drawn here see images of one size, where isrd's file is for a teacher whose image is twice the student's,
# and logits of 16×24, where skd_adversarial takes 64×64 at least; a drawn teacher is seldom sure
FOR_THE_DRAWN = {"isrd": {"ratio": 4}, "skd_adversarial": {"grid": "labels"}, "teacher_labels": {"threshold": 0.5}}
# a discriminator's attention starts as the identity, and its hinge moves both scores alike: these learn from step 2 on
ASLEEP_AT_FIRST = r"discriminator\.(layers\.attention\d\.(query|key|value)|score\.bias)"


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def load(path, **settings):
    """One file, fit for the pairs drawn here."""
    return OmegaConf.merge(OmegaConf.load(path), {"term": FOR_THE_DRAWN.get(path.stem, {}) | settings})


def entry(path, student=STUDENT, teacher=TEACHER, **settings):
    """One file as the criterion gets it."""
    config = load(path, **settings)
    channels = {"student": list(student), "teacher": list(teacher)}
    return OmegaConf.create({"channels": channels, "data": {"num_classes": CLASSES}, "entry": config}).entry


def with_settings(files, settings):
    """Parameters for a test: each file, with the settings that it has here beyond its own."""
    return [pytest.param(path, settings.get(path.stem, {}), id=path.stem) for path in files]


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
def settings():
    return {}


@pytest.fixture
def term(path, settings):
    torch.manual_seed(0)
    return instantiate(entry(path, **settings)).term


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


@HALVES
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


def shown_in(output, dtype):
    """An output as networks of this type show it; the image stays as it is."""
    return output._replace(
        logits=output.logits.to(dtype),
        features=tuple(maps.to(dtype) for maps in output.features),
        embeddings=tuple(tokens.to(dtype) for tokens in output.embeddings),
    )


def test_networks_and_terms_in_bfloat16_throughout(term, widths):
    student, teacher, target = make_pair(*widths)
    expected = called(copy.deepcopy(term), student, teacher, target)
    halves = [shown_in(part, torch.bfloat16)._replace(image=part.image.bfloat16()) for part in (student, teacher)]
    value = called(term.bfloat16(), *halves, target)
    torch.testing.assert_close(value.float(), expected, rtol=0.1, atol=0.02)
    value.backward()
    assert any(gradient.abs().sum() > 0 for gradient in gradients(student))


@HALVES
def test_half_precision_outputs_under_autocast(term, dtype, widths):
    """What networks under autocast show is half precision itself; the numbers are the same as widened before."""
    student, teacher, target = make_pair(*widths)
    halves = [shown_in(output, dtype) for output in (student, teacher)]
    expected = called(copy.deepcopy(term), *(shown_in(output, torch.float32) for output in halves), target)
    with torch.autocast("cpu", dtype=dtype):
        value = called(term, *halves, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    value.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(student))


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
# every file as it is, and once more where it can leave out positions without a label
MASKED = [path for path in FILES if "mask_ignored" in OmegaConf.load(path).term]
AS_IT_IS_AND_MASKED = pytest.mark.parametrize(
    ("path", "settings"),
    [
        *with_settings(FILES, {}),
        *(pytest.param(path, {"mask_ignored": True}, id=f"{path.stem}-masked") for path in MASKED),
    ],
)


def test_some_terms_can_leave_ignored_positions_out():
    assert {"kd", "cwd", "cwd_feature", "dist"} <= {path.stem for path in MASKED}


def reads_labels(term, pair):
    """Whether the values of labels matter to a term; it then asks for them."""
    try:
        called(copy.deepcopy(term), pair.student, pair.teacher)
    except UserError as error:
        return "labels" in str(error) and type(term).__name__ not in LABELS_AS_A_GRID
    return False


@AS_IT_IS_AND_MASKED
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
        assert not any(p.grad is not None and p.grad.any() for p in term.parameters())


@AS_IT_IS_AND_MASKED
def test_images_without_labels(term, settings, widths):
    """A term that reads labels ignores them; one that only leaves out ignored positions sees all of them."""
    student, teacher, target = make_pair(*widths)
    ignored = torch.full_like(target, 255)
    expected = called(copy.deepcopy(term), student, teacher, target if settings else ignored)
    assert called(term, student, teacher, torch.full_like(target, UNLABELLED)) == expected


@AS_IT_IS_AND_MASKED
def test_ignored_positions_teach_nothing(term, widths):
    """What networks give on the left half, where every label is 255, matters to no term that reads labels."""
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

    student, teacher = (
        output._replace(logits=changed(output.logits), features=tuple(changed(maps) for maps in output.features))
        for output in pair[:2]
    )
    torch.testing.assert_close(called(copy.deepcopy(term), student, pair.teacher, target), expected)
    torch.testing.assert_close(called(term, pair.student, teacher, target), expected)


def term_grid(term):
    return getattr(term, "grid", getattr(term, "resolution", "teacher"))


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


# for which four copies of the image beside each other are not the same as one, and why
NOT_BY_TILES = {
    "at": "a sum over vectors of length 1: it falls as 1 / positions, as its documentation says",
    "csf": "3×3 convolutions look over the copies' borders",
    "ea": "7×7 and 3×3 convolutions look over the copies' borders",
    "gl_mixer": "convolutions along the tokens look over the copies' ends",
    "mgd": "a sum over positions, as its documentation says, and 3×3 convolutions",
    "reviewkd": "3×3 convolutions look over the copies' borders",
    "skd_adversarial": "the discriminator's 4×4 convolutions look over the copies' borders",
}
# settings without upsampling and windows, which look over the copies' borders too, and without a drawn sample
WITHIN_A_TILE = {
    "dice": {"resolution": "logits"},
    "focal": {"resolution": "logits"},
    "manifold": {"samples": 10**6},
    "ohem": {"resolution": "logits"},
    "pdd": {"grid": "teacher"},
    "skd": {"pool": 1},
}


def test_exceptions_from_the_tiles_are_terms():
    assert set(NOT_BY_TILES) | set(WITHIN_A_TILE) <= {path.stem for path in FILES}


@pytest.mark.parametrize(
    ("path", "settings"), with_settings([path for path in FILES if path.stem not in NOT_BY_TILES], WITHIN_A_TILE)
)
def test_a_value_does_not_grow_with_the_image(term, widths):
    term = term.eval()
    student, teacher, target = make_pair(*widths)

    def tiled(output):
        return output._replace(
            logits=output.logits.repeat(1, 1, 2, 2),
            features=tuple(maps.repeat(1, 1, 2, 2) for maps in output.features),
            embeddings=tuple(tokens.repeat(1, 4, 1) for tokens in output.embeddings),
            image=output.image.repeat(1, 1, 2, 2),
        )

    small = called(term, student, teacher, target)
    torch.testing.assert_close(called(term, tiled(student), tiled(teacher), target.repeat(1, 2, 2)), small)


# settings without which a term wants more than the teacher's outputs: a learnt projection, the label's probability
NOTHING_BETWEEN = {"fitnet": {"adapter": None}, "pdd": {"variant": "dkd"}, "teacher_labels": {"soft": True}}


@pytest.mark.parametrize(("path", "settings"), with_settings(FILES, NOTHING_BETWEEN))
def test_a_student_that_is_the_teacher_has_the_least(path, settings):
    """Where a term puts nothing learnt between networks of the same widths, equal outputs are its minimum, 0."""
    term = instantiate(entry(path, TEACHER, TEACHER, **settings)).term
    if list(term.parameters()):
        pytest.skip("trains layers between the networks")
    if not term.needs:
        pytest.skip("compares the student with the labels")
    student, teacher, target = make_pair(TEACHER, TEACHER)
    same = called(term, teacher, teacher, target)
    other = called(term, student, teacher, target)
    assert abs(same) < 1e-5 * other


# terms whose value for a batch is by their method no mean over its images, or that are drawn anew in each process;
# their documentation says in what several processes differ from one
ACROSS_THE_BATCH = {
    "cirkd",
    "cirkd_memory",
    "csf",
    "dice",
    "dist",
    "manifold",
    "ohem",
    "reviewkd",
    "skd_adversarial",
    "vlfd",
}
AT_RANDOM = {"mgd"}


def test_processes_give_the_gradient_of_the_joined_batch(term, path, widths):
    """Data-parallel training averages gradients: those of two halves must average to those of the whole.

    In earnest, with two processes: test_two_processes.py.
    """
    if path.stem in ACROSS_THE_BATCH | AT_RANDOM:
        assert re.search(r"\bprocess(es)?\b", type(term).__doc__ or "")
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
