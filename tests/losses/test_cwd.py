import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import STUDENT, TEACHER, gradients, make_output, make_pair
from torch import nn

from transkd.errors import UserError
from transkd.losses.cwd import CWDFeatureLoss, CWDLoss, normalised_distance
from transkd.losses.kd import KDLoss
from transkd.outputs import SegmentationOutput

NORMALISERS = ["channel", "spatial", "channel_mean"]
CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}


def output(logits):
    return SegmentationOutput(logits, (), (), torch.zeros(len(logits), 3, 4, 4))


def features(*maps):
    return SegmentationOutput(None, maps, (), torch.zeros(len(maps[0]), 3, 4, 4))


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("channel_T1", {"temperature": 1.0}),
        ("channel_T4", {"temperature": 4.0}),
        ("spatial_T4", {"temperature": 4.0, "normaliser": "spatial"}),
        ("channel_mean_mse", {"normaliser": "channel_mean"}),
        ("channel_T4_masked", {"temperature": 4.0, "mask_ignored": True}),
    ],
)
def test_golden_logits(variant, settings):
    vectors = golden.load("cwd_logits")
    logits = vectors["logits_s"].requires_grad_()
    value = CWDLoss(**settings)(output(logits), output(vectors["logits_t"]), vectors["labels"])
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, vectors[f"expected.grad.{variant}.logits_s"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("variant", "adapter"), [("channel_T4", "conv"), ("channel_T4_conv_bn_relu", "conv_bn_relu")])
def test_golden_features(variant, adapter):
    vectors = golden.load("cwd_feature")
    term = CWDFeatureLoss((6,), (10,), stages=(1,), adapter=adapter).double()
    names = {"1.weight": "adapter.weight", "1.0.weight": "adapter.weight"}
    names |= {"1.1.weight": "bn.weight", "1.1.bias": "bn.bias"}
    parameters = {names[name]: parameter for name, parameter in term.adapters.named_parameters()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(vectors[f"param.{name}"])
    maps = vectors["feat_s"].requires_grad_()
    value = term(features(maps), features(vectors["feat_t"]))
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    expected = golden.load("cwd_feature", f"expected.grad.{variant}.")
    reached = {"feat_s": maps} | {f"param.{name}": parameter for name, parameter in parameters.items()}
    assert set(reached) == set(expected)
    for name, tensor in reached.items():
        torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-8, atol=1e-12)


def test_by_hand():
    # One channel looks at the first of two positions with 3/4, the other network's with 1/2; three more channels agree.
    student, teacher = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
    student[0, 0, 0, 0] = math.log(3)
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 4
    assert CWDLoss(1.0)(output(student), output(teacher)).item() == pytest.approx(expected)


def test_channel_mean_by_hand():
    # Means 2 and 0 of the first class, 0 and 0 of the second: (4 + 0) / 2. With the second column alone: (9 + 0) / 2.
    student = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    term, masked = (CWDLoss(normaliser="channel_mean", mask_ignored=mask) for mask in (False, True))
    pair = output(student), output(torch.zeros(1, 2, 1, 2))
    assert term(*pair).item() == pytest.approx(2.0)
    assert masked(*pair, torch.tensor([[[255, 1]]])).item() == pytest.approx(4.5)


def test_spatial_is_kd():
    pair = make_pair()
    for settings in ({"mask_ignored": False}, {"mask_ignored": True}):
        torch.testing.assert_close(
            CWDLoss(4.0, normaliser="spatial", **settings)(*pair), KDLoss(4.0, **settings)(*pair)
        )


def test_a_single_position_has_nothing_to_compare():
    student, teacher = (output(make_output(seed=seed).logits[..., :1, :1]) for seed in (1, 2))
    assert CWDLoss()(student, teacher) == 0


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("mask_ignored", [False, True])
def test_identical_maps_give_0(normaliser, mask_ignored):
    student, _, target = make_pair()
    target[:, :20] = 255
    settings = {"normaliser": normaliser, "mask_ignored": mask_ignored}
    assert CWDLoss(**settings)(student, student, target) == 0
    assert CWDFeatureLoss(STUDENT, STUDENT, **settings)(student, student, target) == 0


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("temperature", [0.01, 4.0])
def test_masking_is_as_if_the_pixels_were_not_there(normaliser, temperature):
    student, teacher = (make_output(size=(16, 24), dtype=torch.float64, seed=seed) for seed in (1, 2))  # logits 4×6
    target = torch.zeros(2, 4, 6, dtype=torch.int64)
    target[:, 1] = 255
    target[:, :, 4:] = -1
    cut = [output(torch.cat((o.logits[:, :, :1, :4], o.logits[:, :, 2:, :4]), dim=2)) for o in (student, teacher)]
    expected = CWDLoss(temperature, normaliser=normaliser)(*cut)
    value = CWDLoss(temperature, normaliser=normaliser, mask_ignored=True)(student, teacher, target)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_ignored_pixels_do_not_count(normaliser, value):
    target = torch.zeros(2, 16, 24, dtype=torch.int64)
    target[:, 5:9] = 255
    student, teacher = make_output(seed=1).logits.detach(), make_output(seed=2).logits.detach()
    changed, other = student.clone(), teacher.clone()
    changed[:, :, 5:9] = other[:, :, 5:9] = value
    changed.requires_grad_()
    term = CWDLoss(normaliser=normaliser, mask_ignored=True)
    result = term(output(changed), output(other), target)
    result.backward()
    assert result == term(output(student), output(teacher), target)
    assert changed.grad.isfinite().all()
    assert (changed.grad[:, :, 5:9] == 0).all()


@pytest.mark.parametrize("normaliser", ["channel", "channel_mean"])
def test_an_image_without_labels_adds_0_and_still_divides(normaliser):
    student, teacher, target = make_pair()
    term = CWDLoss(normaliser=normaliser, mask_ignored=True)
    alone = [output(o.logits[:1]) for o in (student, teacher)]
    target[1] = 255
    torch.testing.assert_close(term(student, teacher, target), term(*alone, target[:1]) / 2)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_nothing_valid_is_a_differentiable_0(normaliser):
    student, teacher, target = make_pair()
    settings = {"normaliser": normaliser, "mask_ignored": True}
    feature_term = CWDFeatureLoss(**CHANNELS, **settings)
    for term in (CWDLoss(**settings), feature_term):
        value = term(student, teacher, torch.full_like(target, 255))
        value.backward()
        assert value == 0
    assert len(gradients(student)) == 2
    assert all((gradient == 0).all() for gradient in gradients(student))
    assert all((parameter.grad == 0).all() for parameter in feature_term.parameters())


@pytest.mark.parametrize(("grid", "size"), [("teacher", (32, 48)), ("student", (16, 24)), ("labels", (64, 96))])
def test_grids(grid, size):
    student, teacher = make_output(seed=1), make_output(size=(128, 192), seed=2)
    target = torch.zeros(2, 64, 96, dtype=torch.int64)
    resized = [F.interpolate(o.logits, size, mode="bilinear", align_corners=False) for o in (student, teacher)]
    enlarged = [output(logits) for logits in resized]
    torch.testing.assert_close(CWDLoss(grid=grid)(student, teacher, target), CWDLoss()(*enlarged))


@pytest.mark.parametrize("adapter", ["conv", "conv_bn_relu"])
def test_features_of_other_sizes_are_resized_before_the_adapter(adapter):
    student, teacher = make_output(seed=1), make_output(TEACHER, size=(128, 192), seed=2)
    resized = [F.interpolate(f, scale_factor=2.0, mode="bilinear", align_corners=False) for f in student.features]
    term = CWDFeatureLoss(**CHANNELS, adapter=adapter)
    torch.testing.assert_close(term(student, teacher), term(features(*resized), teacher))


def test_stages_are_summed():
    student, teacher, _ = make_pair()
    both = CWDFeatureLoss(**CHANNELS, stages=(2, 4))
    expected = 0
    for stage in (2, 4):
        single = CWDFeatureLoss(**CHANNELS, stages=(stage,))
        single.adapters[str(stage)] = both.adapters[str(stage)]
        expected += single(student, teacher)
    torch.testing.assert_close(both(student, teacher), expected)


def test_the_divisor_is_the_teachers_channels():
    maps, teacher_maps = torch.randn(2, 2, 3, 4), torch.randn(2, 6, 3, 4)
    term = CWDFeatureLoss((2,), (6,), stages=(1,))
    adapted = term.adapters["1"](maps)
    single = sum(normalised_distance(adapted[:, c : c + 1], teacher_maps[:, c : c + 1]) for c in range(6)) / 6
    torch.testing.assert_close(term(features(maps), features(teacher_maps)), single)


def test_adapters_exist_only_where_channels_differ():
    term = CWDFeatureLoss((8, 16, 24), (8, 20, 24), stages=(1, 2, 3))
    assert set(term.adapters) == {"2"}
    assert not list(CWDFeatureLoss((8, 16), (8, 20), stages=(1,)).parameters())
    conv, norm, relu = CWDFeatureLoss(**CHANNELS, adapter="conv_bn_relu").adapters["4"]
    assert conv.bias is None
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(relu, nn.ReLU)


def test_half_precision_logits_are_compared_in_float32():
    student, teacher, target = make_pair()
    target[:, :20] = 255
    term = CWDLoss(mask_ignored=True)
    value = term(output(student.logits.half()), output(teacher.logits.half()), target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, term(student, teacher, target), rtol=1e-2, atol=0)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_the_adapter_under_autocast_with_masking(normaliser):
    student, teacher, target = make_pair()
    target[:, :40] = 255
    term = CWDFeatureLoss(**CHANNELS, stages=(2,), normaliser=normaliser, mask_ignored=True)
    expected = term(student, teacher, target)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            value = term(student, teacher, target)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


def test_errors():
    student, teacher, _ = make_pair()
    for build in (CWDLoss, lambda **settings: CWDFeatureLoss(**CHANNELS, **settings)):
        with pytest.raises(UserError, match=r"grid must be one of .*'pixels'"):
            build(grid="pixels")
        with pytest.raises(UserError, match=r"normaliser must be one of 'channel', .*'none'"):
            build(normaliser="none")
        for temperature in (0.0, -1.0, float("nan")):
            with pytest.raises(UserError, match="temperature must be a number greater than 0"):
                build(temperature=temperature)
        for settings in ({"grid": "labels"}, {"mask_ignored": True}):
            with pytest.raises(UserError, match="target=labels"):
                build(**settings)(student, teacher)
    with pytest.raises(UserError, match="student has 5 classes, the teacher 4"):
        CWDLoss()(student, output(torch.zeros(2, 4, 16, 24)))


def test_errors_of_features():
    student, teacher, _ = make_pair()
    with pytest.raises(UserError, match=r"adapter must be one of 'conv', 'conv_bn_relu', None; got 'linear'"):
        CWDFeatureLoss(**CHANNELS, adapter="linear")
    with pytest.raises(UserError, match=r"at stage 4 the student has 32 channels, the teacher 40\. Set adapter"):
        CWDFeatureLoss(**CHANNELS, adapter=None)
    with pytest.raises(UserError, match=r"stages must be from 1 to 4; got \[3, 5\]"):
        CWDFeatureLoss(**CHANNELS, stages=(3, 5))
    with pytest.raises(UserError, match="stages must be distinct numbers from 1"):
        CWDFeatureLoss(**CHANNELS, stages=())
    with pytest.raises(UserError, match="got 2 student_channels"):
        CWDFeatureLoss((8, 16), (12,))
    with pytest.raises(UserError, match=r"student_channels=.* but the student's features have"):
        CWDFeatureLoss(**CHANNELS)(teacher, teacher)
    with pytest.raises(UserError, match="the teacher returns none"):
        CWDFeatureLoss(**CHANNELS)(student, teacher._replace(features=()))


def test_batch_normalisation_of_a_single_value():
    pair = features(torch.randn(1, 2, 1, 1)), features(torch.randn(1, 3, 1, 1))
    term = CWDFeatureLoss((2,), (3,), stages=(1,), adapter="conv_bn_relu")
    with pytest.raises(UserError, match="batch of one whose map is 1 x 1"):
        term(*pair)
    assert term.eval()(*pair) == 0
    assert CWDFeatureLoss((2,), (3,), stages=(1,))(*pair) == 0
