import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import STUDENT, TEACHER, make_output, make_pair

from transkd.errors import UserError
from transkd.losses.wecolora import WeCoLoRALoss, copied_blocks, feature_error, matched_teacher_blocks
from transkd.outputs import SegmentationOutput

DEPTHS = ["depth12_r2", "depth12_r3", "depth2_r2", "depth3_r2", "depth4_r3", "depth6_r2"]


def output(*features):
    return SegmentationOutput(None, features, (), torch.zeros(len(features[0]), 3, 4, 4))


def test_golden_blocks_as_stages():
    blocks = [[golden.load("wecolora")[f"block_{who}.{i}"].requires_grad_() for i in (0, 1)] for who in "st"]
    shown = [output(*(block.mT.reshape(2, 8, 2, 5) for block in whose)) for whose in blocks]
    value = WeCoLoRALoss(stages=(1, 2))(*shown)
    torch.testing.assert_close(value, golden.load("wecolora", "expected.loss.multi_block")[""], rtol=1e-9, atol=0)
    value.backward()
    for i, block in enumerate(blocks[0]):
        expected = golden.load("wecolora", f"expected.grad.multi_block.block_s.{i}")[""]
        torch.testing.assert_close(block.grad, expected, rtol=1e-8, atol=1e-12)
    assert all(block.grad is None for block in blocks[1])


@pytest.mark.parametrize("case", DEPTHS)
def test_golden_indices(case):
    depth, ratio = (int(part.strip("depthr")) for part in case.split("_"))
    assert copied_blocks(depth, ratio) == golden.load("wecolora", f"expected.copied_blocks.{case}")[""].tolist()
    expected = golden.load("wecolora", f"expected.matched_teacher_blocks.{case}")[""].tolist()
    assert matched_teacher_blocks(depth, ratio) == expected


def test_indices_of_mit_b2_by_hand():
    assert [copied_blocks(depth, 2) for depth in (3, 4, 6, 3)] == [[0, 2], [0, 2], [0, 2, 4], [0, 2]]
    assert [matched_teacher_blocks(depth, 2) for depth in (3, 4, 6, 3)] == [[1, 2], [1, 3], [1, 3, 5], [1, 2]]
    assert copied_blocks(3, 1) == matched_teacher_blocks(3, 1) == [0, 1, 2]


def test_by_hand():
    student, teacher = (torch.tensor(row).view(1, 2, 1, 1) for row in ([0.0, math.log(3)], [0.0, 0.0]))
    absolute, divergence = math.log(3) / 2, math.log(4 / 3) / 2  # 1/2, 1/2 against 1/4, 3/4
    torch.testing.assert_close(feature_error(student, teacher).item(), absolute)
    torch.testing.assert_close(feature_error(student, teacher, "mae_kl").item(), (absolute + divergence) / 2)


@pytest.mark.parametrize("distance", ["mae", "mae_kl"])
def test_the_teachers_features_give_nothing_to_learn(distance):
    same = make_output()
    value = WeCoLoRALoss((1, 2, 3, 4), distance)(same, make_output())
    value.backward()
    assert value == 0
    assert all(feature.grad.abs().max() < 1e-7 for feature in same.features)


def test_sizes_that_differ():
    student, teacher = make_output(seed=1), make_output(size=(128, 192), seed=2)
    enlarged = F.interpolate(student.features[3], scale_factor=2, mode="bilinear")
    expected = (enlarged - teacher.features[3]).abs().mean()
    torch.testing.assert_close(WeCoLoRALoss()(student, teacher), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("distance", ["mae", "mae_kl"])
def test_contract_for_networks_of_the_same_widths(batch, distance):
    student, teacher, target = make_pair(STUDENT, STUDENT, batch=batch)
    term = WeCoLoRALoss(distance=distance)
    assert not list(term.parameters())
    expected = term(student, teacher, target)
    expected.backward()
    assert student.features[3].grad.abs().sum() > 0
    assert all(feature.grad is None for feature in teacher.features)
    halves = [o._replace(features=tuple(f.bfloat16() for f in o.features)) for o in (student, teacher)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(*halves)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


def test_errors():
    student, teacher, _ = make_pair()
    with pytest.raises(UserError, match="stage 4 has 32 channels in the student and 40 in the teacher") as caught:
        WeCoLoRALoss()(student, teacher)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="reads stage 5, but the student returns 4"):
        WeCoLoRALoss(stages=(5,))(student, teacher)
    with pytest.raises(UserError, match="2 images from the student and 3"):
        WeCoLoRALoss()(student, make_output(TEACHER[:3] + STUDENT[3:], batch=3))
    with pytest.raises(UserError, match="distance must be one of 'mae', 'mae_kl'; got 'mse'"):
        WeCoLoRALoss(distance="mse")
    with pytest.raises(UserError, match="stages must be distinct numbers"):
        WeCoLoRALoss(stages=())
    for depth, ratio in ((0, 2), (4, 0)):
        with pytest.raises(UserError, match=f"of 1 or more; got {depth} and {ratio}"):
            copied_blocks(depth, ratio)
