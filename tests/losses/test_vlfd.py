import copy
import logging
import math

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import STUDENT, TEACHER, make_output, make_pair
from safetensors.torch import save_file

from transkd.errors import UserError
from transkd.losses import Criterion
from transkd.losses.shared.relations import direct_error
from transkd.losses.vlfd import VLFDLoss, _centred, graph_error, load_attention_pool, mean_kl
from transkd.outputs import SegmentationOutput

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}
ALIKE = {"student_channels": (12,), "teacher_channels": (12,), "stage": 1}


def output(feature):
    return SegmentationOutput(None, (feature,), (), torch.zeros(len(feature), 3, 4, 4))


def maps(rows, width):
    """One image [1, C, 1, width] of the given channels of each position."""
    return torch.tensor(rows).T.view(1, -1, 1, width)


def pool_weights(channels=TEACHER[3], grid=3, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = {f"{name}_proj.weight": (channels, channels) for name in "qkv"} | {"c_proj.weight": (width, channels)}
    shapes |= {f"{name}_proj.bias": (channels,) for name in "qkv"} | {"c_proj.bias": (width,)}
    shapes |= {"positional_embedding": (grid**2 + 1, channels)}
    return {name: torch.randn(shape, generator=generator).to(dtype) / channels**0.5 for name, shape in shapes.items()}


@pytest.fixture
def pool_file(tmp_path):
    """A CLIP ResNet's names, with what else such a file holds."""
    tensors = {f"visual.attnpool.{name}": tensor for name, tensor in pool_weights().items()}
    tensors |= {"positional_embedding": torch.zeros(7, 4), "visual.conv1.weight": torch.zeros(2, 3, 3, 3)}
    tensors |= {"logit_scale": torch.tensor(1.0), "transformer.resblocks.0.mlp.c_proj.weight": torch.zeros(4, 16)}
    save_file(tensors, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


@pytest.fixture
def golden_pool(tmp_path):
    torch.save({"state_dict": golden.load("vlfd", "param.pool.")}, tmp_path / "pool.pt")
    return tmp_path / "pool.pt"


def golden_maps():
    vectors = golden.load("vlfd")
    return vectors["feat_s"].requires_grad_(), vectors["feat_t"].requires_grad_()


def check(value, student, variant):
    torch.testing.assert_close(value, golden.load("vlfd", f"expected.loss.{variant}")[""], rtol=1e-9, atol=0)
    student.grad = None
    value.backward()
    expected = golden.load("vlfd", f"expected.grad.{variant}.feat_s")[""]
    torch.testing.assert_close(student.grad, expected, rtol=1e-8, atol=1e-12)


def test_golden_global():
    student, teacher = golden_maps()
    check(mean_kl(student, teacher), student, "global")


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_golden_graph(scope):
    student, teacher = golden_maps()
    check(graph_error(student, teacher, scope), student, f"graph_{scope}")
    assert teacher.grad is None


def test_golden_graph_with_the_matrix_of_all_pairs():
    student, teacher = golden_maps()
    rows = [_centred(m).flatten(0, 1)[None] for m in (student, teacher.detach())]
    check(direct_error(*rows) / 11**2, student, "graph_batch")


@pytest.mark.parametrize("branch", ["pool", "mean_proj"])
def test_golden_language(golden_pool, branch):
    student, teacher = golden_maps()
    term = VLFDLoss(**ALIKE, global_weight=0, graph_weight=0, language_weight=1, language=golden_pool,
                    pool_heads=4, student_branch=branch).double()  # fmt: skip
    assert [name for name, _ in term.named_parameters()] == ["lang_proj.weight"] * (branch == "mean_proj")
    for parameter in term.parameters():
        parameter.data = golden.load("vlfd", "param.lang_proj.weight")[""]
    check(term(output(student), output(teacher)), student, f"language_{branch}")
    assert teacher.grad is None
    for parameter in term.parameters():
        expected = golden.load("vlfd", "expected.grad.language_mean_proj.param.lang_proj.weight")[""]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-12)


def test_golden_pool(golden_pool):
    pool = load_attention_pool(golden_pool, heads=4, channels=12)
    for who, feature in zip("st", golden_maps(), strict=True):
        expected = golden.load("vlfd", f"expected.pooled_{who}")[""]
        torch.testing.assert_close(pool(feature), expected, rtol=1e-9, atol=1e-12)


def test_golden_total(golden_pool):
    student, teacher = golden_maps()
    term = VLFDLoss(**ALIKE, language=golden_pool, pool_heads=4)
    check(term(output(student), output(teacher)), student, "total_0.1_0.1_0.5")
    assert not list(term.parameters())


def test_global_by_hand():
    student, teacher = maps([[0.0, math.log(3)]], 1), maps([[5.0, 5.0]], 1)  # 1/4, 3/4 and 1/2, 1/2
    torch.testing.assert_close(mean_kl(student, teacher).item(), math.log(4 / 3) / 2 / 2)


def test_graph_by_hand():
    student, teacher = maps([[2.0, 0.0], [0.0, 3.0]], 2), maps([[1.0, 0.0], [1.0, 0.0]], 2)
    # centred (1/2, -1/2) and its opposite, against the same twice: products of different positions differ by 1
    torch.testing.assert_close(graph_error(student, teacher).item(), 0.5)


def test_scope():
    """Of two images with one position each, only the batch has a relation between different ones."""
    student, teacher = (
        torch.tensor(rows).view(2, 2, 1, 1) for rows in ([[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 0.0]])
    )
    torch.testing.assert_close(graph_error(student, teacher, "batch").item(), 0.5)
    torch.testing.assert_close(graph_error(student, teacher, "image").item(), 0.0)


def test_parts_are_weighed_and_added():
    student, teacher, _ = make_pair(dtype=torch.float64)
    values = []
    for weights in ((1, 0), (0, 1), (0.1, 0.1), (3, 0.5)):
        torch.manual_seed(0)
        term = VLFDLoss(**CHANNELS, global_weight=weights[0], graph_weight=weights[1]).double()
        values.append(term(student, teacher))
    torch.testing.assert_close(values[2], 0.1 * values[0] + 0.1 * values[1])
    torch.testing.assert_close(values[3], 3 * values[0] + 0.5 * values[1])


def test_the_teachers_features_give_nothing_to_learn(pool_file):
    same = make_output(TEACHER)
    term = VLFDLoss(TEACHER, TEACHER, language=pool_file, pool_heads=4)
    value = term(same, make_output(TEACHER))
    value.backward()
    assert value.abs() < 1e-7
    assert same.features[3].grad.abs().max() < 1e-6


@pytest.mark.parametrize("grid", ["teacher", "student", (5, 3)])
def test_grid(grid):
    student, teacher = make_output(TEACHER, seed=1), make_output(TEACHER, size=(128, 192), seed=2)
    size = {"teacher": (4, 6), "student": (2, 3)}.get(grid, grid)
    resized = [F.interpolate(o.features[3], size, mode="bilinear", align_corners=False) for o in (student, teacher)]
    expected = 0.1 * mean_kl(*resized) + 0.1 * graph_error(*resized)
    torch.testing.assert_close(VLFDLoss(TEACHER, TEACHER, grid=grid)(student, teacher), expected)


def test_positions_without_features_relate_to_none():
    student, teacher, _ = make_pair()
    feature = student.features[3].detach().clone()
    feature[0, :, 0, 0] = 0
    feature.requires_grad_()
    value = VLFDLoss(**CHANNELS)(student._replace(features=(*student.features[:3], feature)), teacher)
    value.backward()
    assert value.isfinite()
    assert feature.grad.isfinite().all()
    assert feature.grad.abs().max() < 1


def test_large_maps_need_no_matrix_of_all_pairs():
    student = torch.randn(2, 4, 256, 256).requires_grad_()  # its relations would be 64 GB
    VLFDLoss((4,), (4,), stage=1)(output(student), output(torch.randn(2, 4, 256, 256))).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("branch", ["pool", "mean_proj"])
def test_language_part(pool_file, branch, caplog):
    """The gradient goes through the pool to student and projections; the pool is no parameter, but in the state."""
    student, teacher, _ = make_pair(batch=1)
    with caplog.at_level(logging.WARNING, "transkd"):
        term = VLFDLoss(**CHANNELS, language=pool_file, pool_heads=4, student_branch=branch)
    assert not caplog.messages
    before = copy.deepcopy(term.pool.state_dict())
    value = Criterion({"vlfd": {"term": term, "weight": 1.0}})(student, teacher).total
    value.backward()
    names = {"visual_proj.weight", "lang_proj.weight"} if branch == "mean_proj" else {"visual_proj.weight"}
    assert {name for name, _ in term.named_parameters()} == names
    assert all(parameter.grad.abs().sum() > 0 for parameter in term.parameters())
    assert student.features[3].grad.abs().sum() > 0
    assert not any(buffer.requires_grad for buffer in term.pool.buffers())
    assert all(torch.equal(before[name], tensor) for name, tensor in term.pool.state_dict().items())
    without = VLFDLoss(**CHANNELS)
    without.load_state_dict({"visual_proj.weight": term.visual_proj.weight})
    assert without(student, teacher) != value


def test_the_mean_alone_needs_no_projection_of_the_map(pool_file):
    term = VLFDLoss(**CHANNELS, global_weight=0, graph_weight=0, language=pool_file, pool_heads=4,
                    student_branch="mean_proj")  # fmt: skip
    assert [name for name, _ in term.named_parameters()] == ["lang_proj.weight"]
    student, teacher, _ = make_pair()
    assert term(student, teacher).isfinite()


def test_state_with_a_pool(pool_file, tmp_path):
    """A checkpoint brings the pool that it was trained with."""
    pair = make_pair()
    term = VLFDLoss(**CHANNELS, language=pool_file, pool_heads=4)
    save_file({name: tensor + 1 for name, tensor in pool_weights().items()}, tmp_path / "other.safetensors")
    other = VLFDLoss(**CHANNELS, language=tmp_path / "other.safetensors", pool_heads=4)
    assert other(*pair) != term(*pair)
    other.load_state_dict(term.state_dict(), strict=True)
    assert other(*pair) == term(*pair)


def test_a_pool_in_half_precision_is_widened(tmp_path):
    save_file(pool_weights(dtype=torch.float16), tmp_path / "half.safetensors")
    term = VLFDLoss(**CHANNELS, language=tmp_path / "half.safetensors", pool_heads=4)
    assert {buffer.dtype for buffer in term.buffers()} == {torch.float32}
    student, teacher, _ = make_pair()
    expected = term(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert term(student, teacher) == expected
    assert expected.dtype == torch.float32


def test_modules_in_half_precision():
    student, teacher, _ = make_pair()
    halves = [o._replace(features=tuple(f.bfloat16() for f in o.features)) for o in (student, teacher)]
    value = VLFDLoss(**CHANNELS).bfloat16()(*halves)
    assert value.dtype == torch.float32
    assert value.isfinite()


def test_without_a_pool_it_says_once_that_it_is_not_all(caplog):
    with caplog.at_level(logging.WARNING, "transkd"):
        term = VLFDLoss(**CHANNELS)
        for _ in range(2):
            term(*make_pair())
    assert len(caplog.messages) == 1
    assert "not the complete VLFD" in caplog.messages[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 5}, "stage must be from 1 to 4; got 5"),
        ({"stage": 0}, "stage must be from 1 to 4; got 0"),
        ({"scope": "world"}, "scope must be one of 'batch', 'image'; got 'world'"),
        ({"grid": "labels"}, "VLFDLoss: grid must be one of 'teacher', 'student'; got 'labels'"),
        ({"grid": (0, 3)}, r"grid must be 'teacher' or 'student', or a height and a width.*got \[0, 3\]"),
        ({"grid": (3,)}, r"got \[3\]"),
        ({"student_branch": "both"}, "student_branch must be one of 'pool', 'mean_proj'"),
        ({"graph_weight": -1.0}, "graph_weight must be a number of at least 0; got -1.0"),
        ({"global_weight": math.nan}, "global_weight must be a number of at least 0; got nan"),
        ({"global_weight": 0, "graph_weight": 0}, "no part to compute.*language=PATH"),
        ({"teacher_channels": (12, 20, 28, 1)}, "channels − 1, and the teacher has one channel: set graph_weight=0"),
        ({"teacher_channels": (12, 20)}, "same number of stages"),
        ({"language": "nowhere.pt"}, "weights file not found: nowhere.pt"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        VLFDLoss(**{**CHANNELS, **settings})
    assert "\n" not in str(caught.value)


def changed(**tensors):
    return {**pool_weights(), **tensors}


@pytest.mark.parametrize(
    ("tensors", "heads", "message"),
    [
        ({"a.weight": torch.zeros(1)}, 4, "must hold one attention pool .*found 0"),
        ({f"{side}.{k}": v for side in "ab" for k, v in pool_weights().items()}, 4, "found 2"),
        (pool_weights(channels=8), 4, "reads 8 channels, the teacher's stage has 40"),
        (pool_weights(), 7, "pool_heads must divide the pool's 40 channels; got 7"),
        (changed(positional_embedding=torch.zeros(8, 40)), 4, "1 . g² rows, for a square grid; it has 8 rows"),
        (changed(positional_embedding=torch.zeros(1, 40)), 4, "it has 1 rows"),
    ],
    ids=["none", "two", "width", "heads", "not square", "no grid"],
)
def test_bad_pools(tmp_path, tensors, heads, message):
    save_file(tensors, tmp_path / "pool.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        VLFDLoss(**CHANNELS, language=tmp_path / "pool.safetensors", pool_heads=heads)
    assert "\n" not in str(caught.value)


def test_other_networks_than_it_was_built_for():
    student, teacher, _ = make_pair()
    with pytest.raises(UserError, match="was built with teacher_channels"):
        VLFDLoss(STUDENT, STUDENT)(student, teacher)
    for grid in ("teacher", (4, 4)):
        with pytest.raises(UserError, match="2 images from the student and 3 from the teacher"):
            VLFDLoss(**CHANNELS, grid=grid)(student, make_output(TEACHER, batch=3))
