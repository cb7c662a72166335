import golden
import pytest
import torch
import torch.nn.functional as F

from transkd.models import SegformerHead

CHANNELS = (8, 16, 24, 32)


def drawn(head, features):
    """The head as the paper draws it: linear, upsample, concatenate deepest first, 1×1 convolution, BatchNorm, ReLU."""
    size = features[0].shape[-2:]
    mapped = []
    for stage, feature in enumerate(features, start=1):
        tokens = head.get_submodule(f"linear_c{stage}").proj(feature.flatten(2).transpose(1, 2))
        as_map = tokens.transpose(1, 2).unflatten(2, feature.shape[-2:])
        mapped.append(F.interpolate(as_map, size=size, mode="bilinear", align_corners=False))
    fused = head.linear_fuse.bn(head.linear_fuse.conv(torch.cat(mapped[::-1], dim=1)))
    return head.linear_pred(head.dropout(F.relu(fused)))


def make_features(size, channels=CHANNELS, batch=2):
    generator = torch.Generator().manual_seed(1)
    grids = [[-(-side // (4 * 2**i)) for side in size] for i in range(len(channels))]
    shapes = [(batch, c, *grid) for c, grid in zip(channels, grids, strict=True)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def test_golden_logits(golden_network, golden_name):
    logits = golden_network.head(golden.stages(golden_name, "out.feature"))
    torch.testing.assert_close(logits, golden.load(golden_name, "out.logits")[""], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(64, 96), (45, 77)], ids=str)
@pytest.mark.parametrize("channels", [CHANNELS, (8, 24, 16)], ids=str)
def test_folded_is_drawn_in_value_and_every_gradient(size, channels, training):
    torch.manual_seed(0)
    head = SegformerHead(channels, width=16, num_classes=5, dropout=0.0).double().train(training)
    for parameter in head.parameters():  # nothing stays 0 or 1: biases must count too
        torch.nn.init.normal_(parameter, std=0.5)
    features = make_features(size, channels)
    inputs = dict(head.named_parameters()) | {f"feature {i}": feature for i, feature in enumerate(features, start=1)}
    statistics = head.linear_fuse.bn
    outcomes = []
    for compute in (head, lambda features: drawn(head, features)):
        statistics.reset_running_stats()
        logits = compute(features)
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        gradients = torch.autograd.grad((logits * weights).sum(), list(inputs.values()))
        outcomes.append((logits, statistics.running_mean.clone(), statistics.running_var.clone(), *gradients))
    for name, folded, expected in zip(["logits", "mean", "variance", *inputs], *outcomes, strict=True):
        torch.testing.assert_close(
            folded, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
        if not training and name != "mean":  # in training the BatchNorm takes the biases' gradients away
            assert expected.abs().max() > 1e-3, name


def test_channel_dropout_zeroes_whole_channels_in_training_alone():
    torch.manual_seed(0)
    head = SegformerHead(CHANNELS, width=64, num_classes=2, dropout=0.5).double()
    seen = []
    head.linear_pred.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for mode in (True, False):
        head.train(mode)(make_features((64, 96)))
    dropped, whole = ((maps.abs().amax((2, 3)) == 0).double().mean().item() for maps in seen)
    assert 0.3 < dropped < 0.7
    assert whole == 0
