import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import STUDENT, TEACHER, make_output, make_pair, redrawn

from transkd.errors import UserError
from transkd.losses import hierarchical_context
from transkd.losses.reviewkd import ReviewKDLoss
from transkd.outputs import SegmentationOutput

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}
PARTS = {"conv1": "reduce", "conv2": "expand", "att": "attention", "bn": "norm"}


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def ours(name):
    """A golden parameter's name in the term: stages count from 1."""
    stage, *parts = name.split(".")
    return ".".join(["stages", str(int(stage) + 1), *(PARTS.get(part, part) for part in parts)])


def shown(features):
    return SegmentationOutput(None, tuple(features), (), torch.zeros(len(features[0]), 3, 4, 4))


@pytest.fixture
def golden_case():
    vectors = golden.load("reviewkd")
    maps = {who: [vectors[f"feat_{who}.{i}"].requires_grad_() for i in range(4)] for who in "st"}
    term = ReviewKDLoss(*([m.shape[1] for m in maps[who]] for who in "st"), mid_channels=7).double()
    parameters = {ours(name): value for name, value in golden.load("reviewkd", "param.").items()}
    assert set(parameters) == {name for name, _ in term.named_parameters()}
    missing, unexpected = term.load_state_dict(parameters, strict=False)
    assert not unexpected
    assert all("running" in name or "num_batches" in name for name in missing)
    return term, maps["s"], maps["t"], vectors


def test_golden(golden_case):
    term, features, teacher_features, vectors = golden_case
    value = term(shown(features), shown(teacher_features))
    close(value, vectors["expected.loss.total"])
    value.backward()
    for i, feature in enumerate(features):
        close(feature.grad, vectors[f"expected.grad.total.feat_s.{i}"], rtol=1e-8)
    expected = {ours(name): grad for name, grad in golden.load("reviewkd", "expected.grad.total.param.").items()}
    got = dict(term.named_parameters())
    assert set(got) == set(expected)
    for name, grad in expected.items():
        close(got[name].grad, grad, rtol=1e-8)
    assert all(feature.grad is None for feature in teacher_features)


def test_golden_maps_and_stages(golden_case):
    term, features, teacher_features, vectors = golden_case
    for i, (fused, other) in enumerate(zip(term.fuse(features), teacher_features, strict=True)):
        close(fused, vectors[f"expected.out.{i}"])
        close(hierarchical_context(fused, other), vectors[f"expected.loss.hcl_stage.{i}"])


def test_golden_portrait():
    vectors = golden.load("reviewkd")
    student = vectors["portrait_s"].requires_grad_()
    value = hierarchical_context(student, vectors["portrait_t"])
    value.backward()
    close(value, vectors["expected.loss.hcl_portrait"])
    close(student.grad, vectors["expected.grad.hcl_portrait.portrait_s"], rtol=1e-8)


def identity_norms(term):
    """In evaluation, batch normalisation then passes its input on."""
    for module in term.eval().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1 - module.eps)


def by_hand():
    """Stage 2: 1×1, X = 2·3 = 6. Stage 1: 2×2, X = 5, gates sigmoid(0) = 1/2 and sigmoid(ln 3) = 3/4: R = 2.5 + 4.5."""
    term = ReviewKDLoss((1, 1), (1, 1), mid_channels=1).double()
    identity_norms(term)
    with torch.no_grad():
        for stage, weight in (("1", 1.0), ("2", 2.0)):
            term.stages[stage].reduce.conv.weight.fill_(weight)
            term.stages[stage].expand.conv.weight.zero_()[..., 1, 1] = 1
        term.stages["1"].attention.weight.zero_()
        term.stages["1"].attention.bias.copy_(torch.tensor([0, math.log(3)], dtype=torch.float64))
    return term, shown([torch.full((1, 1, 2, 2), 5.0), torch.full((1, 1, 1, 1), 3.0)])


def doubles(output):
    return output._replace(features=tuple(maps.double() for maps in output.features))


def test_by_hand():
    term, student = by_hand()
    shallow, deep = term.fuse(doubles(student).features)
    close(shallow, torch.full((1, 1, 2, 2), 7.0).double())
    close(deep, torch.full((1, 1, 1, 1), 6.0).double())
    # differences of 2 and 3 everywhere, so every level has the errors 4 and 9
    teacher = shown([torch.full((1, 1, 2, 2), 5.0), torch.full((1, 1, 1, 1), 3.0)])
    close(term(doubles(student), doubles(teacher)), torch.tensor(4.0 + 9.0).double())
    same = shown([shallow.detach(), deep.detach()])
    assert term(doubles(student), same) == 0  # the minimum


def test_maps_of_other_sizes_are_resized_to_the_teachers():
    student, teacher = make_output(size=(64, 96)), make_output(TEACHER, size=(96, 128))
    term = ReviewKDLoss(**CHANNELS)
    resized = [
        F.interpolate(mine, other.shape[-2:], mode="bilinear", align_corners=False)
        for mine, other in zip(term.fuse(student.features), teacher.features, strict=True)
    ]
    expected = sum(hierarchical_context(*maps) for maps in zip(resized, teacher.features, strict=True))
    torch.testing.assert_close(term(student, teacher), expected)


@pytest.mark.parametrize("size", [(68, 100), (40, 56), (96, 64)])
def test_odd_sizes_are_aligned_inside(size):
    student, teacher = make_output(size=size), make_output(TEACHER, size=size)
    fused = ReviewKDLoss(**CHANNELS).fuse(student.features)
    assert [maps.shape for maps in fused] == [maps.shape for maps in teacher.features]


def test_order_of_the_images_and_labels_do_not_matter():
    student, teacher, target = make_pair(dtype=torch.float64)
    term = redrawn(ReviewKDLoss(**CHANNELS, mid_channels=8))
    value = term(student, teacher)
    flipped = [
        output._replace(features=tuple(maps.flip(0) for maps in output.features)) for output in (student, teacher)
    ]
    close(term(*flipped), value)
    assert term(student, teacher, target.fill_(255)) == value


def test_a_single_value_per_channel_is_an_error_in_training():
    term = ReviewKDLoss(**CHANNELS)
    student, teacher = make_output(batch=1, size=(32, 32)), make_output(TEACHER, batch=1, size=(32, 32))
    with pytest.raises(UserError, match=r"ReviewKDLoss .* batch of one whose map is 1 x 1"):
        term(student, teacher)
    assert term.eval()(student, teacher).isfinite()
    assert term.train()(*make_pair(batch=2, size=(32, 32))[:2]).isfinite()


def test_the_deepest_stage_has_no_attention():
    term = ReviewKDLoss(**CHANNELS)
    assert [hasattr(stage, "attention") for stage in term.stages.values()] == [True, True, True, False]
    assert term.stages["1"].attention.weight.shape == (2, 128, 1, 1)


def test_initial_weights_are_kaiming_uniform():
    term = ReviewKDLoss((256, 256), (64, 64))
    for layer, fan_in in ((term.stages["1"].reduce, 256), (term.stages["1"].expand, 64 * 9)):
        bound = (3 / fan_in) ** 0.5
        assert 0.95 * bound < layer.conv.weight.abs().max() <= bound


def test_errors():
    with pytest.raises(UserError, match=r"4 student_channels .* 1 teacher_channels"):
        ReviewKDLoss(STUDENT, (12,))
    with pytest.raises(UserError, match="mid_channels must be a number greater than 0; got 0"):
        ReviewKDLoss(**CHANNELS, mid_channels=0)
    term = ReviewKDLoss(**CHANNELS)
    with pytest.raises(UserError, match=r"teacher_channels=\(12, 20, 28, 40\), but the teacher's features have"):
        term(make_output(), make_output())
    with pytest.raises(UserError, match="there is no teacher"):
        term(make_output(), None)
    with pytest.raises(UserError, match="2 images from the student and 1 from the teacher"):
        term(make_output(), make_output(TEACHER, batch=1))
