"""Activations that are computed again in the backward pass: the same gradients from less memory."""

import copy

import pytest
import torch
from torch import nn

from transkd.errors import UserError
from transkd.models import LiteVisionTransformer, MixTransformer, SegformerHead, Segmenter, Tapped, create_segmenter


def tiny(encoder):
    torch.manual_seed(0)
    return Segmenter(encoder, SegformerHead(encoder.channels, 16, 5), 5)


def mit():
    encoder = MixTransformer((8, 16, 24, 32), depths=(2,) * 4, heads=(1, 2, 3, 4), drop_path_rate=0.5, num_classes=0)
    return tiny(encoder)


def lvt():
    return tiny(LiteVisionTransformer((8, 16, 24, 32), heads=(1, 2, 3, 4), drop_path_rate=0.5))


def pvt():
    return create_segmenter("pvt_v2_b0", 5, encoder={"drop_path_rate": 0.5})


def resnet():
    return create_segmenter("resnet18", 5)


def gradients(network):
    """Of everything that a network shows, the random depth among it."""
    torch.manual_seed(1)
    network.zero_grad()
    output = network(torch.rand(2, 3, 64, 96).double())
    sum(tensor.square().mean() for tensor in (output.logits, *output.features, *output.embeddings)).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [mit, lvt, pvt, resnet])
def test_the_same_gradients(build):
    plain = build().double().train()
    network = copy.deepcopy(plain)
    network.checkpoint_activations()
    expected, found = gradients(plain), gradients(network)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    copy.deepcopy(network)  # no activation of the backward pass is left behind
    assert network.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("build", [mit, lvt, pvt])
def test_less_is_kept(build):
    network = build()

    def kept():
        bytes_of = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: bytes_of.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t,
            lambda t: t,
        ):
            output = network(torch.rand(1, 3, 64, 96))
            total = sum(bytes_of.values())
        del output
        return total

    before = kept()
    network.checkpoint_activations()
    assert kept() < 0.8 * before


def test_no_graph_no_second_computation(monkeypatch):
    network = mit()
    network.checkpoint_activations()
    monkeypatch.setattr("transkd.models.encoders.mit.checkpoint", None)
    with torch.no_grad():
        network(torch.rand(1, 3, 64, 96))


def test_a_network_that_cannot_says_so():
    class Plain(nn.Module):
        channels = (8,)

    tapped = Tapped(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)), features=["0"])
    for network in (tapped, Segmenter(Plain(), nn.Identity(), 5)):
        with pytest.raises(UserError, match=r"cannot recompute activations.*student\.checkpointing=false"):
            network.checkpoint_activations()
