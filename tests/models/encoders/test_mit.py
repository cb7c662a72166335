import golden
import pytest
import timm
import torch
from torch import nn

from transkd.errors import UserError
from transkd.models import MixTransformer
from transkd.models.encoders import mit

IMAGE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
B0 = {"channels": (32, 64, 160, 256), "grids": ((16, 24), (8, 12), (4, 6), (2, 3))}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_golden_features_and_embeddings(golden_network, golden_name):
    features, embeddings = golden_network.encoder.forward_stages(golden.load(golden_name, "in.image")[""])
    close(features, golden.stages(golden_name, "out.feature"))
    close(embeddings, golden.stages(golden_name, "out.embedding"))


@pytest.mark.parametrize("size", [(45, 77), (32, 32), (33, 64)])
def test_sizes_that_the_strides_do_not_divide(golden_network, size):
    # A window of k with padding k // 2 and stride s: ceil(n / s) positions.
    features, embeddings = golden_network.encoder.forward_stages(torch.rand(1, 3, *size).double())
    height, width = size
    for stage, (feature, tokens) in enumerate(zip(features, embeddings, strict=True)):
        stride = 2 if stage else 4
        height, width = -(-height // stride), -(-width // stride)
        assert feature.shape[-2:] == (height, width)
        assert tokens.shape[1] == height * width


def test_samples_do_not_mix(golden_network):
    images = torch.rand(2, 3, 64, 96).double()
    together = golden_network.encoder.forward_stages(images)[0][-1]
    alone = torch.cat([golden_network.encoder.forward_stages(image[None])[0][-1] for image in images])
    close(together, alone)


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)])
def test_an_image_too_small_is_named(golden_network, size):
    with pytest.raises(UserError, match=f"at least 32×32 pixels, got {size[0]}×{size[1]}"):
        golden_network.encoder.forward_stages(torch.zeros(1, 3, *size).double())


def test_stochastic_depth_rises_linearly():
    encoder = MixTransformer(channels=(8,) * 4, depths=(1, 2, 1, 1), heads=(1,) * 4, drop_path_rate=0.2)
    rates = [b.drop_path.drop_prob for i in range(1, 5) for b in encoder.get_submodule(f"block{i}").children()]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_initialisation():
    torch.manual_seed(0)
    encoder = timm.create_model("mit_b0", num_classes=10)
    layers = dict(encoder.named_modules())
    expected = {  # by hand: sqrt(2 / (k · k · out / groups)) for convolutions, 0.02 for linear layers
        "patch_embed1.proj": (2 / (7 * 7 * 32)) ** 0.5,
        "patch_embed4.proj": (2 / (3 * 3 * 256)) ** 0.5,
        "block1.0.attn.sr": (2 / (8 * 8 * 32)) ** 0.5,
        "block4.1.mlp.dwconv.dwconv": (2 / 9) ** 0.5,
        "block4.0.attn.kv": 0.02,
        "block3.1.mlp.fc1": 0.02,
        "head": 0.02,
    }
    for name, deviation in expected.items():
        assert layers[name].weight.std().item() == pytest.approx(deviation, rel=0.06), name
        assert not layers[name].bias.any(), name
    for layer in layers.values():
        if isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all()
            assert not layer.bias.any()


def test_normalisation_constants():
    # spec, section 1: 1e-6 in blocks and after stages, 1e-5 in patch embeddings and key/value reductions
    encoder = timm.create_model("mit_b0", num_classes=0)
    for name, layer in encoder.named_modules():
        if isinstance(layer, nn.LayerNorm):
            expected = 1e-5 if name.startswith("patch_embed") or name.endswith("attn.norm") else 1e-6
            assert layer.eps == expected, name


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_and_maps_are_views_that_convolutions_take_as_channels_last(batch):
    tokens = torch.rand(batch, 6, 5)
    shown = mit.to_map(tokens, (2, 3))
    assert shown.data_ptr() == tokens.data_ptr()
    assert torch.equal(shown[:, :, 1, 2], tokens[:, 5])
    depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5)
    for maps in (shown, depthwise(shown)):
        assert maps.stride() == (30, 1, 15, 5)
    assert torch.equal(mit.to_tokens(shown), tokens)


def test_timm_features():
    encoder = timm.create_model("mit_b0", features_only=True).eval()
    assert encoder.feature_info.channels() == list(B0["channels"])
    assert encoder.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [tuple(feature.shape) for feature in encoder(IMAGE)]
    assert shapes == [(1, c, *grid) for c, grid in zip(B0["channels"], B0["grids"], strict=True)]


def test_timm_out_indices_prune():
    whole = timm.create_model("mit_b0", num_classes=0).eval()
    part = timm.create_model("mit_b0", features_only=True, out_indices=(0, 2)).eval()
    names = [name for name, _ in part.named_parameters()]
    assert any("block3" in name for name in names)
    assert not any("block4" in name or "patch_embed4" in name or "head" in name for name in names)
    part.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.model.state_dict()})
    features, _ = whole.forward_stages(IMAGE)
    close(part(IMAGE), [features[0], features[2]])
    assert part.feature_info.channels() == [32, 160]


def test_timm_intermediates():
    encoder = timm.create_model("mit_b0", num_classes=0).eval()
    features, _ = encoder.forward_stages(IMAGE)
    last, chosen = encoder.forward_intermediates(IMAGE, indices=[1, 3])
    close((last, *chosen), (features[3], features[1], features[3]))
    deepest = []
    encoder.block3.register_forward_hook(lambda *_: deepest.append(3))
    encoder.patch_embed3.register_forward_hook(lambda *_: deepest.append(3))
    close(encoder.forward_intermediates(IMAGE, indices=[1], stop_early=True, intermediates_only=True), [features[1]])
    assert not deepest
    with pytest.raises(UserError, match="output_fmt='NLC'"):
        encoder.forward_intermediates(IMAGE, output_fmt="NLC")


def test_timm_classifier():
    encoder = timm.create_model("mit_b0", num_classes=7).eval()
    pooled = encoder.forward_stages(IMAGE)[0][-1].mean((2, 3))
    close(encoder(IMAGE), pooled @ encoder.head.weight.T + encoder.head.bias)
    close(encoder.forward_head(encoder.forward_features(IMAGE), pre_logits=True), pooled)
    assert encoder.get_classifier() is encoder.head
    encoder.reset_classifier(0)
    close(encoder(IMAGE), pooled)
    assert timm.create_model("mit_b0").num_classes == 1000


def test_no_weights_are_hosted():
    with pytest.raises(UserError, match=r"no weights for mit_b0: give a file with weights=PATH"):
        timm.create_model("mit_b0", pretrained=True)
