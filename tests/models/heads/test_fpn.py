import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transkd.models import SemanticFPNHead

CHANNELS = (8, 16, 24, 32)


def drawn(head, features, groups):
    """Panoptic FPN's figure 3 in plain functions on the head's parameters."""
    values = dict(head.named_parameters())
    stages = range(len(features))

    def convolve(name, x):
        weight = values[f"{name}.weight"]
        return F.conv2d(x, weight, values.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    merged, level = [], None
    for i in reversed(stages):
        lateral = convolve(f"pyramid.inner_blocks.{i}.0", features[i])
        level = lateral if level is None else lateral + F.interpolate(level, size=lateral.shape[-2:], mode="nearest")
        merged.insert(0, convolve(f"pyramid.layer_blocks.{i}.0", level))

    total = 0
    for i in stages:
        x = merged[i]
        for step in range(max(i, 1)):
            name = f"branches.{i}.{step}"
            x = convolve(f"{name}.0", x)
            x = F.relu(F.group_norm(x, groups, values[f"{name}.1.weight"], values[f"{name}.1.bias"]))
            if i:
                grid = features[i - step - 1].shape[-2:]
                x = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
        total = total + x
    return convolve("classifier", total)


def make(channels=CHANNELS, width=64, num_classes=5, dropout=0.0):
    torch.manual_seed(0)
    head = SemanticFPNHead(channels, width, num_classes, dropout).double()
    for parameter in head.parameters():  # nothing stays 0 or 1
        nn.init.normal_(parameter, std=0.2)
    return head


def make_features(size, channels=CHANNELS, strides=(4, 8, 16, 32), batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, c, *(-(-side // stride) for side in size)) for c, stride in zip(channels, strides, strict=False)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def check_against_the_drawing(head, features, groups):
    inputs = dict(head.named_parameters()) | {f"feature {i}": feature for i, feature in enumerate(features)}
    outcomes = []
    for logits in (head(features), drawn(head, features, groups)):
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        outcomes.append((logits, *torch.autograd.grad((logits * weights).sum(), list(inputs.values()))))
    for name, ours, expected in zip(["logits", *inputs], *outcomes, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert expected.abs().max() > 1e-3, name


@pytest.mark.parametrize("size", [(64, 96), (45, 77), (32, 32)], ids=str)
@pytest.mark.parametrize("channels", [CHANNELS, (8, 24, 16), (8, 16), (8,)], ids=str)
def test_is_the_drawing_in_value_and_every_gradient(channels, size):
    head = make(channels, width=128)  # two channels a group: one of a map of one pixel would normalise to nothing
    check_against_the_drawing(head, make_features(size, channels), groups=32)


@pytest.mark.parametrize(("width", "groups"), [(64, 32), (32, 16), (24, 4), (48, 8), (10, 1), (3, 1), (192, 32)])
def test_groups_are_the_most_that_divide_half_the_width(width, groups):
    head = make(width=width)
    assert {m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)} == {groups}
    features = make_features((64, 96))
    torch.testing.assert_close(head(features), drawn(head, features, groups), rtol=1e-9, atol=1e-9)


def test_stages_of_an_atrous_encoder():
    check_against_the_drawing(make(), make_features((64, 96), strides=(4, 8, 16, 16)), groups=32)


def test_two_tiny_stages_by_hand():
    head = SemanticFPNHead((1, 1), 2, 1).double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        for i in (0, 1):
            head.pyramid.inner_blocks[i][0].weight[0, 0] = 1  # the first of two channels carries the value
            head.pyramid.layer_blocks[i][0].weight[0, 0, 1, 1] = 1  # the middle of the window
            head.branches[i][0][0].weight[0, 0, 1, 1] = 1
            head.branches[i][0][1].weight.fill_(1)
        head.branches[1][0][1].bias.fill_(4)
        head.classifier.weight.fill_(2)
        head.classifier.bias.fill_(0.5)
    shallow = torch.tensor([[[0.0, 2.0], [4.0, 6.0]], [[1.0, 1.0], [1.0, 1.0]]]).double()[:, None]
    deep = torch.tensor([7.0, -7.0]).double().view(2, 1, 1, 1)
    # Of the first image level 1 is shallow + 7 with mean 10 and variance 5; normalised and rectified: 0, 0, 1/√5, 3/√5.
    # What is constant normalises to 0: the second image's level 1 and every level 2, to which the bias 4 is added.
    root = (5 + 1e-5) ** 0.5
    expected = torch.full((2, 1, 2, 2), 2 * 4 + 0.5).double()
    expected[0, 0, 1] += torch.tensor([2 * 1 / root, 2 * 3 / root], dtype=torch.float64)
    torch.testing.assert_close(head((shallow, deep)), expected, rtol=1e-12, atol=1e-12)


def test_size_with_150_classes():
    with torch.device("meta"):
        head = SemanticFPNHead((64, 128, 320, 512), 256, 150)
    lateral = (64 + 128 + 320 + 512) * 256 + 4 * 256
    pyramid = 4 * (256 * 256 * 9 + 256)
    branches = 4 * 256 * 128 * 9 + (0 + 0 + 1 + 2) * 128 * 128 * 9 + (1 + 1 + 2 + 3) * 2 * 128
    classifier = 128 * 150 + 150
    assert sum(p.numel() for p in head.parameters()) == lateral + pyramid + branches + classifier


def test_samples_do_not_mix():
    head, features = make().train(), make_features((64, 96))  # GroupNorm: true of training as well
    alone = torch.cat([head([feature[i : i + 1] for feature in features]) for i in range(2)])
    torch.testing.assert_close(head(features), alone, rtol=1e-9, atol=1e-9)


def test_channel_dropout_zeroes_whole_channels_in_training_alone():
    head, seen = make(width=256, dropout=0.5), []
    head.classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for mode in (True, False):
        head.train(mode)(make_features((64, 96)))
    dropped, whole = ((maps.abs().amax((2, 3)) == 0).double().mean().item() for maps in seen)
    assert 0.3 < dropped < 0.7
    assert whole == 0


def test_bfloat16_autocast():
    head = make().float()
    features = [feature.detach().float() for feature in make_features((45, 77))]
    exact = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(features)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
