import re

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transkd.errors import UserError
from transkd.models.encoders.lvt import ConvolutionalAttention, LiteVisionTransformer
from transkd.models.heads.segformer import SegformerHead

SMALL = {"channels": (8, 8, 20, 16), "depths": (1, 1, 1, 1), "heads": (2, 2, 5, 4)}
# The golden file names a stage's patch embedding backbone.{stage}.0 and its blocks backbone.{stage}.1.{block}.
PARTS = ("patch_embed", "block")
LAYERS = {
    "attn.attn": "attn.logits",
    "attn.weight": "attn.value",
    "attn.ds": "attn.atrous",
    "mlp.depconv": "mlp.dwconv",
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def our_name(name):
    stage, part, rest = re.fullmatch(r"(\d)\.([01])\.(.+)", name).groups()
    for theirs, ours in LAYERS.items():
        rest = rest.replace(f"{theirs}.", f"{ours}.")
    return f"{PARTS[int(part)]}{int(stage) + 1}.{rest}"


@pytest.fixture
def encoder():
    """The golden encoder in float64, in eval."""
    encoder = LiteVisionTransformer(**SMALL).double().eval()
    parameters = golden.load("lvt", "param.backbone.")
    encoder.load_state_dict({our_name(name): value for name, value in parameters.items()}, strict=True)
    return encoder


@pytest.fixture
def head():
    """The golden decode head in float64, in eval."""
    head = SegformerHead(SMALL["channels"], 12, 5).double().eval()
    parameters = {f"linear_{name}": value for name, value in golden.load("lvt", "param.linear_").items()}
    head.load_state_dict(parameters, strict=True)
    return head


def test_golden_features_embeddings_and_logits(encoder, head):
    features, embeddings = encoder.forward_stages(golden.load("lvt", "in.image")[""])
    close(features, golden.stages("lvt", "out.feature"))
    close(embeddings, golden.stages("lvt", "out.embedding"))
    close(head(features), golden.load("lvt", "out.logits")[""])


def test_published_size():
    encoder = LiteVisionTransformer()
    assert encoder.channels == (64, 64, 160, 256)
    head = SegformerHead(encoder.channels, 256, 20)
    count = sum(parameter.numel() for part in (encoder, head) for parameter in part.parameters())
    assert round(count / 1e6, 2) == 3.84


@pytest.mark.parametrize("size", [(64, 96), (45, 77), (32, 32), (33, 64)], ids=str)
def test_sizes_that_the_strides_do_not_divide(encoder, size):
    # A window of k with padding k // 2 and stride s: ceil(n / s) positions.
    features, embeddings = encoder.forward_stages(torch.rand(1, 3, *size).double())
    height, width = size
    for stage, (feature, tokens) in enumerate(zip(features, embeddings, strict=True)):
        stride = 2 if stage else 4
        height, width = -(-height // stride), -(-width // stride)
        assert feature.shape == (1, SMALL["channels"][stage], height, width)
        assert tokens.shape == (1, height * width, SMALL["channels"][stage])


def test_embeddings_are_those_before_the_norm(encoder):
    image = torch.rand(1, 3, 45, 77).double()
    features, embeddings = encoder.forward_stages(image)
    for i, (source, tokens) in enumerate(zip((image, *features), embeddings, strict=False), start=1):
        embed = encoder.get_submodule(f"patch_embed{i}")
        close(embed.norm(tokens), embed(source)[0])


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3), (1, 1)], ids=str)
def test_convolutional_attention_window_by_window(size):
    torch.manual_seed(0)
    heads, depth = 2, 3
    attn, x = ConvolutionalAttention(heads * depth, heads).double(), torch.rand(1, *size, heads * depth).double()
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    summed = torch.zeros_like(padded)
    matrices = attn.value.weight.view(9, heads * depth, heads * depth)
    for row in range(0, size[0], 2):
        for column in range(0, size[1], 2):
            mean = x[0, row : row + 2, column : column + 2].mean((0, 1))  # of what lies inside the map
            weights = (attn.logits(mean).view(heads, 9, 9) / depth**0.5).softmax(2)
            pixels = padded[0, row : row + 3, column : column + 3].reshape(9, -1)
            values = torch.stack([matrix @ pixel for matrix, pixel in zip(matrices, pixels, strict=True)])
            attended = torch.cat([weights[h] @ values[:, h * depth : (h + 1) * depth] for h in range(heads)], dim=1)
            summed[0, row : row + 3, column : column + 3] += attended.view(3, 3, -1)
    close(attn(x), attn.proj(summed[:, 1:-1, 1:-1]))


def test_samples_do_not_mix(encoder):
    images = torch.rand(2, 3, 64, 96).double()
    together = encoder.train().forward_stages(images)  # there is no BatchNorm: true of training as well
    alone = [encoder.forward_stages(image[None]) for image in images]
    for kind in (0, 1):
        for stage in range(4):
            close(together[kind][stage], torch.cat([sample[kind][stage] for sample in alone]))


def test_the_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    encoder = LiteVisionTransformer(**{**SMALL, "depths": (2, 2, 2, 2)})
    features, _ = encoder.forward_stages(torch.rand(1, 3, 64, 96))
    features[-1].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_bfloat16_autocast(encoder):
    encoder, image = encoder.float().train(), torch.rand(1, 3, 45, 77)
    exact, _ = encoder.forward_stages(image)
    with torch.autocast("cpu", torch.bfloat16):
        features, embeddings = encoder.forward_stages(image)
    for rounded, feature in zip(features, exact, strict=True):
        assert (rounded.float() - feature).norm() < 0.1 * feature.norm()
    sum(tensor.float().square().sum() for tensor in (*features, *embeddings)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)], ids=str)
def test_an_image_too_small_is_named(encoder, size):
    with pytest.raises(UserError, match=f"LVT needs an image of at least 32×32 pixels, got {size[0]}×{size[1]}"):
        encoder.forward_stages(torch.zeros(1, 3, *size).double())


def test_stochastic_depth_rises_linearly():
    encoder = LiteVisionTransformer(**{**SMALL, "depths": (1, 2, 1, 1)}, drop_path_rate=0.2)
    rates = [b.drop_path.drop_prob for i in range(1, 5) for b in encoder.get_submodule(f"block{i}").children()]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_initialisation():
    torch.manual_seed(0)
    encoder = LiteVisionTransformer()
    layers = dict(encoder.named_modules())
    expected = {  # by hand: sqrt(2 / (k · k · out / groups)) for convolutions, 0.02 for linear layers
        "patch_embed1.proj": (2 / (7 * 7 * 64)) ** 0.5,
        "block1.0.attn.logits": 0.02,
        "block1.0.attn.value": (2 / 64) ** 0.5,
        "block1.1.mlp.fc1": 0.02,
        "block2.0.attn.sr": (2 / (4 * 4 * 64)) ** 0.5,
        "block3.0.mlp.fc1": (2 / 640) ** 0.5,
        "block3.1.mlp.dwconv": (2 / 9) ** 0.5,
        "block4.0.attn.atrous": (2 / 9) ** 0.5,
        "block4.0.attn.kv": 0.02,
    }
    for name, deviation in expected.items():
        assert layers[name].weight.std().item() == pytest.approx(deviation, rel=0.06), name
        assert layers[name].bias is None or not layers[name].bias.any(), name
    for layer in layers.values():
        if isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all()
            assert not layer.bias.any()
            assert layer.eps == 1e-5  # unlike in MiT, everywhere: the golden vectors tell 1e-6 from it
