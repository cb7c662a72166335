import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import gradients, make_pair
from largest import Largest

from transkd.errors import UserError
from transkd.losses.skd import SKDPairwiseLoss, pairwise_error, pool_nodes
from transkd.outputs import SegmentationOutput


def output(feature):
    return SegmentationOutput(None, (feature,), (), torch.zeros(len(feature), 3, 4, 4))


def by_definition(student, teacher):
    """Every pair of every image by itself."""
    total, (batch, _, height, width) = 0.0, student.shape
    for b in range(batch):
        mine, other = (F.normalize(maps[b].flatten(1), dim=0) for maps in (student, teacher))
        for m in range(height * width):
            for n in range(height * width):
                total += (mine[:, m] @ mine[:, n] - other[:, m] @ other[:, n]) ** 2
    return total / (batch * (height * width) ** 2)


@pytest.mark.parametrize(
    ("variant", "suffix", "settings"),
    [
        ("pair_pool2", "", {}),
        ("pair_pool2_odd", "_odd", {"pool": 2}),
        ("pair_original_half", "", {"pool_fraction": 0.5, "stop_norm_gradient": True}),
    ],
)
def test_golden(variant, suffix, settings):
    vectors = golden.load("skd")
    feature = vectors[f"feat_s{suffix}"].requires_grad_()
    value = SKDPairwiseLoss(stages=(1,), **settings)(output(feature), output(vectors[f"feat_t{suffix}"]))
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    expected = vectors[f"expected.grad.{variant}.feat_s{suffix}"]
    torch.testing.assert_close(feature.grad, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("channels", [2, 50])  # fewer and more than there are nodes
def test_definition(channels):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, channels, 3, 4), (2, 5, 3, 4)
    pair = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(pairwise_error(*pair), by_definition(*pair))


def test_windows_at_the_border_count():
    maps = torch.arange(15.0).view(1, 1, 3, 5)
    assert pool_nodes(maps, 2).tolist() == [[[[6, 8, 9], [11, 13, 14]]]]
    assert pool_nodes(maps, pool_fraction=0.5).tolist() == [[[[1, 3, 4], [6, 8, 9], [11, 13, 14]]]]
    assert pool_nodes(maps[..., :1, :1], 4).shape == (1, 1, 1, 1)
    assert pool_nodes(maps[..., :1, :1], pool_fraction=0.5).shape == (1, 1, 1, 1)


def test_constant_norms_keep_the_value_and_change_the_gradient():
    results = []
    for stop in (False, True):
        student, teacher, _ = make_pair(dtype=torch.float64)
        value = SKDPairwiseLoss(stop_norm_gradient=stop)(student, teacher)
        value.backward()
        results.append((value, student.features[3].grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    assert not torch.allclose(results[0][1], results[1][1])


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_to_learn(stop):
    student, teacher, _ = make_pair(dtype=torch.float64)
    term = SKDPairwiseLoss(stages=(1, 4), pool=1, stop_norm_gradient=stop)
    scaled = teacher._replace(features=tuple(3 * maps for maps in teacher.features))
    torch.testing.assert_close(term(teacher, scaled), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    silent = student._replace(features=tuple(torch.zeros_like(maps).requires_grad_() for maps in student.features))
    term(silent, teacher).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(silent))


def test_stages_are_summed_and_images_averaged():
    student, teacher, _ = make_pair()
    one, other, both = (SKDPairwiseLoss(stages=s)(student, teacher) for s in ((1,), (3,), (1, 3)))
    torch.testing.assert_close(one + other, both)
    halves = [
        SKDPairwiseLoss()(
            *(o._replace(features=tuple(maps[i : i + 1] for maps in o.features)) for o in (student, teacher))
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(halves) / 2, SKDPairwiseLoss()(student, teacher))


def test_other_sizes_are_resized_to_the_teachers():
    feature, other = torch.rand(2, 6, 3, 4), torch.rand(2, 6, 5, 8)
    enlarged = F.interpolate(feature, (5, 8), mode="bilinear", align_corners=False)
    term = SKDPairwiseLoss(stages=(1,))
    torch.testing.assert_close(term(output(feature), output(other)), term(output(enlarged), output(other)))


def test_large_maps_in_little_memory():
    maps = [torch.randn(1, 8, 128, 256).requires_grad_() for _ in range(2)]
    with Largest() as largest:
        SKDPairwiseLoss(stages=(1,))(*(output(feature) for feature in maps)).backward()
    assert largest.numel <= maps[0].numel()


def test_errors():
    for pool in (0, -2, 1.5):
        with pytest.raises(UserError, match="pool must be a whole number of at least 1"):
            SKDPairwiseLoss(pool=pool)
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match="pool_fraction must be greater than 0 and at most 1"):
            SKDPairwiseLoss(pool_fraction=fraction)
    with pytest.raises(UserError, match="stages must be distinct numbers"):
        SKDPairwiseLoss(stages=())
    with pytest.raises(UserError, match="reads stage 5, but the student returns 4"):
        SKDPairwiseLoss(stages=(5,))(*make_pair())
