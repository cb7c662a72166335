import golden
import pytest
import torch
from drawn import TEACHER, make_output, make_pair

from transkd.errors import UserError
from transkd.losses.at import ATLoss, attention_map
from transkd.outputs import SegmentationOutput


def features(*maps):
    return SegmentationOutput(None, maps, (), torch.zeros(len(maps[0]), 3, 4, 4))


@pytest.mark.parametrize(("variant", "teacher"), [("p2", "feat_t"), ("p2_small_teacher", "feat_t_small")])
def test_golden(variant, teacher):
    vectors = golden.load("at")
    maps = vectors["feat_s"].requires_grad_()
    value = ATLoss(stages=(1,))(features(maps), features(vectors[teacher]))
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(maps.grad, vectors[f"expected.grad.{variant}.feat_s"], rtol=1e-8, atol=1e-12)


def test_by_hand():
    # Attention (3, 4) / 5 from two channels' squares (6, 8) / 2, against (1, 0): (0.4² + 0.8²) / 2 positions.
    student = torch.tensor([[5.0, 7.0], [1.0, 1.0]]).sqrt().view(1, 2, 1, 2)
    teacher = torch.tensor([7.0, 0.0]).view(1, 1, 1, 2)
    assert ATLoss(stages=(1,))(features(student), features(teacher)).item() == pytest.approx(0.4)


def test_odd_powers_do_not_see_signs():
    maps = torch.tensor([-3.0, 4.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(attention_map(maps, p=1), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(attention_map(maps, p=3), attention_map(-maps, p=3))


def test_the_scale_of_the_features_does_not_count():
    student, teacher, _ = make_pair()
    scaled = features(*(17 * maps for maps in student.features))
    torch.testing.assert_close(ATLoss()(scaled, teacher), ATLoss()(student, teacher))
    assert ATLoss()(student, student) == 0


def test_the_larger_map_is_pooled_height_and_width_by_themselves():
    wide, high = torch.rand(1, 2, 2, 6), torch.rand(1, 3, 4, 3)
    pooled_wide = wide.unflatten(3, (3, 2)).mean(-1)
    pooled_high = high.unflatten(2, (2, 2)).mean(3)
    term = ATLoss(stages=(1,))
    expected = term(features(pooled_wide), features(pooled_high))
    torch.testing.assert_close(term(features(wide), features(high)), expected)


def test_stages_are_summed():
    student, teacher, _ = make_pair()
    single = [ATLoss(stages=(stage,))(student, teacher) for stage in (1, 3)]
    torch.testing.assert_close(ATLoss(stages=(1, 3))(student, teacher), sum(single))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_an_image_without_activity_has_no_attention(p):
    maps = torch.zeros(1, 2, 3, 4, requires_grad=True)
    value = ATLoss(stages=(1,), p=p)(features(maps), features(torch.ones(1, 2, 3, 4)))
    value.backward()
    assert value.item() == pytest.approx(1 / 12)  # the teacher's vector has unit length
    assert maps.grad.isfinite().all()


def test_labels_are_not_read_and_images_do_not_mix():
    student, teacher, target = make_pair()
    value = ATLoss()(student, teacher, torch.full_like(target, 255))
    turned = [features(*(maps.flip(0) for maps in o.features)) for o in (student, teacher)]
    torch.testing.assert_close(ATLoss()(*turned), value)
    single = [ATLoss()(*(features(*(m[i : i + 1] for m in o.features)) for o in (student, teacher))) for i in (0, 1)]
    torch.testing.assert_close(sum(single) / 2, value)


def test_errors():
    student, teacher, _ = make_pair()
    for p in (0.5, 0, -2, float("nan"), float("inf")):
        with pytest.raises(UserError, match="power p must be a number of at least 1"):
            ATLoss(p=p)
    with pytest.raises(UserError, match="stages must be distinct numbers from 1"):
        ATLoss(stages=(0,))
    with pytest.raises(UserError, match="reads stage 5, but the student returns 4 stages"):
        ATLoss(stages=(5,))(student, teacher)
    with pytest.raises(UserError, match="no teacher"):
        ATLoss()(student, None)
    with pytest.raises(UserError, match="equal shape"):
        ATLoss()(student, make_output(TEACHER, batch=1))
