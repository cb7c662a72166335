import logging

import pytest
import torch
import torch.nn.functional as F
from drawn import STUDENT, TEACHER, make_output, make_pair, redrawn
from layouts import MixedLayouts

from transkd.errors import UserError
from transkd.losses import CSFLoss, hierarchical_context
from transkd.losses.shared.distances import position_mean

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}


def test_batch_of_one_squeezes_with_running_statistics():
    """Selecting between branches then gives in training what it gives in evaluation, and counts nothing."""
    term = redrawn(CSFLoss(**CHANNELS, mid_channels=16))
    for stage in term.stages.values():
        if hasattr(stage, "squeeze"):
            stage.squeeze.norm.running_mean.uniform_(-1, 1)
            stage.squeeze.norm.running_var.uniform_(0.5, 2)
    before = {name: value.clone() for name, value in term.named_buffers() if ".squeeze." in name}
    reduced, residual = (torch.randn(1, 16, 4, 6, dtype=torch.float64) for _ in range(2))
    stage = term.stages["3"]
    expected = stage.eval()._select(reduced, residual)
    torch.testing.assert_close(stage.train()._select(reduced, residual), expected)
    for name, value in before.items():
        torch.testing.assert_close(term.get_buffer(name), value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_mean_over_positions_holds_what_a_sum_would_not(dtype):
    maps = torch.full((2, 3, 256, 512), 4.0, dtype=dtype)  # their sum is 524288, a half ends at 65504
    pooled = position_mean(maps)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, torch.full((2, 3, 1, 1), 4.0, dtype=dtype))


def test_all_gradients_are_laid_out_as_the_maps_are():
    def channels_last(output, requires_grad):
        maps = [f.detach().to(memory_format=torch.channels_last).requires_grad_(requires_grad) for f in output.features]
        return output._replace(features=tuple(maps))

    student, teacher, _ = make_pair()
    term = CSFLoss(**CHANNELS, mid_channels=16).to(memory_format=torch.channels_last)
    value = term(channels_last(student, requires_grad=True), channels_last(teacher, requires_grad=False))
    with MixedLayouts() as mixed:
        value.backward()
    assert not mixed.found


def test_a_single_value_per_channel_elsewhere_is_an_error():
    term = CSFLoss(**CHANNELS)
    student, teacher = make_output(batch=1, size=(32, 32)), make_output(TEACHER, batch=1, size=(32, 32))
    with pytest.raises(UserError, match="batch of one whose map is 1 x 1"):
        term(student, teacher)
    assert term.eval()(student, teacher).isfinite()


def test_maps_of_other_sizes_are_resized_to_the_teachers_and_that_is_said_once(caplog):
    student, teacher = make_output(size=(64, 96)), make_output(TEACHER, size=(96, 128))
    term = CSFLoss(**CHANNELS)
    with caplog.at_level(logging.INFO, logger="transkd.losses"):
        value = term(student, teacher)
        term(student, teacher)
    assert len(caplog.records) == 1
    assert "student (16, 24), teacher (24, 32)" in caplog.text
    fused = CSFLoss.fuse(term, student.features)
    resized = [
        F.interpolate(mine, other.shape[-2:], mode="bilinear", align_corners=False)
        for mine, other in zip(fused, teacher.features, strict=True)
    ]
    expected = sum(hierarchical_context(*maps) for maps in zip(resized, teacher.features, strict=True))
    torch.testing.assert_close(value, expected)


def test_equal_sizes_are_not_spoken_of(caplog):
    CSFLoss(**CHANNELS)(*make_pair())
    assert not caplog.records


@pytest.mark.parametrize("size", [(68, 100), (40, 56)])
def test_odd_sizes_are_aligned_inside(size):
    """Stage sizes that are no multiples of each other: the residual is brought to the next stage's size."""
    student, teacher = make_output(size=size), make_output(TEACHER, size=size)
    fused = CSFLoss(**CHANNELS).fuse(student.features)
    assert [maps.shape for maps in fused] == [maps.shape for maps in teacher.features]


@pytest.mark.parametrize(("mid_channels", "squeezed"), [(16, 32), (64, 32), (1024, 64)])
def test_width_of_the_squeeze(mid_channels, squeezed):
    term = CSFLoss((8, 16), (12, 20), mid_channels=mid_channels)
    assert term.stages["1"].squeeze.conv.weight.shape == (squeezed, mid_channels, 1, 1)
    assert not hasattr(term.stages["2"], "squeeze")


def test_initial_weights_are_kaiming_uniform():
    term = CSFLoss((256, 256), (64, 64))
    for layer, fan_in in ((term.stages["1"].reduce, 256), (term.stages["1"].expand, 64 * 9)):
        bound = (3 / fan_in) ** 0.5
        assert 0.95 * bound < layer.conv.weight.abs().max() <= bound


def test_settings_are_checked_at_once():
    with pytest.raises(UserError, match="no criterion 'mse'"):
        CSFLoss(**CHANNELS, criterion="mse")
    with pytest.raises(UserError, match="temperature"):
        CSFLoss(**CHANNELS, criterion="channel_kl", temperature=0)
