import math

import numpy as np
import pytest
import torch

from transkd.errors import UserError
from transkd.losses import channel_kl, hierarchical_context, spatial_kl
from transkd.losses.shared.distances import map_criterion, mean_squared_error

MAP_CRITERIA = [hierarchical_context, channel_kl, spatial_kl]


def drawn_maps(shape, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    return generator.normal(scale=scale, size=shape), generator.normal(scale=scale, size=shape)


def numpy_hierarchical_context(student, teacher, levels):
    """The formula spelt out over bins of ⌊q·i/o⌋ … ⌈(q+1)·i/o⌉ − 1, with the levels given by hand."""

    def pool(maps, level):
        height, width = maps.shape[-2:]
        pooled = np.empty((*maps.shape[:2], level, level))
        for row in range(level):
            rows = slice(row * height // level, -(-(row + 1) * height // level))
            for column in range(level):
                columns = slice(column * width // level, -(-(column + 1) * width // level))
                pooled[:, :, row, column] = maps[:, :, rows, columns].mean(axis=(2, 3))
        return pooled

    errors = [((student - teacher) ** 2).mean()]
    errors += [((pool(student, level) - pool(teacher, level)) ** 2).mean() for level in levels]
    weights = [0.5**j for j in range(len(errors))]
    return float(np.dot(weights, errors) / np.sum(weights))


def numpy_kl(student, teacher, axis, temperature):
    def softmax(scores):
        exponentials = np.exp((scores - scores.max(axis=axis, keepdims=True)) / temperature)
        return exponentials / exponentials.sum(axis=axis, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    return temperature**2 * float((p * np.log(p / q)).sum())


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((8, 12), [4, 2, 1]),
        ((5, 7), [4, 2, 1]),
        ((4, 9), [2, 1]),
        ((3, 5), [2, 1]),  # level 4 is left out and the weights start again from 1/2
        ((9, 3), [2, 1]),  # portrait: the shorter side counts
        ((8, 2), [1]),
        ((7, 1), []),
        ((1, 1), []),
    ],
)
def test_hierarchical_context_leaves_levels_out(size, levels):
    student, teacher = drawn_maps((2, 3, *size))
    value = hierarchical_context(torch.from_numpy(student), torch.from_numpy(teacher))
    assert value.item() == pytest.approx(numpy_hierarchical_context(student, teacher, levels), rel=1e-12)


def test_hierarchical_context_by_hand():
    # One pixel of 3×3 differs by 36. Full size: 36²/9 = 144. The 2×2 bins overlap in the middle row
    # and column, so the middle pixel is in all four bins of 4 pixels: 9² = 81. 1×1: (36/9)² = 16.
    # Together (144 + 81/2 + 16/4) / 1.75.
    student = torch.zeros(1, 1, 3, 3)
    student[0, 0, 1, 1] = 36
    assert hierarchical_context(student, torch.zeros_like(student)).item() == pytest.approx(188.5 / 1.75)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_against_numpy(temperature):
    student, teacher = drawn_maps((2, 3, 4, 5), scale=3.0)
    maps = torch.from_numpy(student), torch.from_numpy(teacher)
    by_channel = numpy_kl(student.reshape(2, 3, 20), teacher.reshape(2, 3, 20), 2, temperature) / (2 * 3)
    by_position = numpy_kl(student, teacher, 1, temperature) / (2 * 4 * 5)
    assert channel_kl(*maps, temperature=temperature).item() == pytest.approx(by_channel, rel=1e-12)
    assert spatial_kl(*maps, temperature=temperature).item() == pytest.approx(by_position, rel=1e-12)


def test_kl_stays_finite_where_the_softmax_of_the_student_is_0():
    # teacher (1/2, 1/2), student (e^-1000, 1): ½·(1000 − log 2) + ½·(0 − log 2)
    student, teacher = torch.tensor([0.0, 1000.0]), torch.zeros(2)
    expected = 500 - math.log(2)
    assert channel_kl(student.view(1, 1, 1, 2), teacher.view(1, 1, 1, 2)).item() == pytest.approx(expected)
    assert spatial_kl(student.view(1, 2, 1, 1), teacher.view(1, 2, 1, 1)).item() == pytest.approx(expected)


def test_values_do_not_grow_with_the_image():
    student, teacher = (torch.from_numpy(maps) for maps in drawn_maps((1, 3, 4, 4)))
    wide = [maps.repeat(1, 1, 2, 2) for maps in (student, teacher)]
    assert spatial_kl(*wide).item() == pytest.approx(spatial_kl(student, teacher).item())
    assert channel_kl(*wide).item() == pytest.approx(channel_kl(student, teacher).item())
    assert mean_squared_error(*wide).item() == pytest.approx(mean_squared_error(student, teacher).item())


@pytest.mark.parametrize("criterion", [*MAP_CRITERIA, mean_squared_error])
def test_shared_behaviour(criterion):
    student, teacher = (torch.from_numpy(maps).requires_grad_() for maps in drawn_maps((2, 3, 5, 6)))
    assert criterion(student, student.detach()).item() == pytest.approx(0, abs=1e-12)
    value = criterion(student, teacher)
    assert value.dtype == torch.float64
    assert value > 0.01
    value.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda maps: criterion(maps, teacher.detach()), (student,), fast_mode=True)


@pytest.mark.parametrize("criterion", [*MAP_CRITERIA, mean_squared_error])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(criterion, dtype):
    # differences near 1000: their squares overflow float16
    student, teacher = (torch.from_numpy(maps).to(dtype) for maps in drawn_maps((2, 3, 5, 6), scale=500.0))
    value = criterion(student, teacher)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert value == criterion(student.float(), teacher.float())


@pytest.mark.parametrize("criterion", [*MAP_CRITERIA, mean_squared_error])
def test_unequal_shapes_are_named(criterion):
    with pytest.raises(UserError, match=r"student's is \(1, 3, 4, 4\), the teacher's \(1, 1, 4, 4\)"):
        criterion(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4))  # torch would broadcast


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("criterion", [channel_kl, spatial_kl])
def test_temperature_must_be_positive(criterion, temperature):
    with pytest.raises(UserError, match="greater than 0; got"):
        criterion(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), temperature)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(UserError, match=r"'cosine'.*hierarchical_context, channel_kl, spatial_kl"):
        map_criterion("cosine")
