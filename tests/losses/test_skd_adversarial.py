import copy

import golden
import pytest
import torch
import torch.nn.functional as F
from drawn import redrawn

from transkd.errors import UserError
from transkd.losses.skd_adversarial import (
    LogitDiscriminator,
    SelfAttention,
    SKDAdversarialLoss,
    gradient_penalty,
    hinge_objective,
    student_objective,
    wasserstein_objective,
)
from transkd.outputs import SegmentationOutput

KINDS = ["hinge", "wgan"]


def output(logits):
    return SegmentationOutput(logits, (), (), torch.zeros(len(logits), 3, 4, 4))


def make_logits(batch=2, size=(64, 80), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, *size, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


def make_term(**settings):
    torch.manual_seed(0)
    return SKDAdversarialLoss(num_classes=3, width=4, **settings)


@pytest.mark.parametrize(
    ("variant", "objective", "of_teacher"),
    [
        ("adv_student_hinge", student_objective, False),
        ("adv_student_wgan", student_objective, False),
        ("adv_disc_hinge", hinge_objective, True),
        ("adv_disc_wgan", wasserstein_objective, True),
    ],
)
def test_golden(variant, objective, of_teacher):
    vectors = golden.load("skd")
    names = ["d_out_s", "d_out_t"] if of_teacher else ["d_out_s"]
    scores = [vectors[name].requires_grad_() for name in names]
    value = objective(*scores)
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{variant}"], rtol=1e-9, atol=0)
    for name, tensor in zip(names, scores, strict=True):
        torch.testing.assert_close(tensor.grad, vectors[f"expected.grad.{variant}.{name}"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_reaches_its_own_network_alone(kind):
    term = redrawn(make_term(kind=kind, discriminator_weight=30.0))
    mine, other = make_logits()

    # the discriminator, once with constant parameters and once with constant logits
    frozen, learning = copy.deepcopy(term.discriminator).requires_grad_(False), copy.deepcopy(term.discriminator)
    leaf = mine.detach().clone().requires_grad_()
    student_part = -frozen(torch.cat((leaf, other.detach())))[:2].mean()
    torch.manual_seed(1)
    penalty = 0
    if kind == "wgan":
        share = torch.rand(2, 1, 1, 1, dtype=torch.float64)
        mixed = (share * other + (1 - share) * mine).detach().requires_grad_()
        parameters = dict(learning.named_parameters())
        value = torch.func.functional_call(copy.deepcopy(learning), parameters, (mixed,)).mean((1, 2, 3)).sum()
        (gradient,) = torch.autograd.grad(value, mixed, create_graph=True)
        penalty = 10 * ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()
    scores = learning(torch.cat((mine, other)).detach())
    if kind == "hinge":
        discriminator_part = (1 - scores[2:]).clamp_min(0).mean() + (1 + scores[:2]).clamp_min(0).mean()
    else:
        discriminator_part = scores[:2].mean() - scores[2:].mean() + penalty
    student_part.backward()
    (30 * discriminator_part).backward()

    torch.manual_seed(1)
    value = term(output(mine), output(other))
    value.backward()
    torch.testing.assert_close(value, student_part + 30 * discriminator_part)
    torch.testing.assert_close(mine.grad, leaf.grad)
    assert mine.grad.abs().sum() > 0
    assert other.grad is None
    for (name, parameter), expected in zip(term.named_parameters(), learning.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    for (name, buffer), expected in zip(term.named_buffers(), learning.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)  # several passes, one update


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_the_buffers_and_needs_no_gradients(kind):
    term = make_term(kind=kind).eval()
    before = copy.deepcopy(term.state_dict())
    pair = [output(logits) for logits in make_logits(dtype=torch.float32)]
    torch.manual_seed(1)
    expected = term(*pair)
    with torch.no_grad():
        torch.manual_seed(1)
        value = term(*pair)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())
    for name, tensor in term.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_penalty_by_hand():
    """Half the squared length as the score, whose gradient is the point itself."""
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    pair = [logits.view(2, 2, 1, 1) for logits in (student, teacher)]
    share = torch.tensor([0.5, 0.25]).view(2, 1, 1, 1)
    value = gradient_penalty(lambda x: x.square().sum((1, 2, 3)).div(2)[:, None], *pair, share=share)
    assert value.item() == pytest.approx((1.5**2 + 1**2) / 2)  # lengths 2.5 and 2


def test_penalty_does_not_break_where_the_score_is_flat():
    slope = torch.zeros((), requires_grad=True)
    value = gradient_penalty(lambda x: slope * x.sum((2, 3)), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    value.backward()
    assert value == 1
    assert slope.grad.isfinite()


def test_discriminator_learns():
    term = make_term()
    mine, other = (logits.detach() for logits in make_logits(dtype=torch.float32))
    pair = output(mine + 0.3), output(2 * other)
    optimizer = torch.optim.Adam(term.parameters(), lr=3e-3)
    values = []
    for _ in range(25):
        value = term(*pair)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] == pytest.approx(200, rel=0.1)  # hinge of scores near 0, times 100
    assert values[-1] < 20


@pytest.mark.parametrize(("size", "places"), [((64, 64), (1, 1)), ((128, 96), (5, 3)), ((65, 79), (1, 1))])
def test_discriminator_places(size, places):
    assert LogitDiscriminator(3, width=2)(torch.zeros(2, 3, *size)).shape == (2, 1, *places)


def test_discriminator_parts():
    sizes = [tuple(p.shape) for name, p in LogitDiscriminator(19).named_parameters() if p.ndim == 4]
    convolutions = [size for size in sizes if size[-1] == 4]
    assert convolutions == [(64, 19, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    attention = [size[:2] for size in sizes if size[-1] == 1]
    assert attention == [(32, 256), (32, 256), (256, 256), (64, 512), (64, 512), (512, 512)]


def test_spectral_normalisation_makes_the_largest_singular_value_1():
    discriminator = LogitDiscriminator(3, width=2)
    for _ in range(200):
        discriminator(torch.randn(2, 3, 64, 64))
    for block in (discriminator.layers.block1, discriminator.layers.block4):
        assert torch.linalg.matrix_norm(block.conv.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


def test_attention():
    torch.manual_seed(0)
    layer, maps = SelfAttention(16), torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(layer(maps), maps)
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    query, key, value = (part(maps).flatten(2) for part in (layer.query, layer.key, layer.value))
    weights = torch.einsum("bci,bcj->bij", query, key).softmax(2)
    attended = torch.einsum("bij,bcj->bci", weights, value).reshape(maps.shape)
    torch.testing.assert_close(layer(maps), maps + 0.7 * attended)


def test_other_sizes():
    mine, other = make_logits(dtype=torch.float32)
    small = F.interpolate(mine, (20, 24), mode="bilinear", align_corners=False)
    enlarged = F.interpolate(small, other.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(make_term()(output(small), output(other)), make_term()(output(enlarged), output(other)))
    target = torch.zeros(2, 64, 80, dtype=torch.int64)
    value = make_term(grid="labels")(output(small), output(small), target)
    assert value.isfinite()
    with pytest.raises(UserError, match=r"logits of at least 64×64; got 20×24.*grid=labels"):
        make_term(grid="student")(output(small), output(other))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    pair = [output(logits) for logits in make_logits(dtype=torch.float32, batch=1)]
    results = []
    for enabled in (False, True):
        term = make_term(kind=kind)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(term(*pair))
    assert results[1].dtype == torch.float32
    assert results[0] == results[1]


def test_state_dict_and_copies():
    pair = [output(logits) for logits in make_logits(dtype=torch.float32)]
    term = make_term()
    torch.manual_seed(5)
    other = SKDAdversarialLoss(num_classes=3, width=4)
    assert copy.deepcopy(other)(*pair) != copy.deepcopy(term)(*pair)
    other.load_state_dict(term.state_dict(), strict=True)
    assert other(*pair) == term(*pair)


def test_errors():
    with pytest.raises(UserError, match=r"kind must be one of 'hinge', 'wgan'; got 'lsgan'"):
        make_term(kind="lsgan")
    for setting in ("discriminator_weight", "gradient_penalty"):
        with pytest.raises(UserError, match=f"{setting} must be a number greater than 0"):
            make_term(**{setting: 0.0})
    with pytest.raises(UserError, match="width must be an even number; got 3"):
        SKDAdversarialLoss(num_classes=3, width=3)
    with pytest.raises(UserError, match="num_classes must be a whole number of at least 2"):
        SKDAdversarialLoss(num_classes=1)
    with pytest.raises(UserError, match="grid must be one of"):
        make_term(grid="pixels")
    logits = torch.zeros(1, 4, 64, 64)
    with pytest.raises(UserError, match="built with num_classes=3, but the logits have 4"):
        make_term()(output(logits), output(logits))
    with pytest.raises(UserError, match="student has 4 classes, the teacher 5"):
        make_term()(output(logits), output(torch.zeros(1, 5, 64, 64)))
    with pytest.raises(UserError, match="logits of at least 64×64; got 63×64"):
        make_term()(output(logits[:, :3, :63]), output(logits[:, :3, :63]))
