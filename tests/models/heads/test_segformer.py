import copy

import golden
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from transkd.models import SegformerHead
from transkd.models.heads.segformer import FusedSegformerHead

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


# Fused: for inference, with BatchNorm folded in.


@pytest.fixture
def trained():
    """A head in float64 that is no fresh one: its statistics moved in training, nothing is 0 or 1."""
    torch.manual_seed(0)
    head = SegformerHead(CHANNELS, width=16, num_classes=5).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for _ in range(3):
        head([torch.randn_like(feature) * 2 + 1 for feature in make_features((64, 96))])
    return head


@pytest.mark.parametrize("size", [(64, 96), (45, 77), (32, 32)], ids=str)
def test_fused_has_the_logits_of_the_drawing(trained, size):
    statistics = trained.linear_fuse.bn
    assert statistics.num_batches_tracked == 3
    assert (statistics.running_mean.abs() > 1e-3).all()
    fused, features = trained.fuse(), make_features(size)
    expected = drawn(trained.eval(), features)
    torch.testing.assert_close(fused(features), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused(features), trained(features), rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 0.1


def test_golden_fused_logits(golden_network, golden_name):
    logits = golden_network.head.fuse()(golden.stages(golden_name, "out.feature"))
    torch.testing.assert_close(logits, golden.load(golden_name, "out.logits")[""], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_fusing_reads_the_batch_norms_own_epsilon(trained, epsilon):
    trained.eval().linear_fuse.bn.eps = epsilon
    features = make_features((32, 32))
    torch.testing.assert_close(trained.fuse()(features), trained(features), rtol=1e-9, atol=1e-9)


def test_fusing_changes_nothing_and_shares_nothing(trained):
    before = copy.deepcopy(trained.state_dict())
    fused = trained.fuse()
    assert trained.training
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_fused_is_plain_parameters_in_eval(trained):
    fused = trained.fuse()
    assert isinstance(fused, FusedSegformerHead)
    assert not fused.training
    assert all(parameter.is_leaf for parameter in fused.parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in fused.state_dict().items()}
    maps = {f"maps.{i}.weight": (16, channels, 1, 1) for i, channels in enumerate(CHANNELS)}
    assert shapes == maps | {"maps.0.bias": (16,), "linear_pred.weight": (5, 16, 1, 1), "linear_pred.bias": (5,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_keeps_the_type(trained, dtype):
    fused = trained.to(dtype).fuse()
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}


def test_fused_on_the_meta_device():
    with torch.device("meta"):
        head = SegformerHead(CHANNELS, 16, 5)
    assert {parameter.device.type for parameter in head.fuse().parameters()} == {"meta"}


@pytest.mark.parametrize("channels", [(8,), (8, 24, 16)], ids=str)
def test_fused_of_other_numbers_of_stages(channels):
    head, features = SegformerHead(channels, 16, 5).double().eval(), make_features((45, 77), channels)
    torch.testing.assert_close(head.fuse()(features), head(features), rtol=1e-9, atol=1e-9)


def test_fused_has_a_gradient_for_its_features(trained):
    trained.eval()
    gradients = []
    for head in (trained, trained.fuse()):
        features = make_features((64, 96))
        gradients.append(torch.autograd.grad(head(features).square().sum(), features))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_fused_costs_its_convolutions_alone(trained):
    features, costs = make_features((64, 96)), []
    for head in (trained.eval(), trained.fuse()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            head(features)
        costs.append(counter.get_total_flops())
    positions = [2 * 16 * 24, 2 * 8 * 12, 2 * 4 * 6, 2 * 2 * 3]  # of the batch of two
    maps = sum(2 * 16 * channels * n for channels, n in zip(CHANNELS, positions, strict=True))
    classifier = 2 * 16 * 5 * positions[0]
    folding = sum(2 * 16 * 16 * channels for channels in CHANNELS)
    assert costs[1] == maps + classifier
    assert costs[0] >= costs[1] + folding
