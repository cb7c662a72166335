import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import STUDENT, TEACHER, make_output, make_pair, redrawn

from transkd.errors import UserError
from transkd.losses import mgd
from transkd.losses.mgd import MGDLoss, draw_mask, generation_error
from transkd.outputs import SegmentationOutput

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}
SPATIAL = {"mask": "spatial", "mask_ratio": 0.75, "alpha": 2e-5}
CHANNEL = {"mask": "channel", "mask_ratio": 0.15, "alpha": 7e-5}


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def shown(*features):
    return SegmentationOutput(None, features, (), torch.zeros(len(features[0]), 3, 4, 4))


def ours(name):
    part, rest = name.split(".", 1)
    return f"{ {'align': 'align', 'gen': 'generators'}[part] }.1.{rest}"


@pytest.mark.parametrize(
    ("settings", "variant"),
    [(SPATIAL, "spatial_lambda0.75_alpha2e-5"), (CHANNEL, "channel_lambda0.15_alpha7e-5")],
)
def test_golden(settings, variant, monkeypatch):
    vectors = golden.load("mgd")
    feature, teacher_feature = vectors["feat_s"].requires_grad_(), vectors["feat_t"].requires_grad_()
    term = MGDLoss((6,), (10,), stages=(1,), **settings).double()
    term.load_state_dict({ours(name): value for name, value in golden.load("mgd", "param.").items()}, strict=True)
    mask = vectors[f"mask_{settings['mask']}"]
    error = generation_error(term.align["1"](feature), teacher_feature, term.generators["1"], mask=mask)
    close(term.alpha * error, vectors[f"expected.loss.{variant}"], atol=0)

    monkeypatch.setattr(mgd, "draw_mask", lambda features, kind, ratio: mask)
    value = term(shown(feature), shown(teacher_feature))
    close(value, vectors[f"expected.loss.{variant}"], atol=0)
    value.backward()
    close(feature.grad, vectors[f"expected.grad.{variant}.feat_s"], rtol=1e-8)
    assert teacher_feature.grad is None
    expected = golden.load("mgd", f"expected.grad.{variant}.param.")
    assert len(expected) == (6 if settings is SPATIAL else 0)
    for name, gradient in expected.items():
        close(term.get_parameter(ours(name)).grad, gradient, rtol=1e-8)


def copying(term):
    """Let the generators pass positive maps on: the middle of each kernel is 1 from a channel to itself."""
    with torch.no_grad():
        for generator in term.generators.values():
            for conv in (generator.conv1, generator.conv2):
                conv.bias.zero_()
                torch.nn.init.dirac_(conv.weight)
    return term


def test_by_hand():
    term = copying(MGDLoss((3,), (3,), stages=(1,), mask_ratio=0.0, alpha=0.5))
    assert not list(term.align.parameters())
    own, other = torch.full((2, 3, 4, 5), 2.0), torch.full((2, 3, 4, 5), 5.0)
    assert term(shown(own), shown(own)) == 0  # the minimum
    # nothing hidden: (5 − 2)² at 3 channels and 20 positions of each image
    close(term(shown(own), shown(other)), torch.tensor(0.5 * 9 * 60))
    term.reduction = "mean"
    close(term(shown(own), shown(other)), torch.tensor(0.5 * 9))


@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_all_hidden_generates_from_zeros(kind):
    term = copying(MGDLoss((3,), (3,), stages=(1,), mask=kind, mask_ratio=1.0, alpha=1.0))
    close(term(shown(torch.rand(2, 3, 4, 5)), shown(torch.full((2, 3, 4, 5), 5.0))), torch.tensor(25.0 * 60))


def test_what_is_kept_is_not_rescaled():
    mask = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    own, other = torch.full((1, 2, 1, 2), 3.0), torch.full((1, 2, 1, 2), 3.0)
    # hidden positions miss 3, kept ones are exact
    close(generation_error(own, other, torch.nn.Identity(), mask=mask), torch.tensor(2 * 9.0))
    close(generation_error(own, other, torch.nn.Identity(), mask=mask, reduction="mean"), torch.tensor(4.5))


@pytest.mark.parametrize(("kind", "shape"), [("spatial", (4, 1, 40, 60)), ("channel", (4, 64, 1, 1))])
def test_masks(kind, shape):
    torch.manual_seed(0)
    features = torch.zeros(4, 64, 40, 60, dtype=torch.float64)
    for ratio in (0.75, 0.15):
        mask = draw_mask(features, kind, ratio)
        assert mask.shape == shape
        assert mask.dtype == torch.float64
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask.mean().item() == pytest.approx(1 - ratio, abs=0.1)
        assert not torch.equal(mask[0], mask[1])  # each image its own
    assert draw_mask(features, kind, 0.0).all()
    assert not draw_mask(features, kind, 1.0).any()


@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_masks_are_drawn_anew_in_evaluation_too_and_repeat_by_seed(kind):
    student, teacher, target = make_pair()
    term = MGDLoss(**CHANNELS, stages=(1,), mask=kind, mask_ratio=0.5)
    for mode in (True, False):
        term.train(mode)
        torch.manual_seed(0)
        first, second = term(student, teacher), term(student, teacher)
        assert first != second
        torch.manual_seed(0)
        assert term(student, teacher, target.fill_(255)) == first  # the labels are not read


def test_stages_add_up():
    pair = make_pair(dtype=torch.float64)[:2]
    both = redrawn(MGDLoss(**CHANNELS, stages=(2, 4), mask_ratio=0.0))
    total = 0.0
    for stage in (2, 4):
        single = MGDLoss(**CHANNELS, stages=(stage,), mask_ratio=0.0).double()
        single.load_state_dict({k: v for k, v in both.state_dict().items() if f".{stage}." in k}, strict=True)
        total = total + single(*pair)
    close(both(*pair), total)


def test_no_alignment_where_the_widths_agree():
    term = MGDLoss((8, 16), (8, 20), stages=(1, 2))
    assert {name for name, _ in term.align.named_parameters()} == {"2.weight", "2.bias"}


def test_maps_of_other_sizes_are_resized_to_the_teachers():
    student, teacher = make_output(size=(64, 96)), make_output(TEACHER, size=(96, 128))
    term = MGDLoss(**CHANNELS, stages=(1,), mask_ratio=0.0, alpha=1.0, reduction="mean")
    aligned = F.interpolate(term.align["1"](student.features[0]), (24, 32), mode="bilinear", align_corners=False)
    expected = (term.generators["1"](aligned) - teacher.features[0]).square().mean()
    torch.testing.assert_close(term(student, teacher), expected)


def test_order_of_the_images_does_not_matter():
    student, teacher, _ = make_pair(dtype=torch.float64)
    term = MGDLoss(**CHANNELS, mask_ratio=0.0).double()
    flipped = [
        output._replace(features=tuple(maps.flip(0) for maps in output.features)) for output in (student, teacher)
    ]
    close(term(*flipped), term(student, teacher))


def test_errors():
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="mask_ratio is a probability from 0 to 1; got"):
            MGDLoss(**CHANNELS, mask_ratio=ratio)
    with pytest.raises(UserError, match="mask must be one of 'spatial', 'channel'; got 'pixel'"):
        MGDLoss(**CHANNELS, mask="pixel")
    with pytest.raises(UserError, match="reduction must be one of 'sum', 'mean'; got 'none'"):
        MGDLoss(**CHANNELS, reduction="none")
    with pytest.raises(UserError, match="alpha must be a number greater than 0; got 0"):
        MGDLoss(**CHANNELS, alpha=0)
    with pytest.raises(UserError, match=r"stages must be from 1 to 4.* got \[5\]"):
        MGDLoss(**CHANNELS, stages=(5,))
    with pytest.raises(UserError, match="stages must be distinct numbers"):
        MGDLoss(**CHANNELS, stages=())
    with pytest.raises(UserError, match=r"student_channels=\(8, 16, 24, 32\), but the student's features have"):
        MGDLoss(**CHANNELS)(make_output(TEACHER), make_output(TEACHER))
    with pytest.raises(UserError, match="2 images from the student and 1 from the teacher"):
        MGDLoss(**CHANNELS)(make_output(), make_output(TEACHER, batch=1))
