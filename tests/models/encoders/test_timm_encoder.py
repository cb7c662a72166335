import copy
import pickle
import weakref
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F

from transkd.errors import UserError
from transkd.losses import PEALoss
from transkd.models import SegformerHead, Segmenter, TimmEncoder

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.rand(2, 3, 64, 96, generator=GENERATOR)
OTHER = torch.rand(2, 3, 64, 96, generator=GENERATOR)
ONES = (1, 1, 1, 1)


class Kind(NamedTuple):
    """A network of timm's, kept small, and where timm makes its patch embeddings."""

    args: dict[str, Any]
    channels: tuple[int, ...]
    taps: tuple[str, ...] = ()
    shows: str = ""  # what a tap gives: BHWC, BCHW or (BNC, grid)
    features: str = "BCHW"


def chain(stages):
    return ("patch_embed", *(f"{stages}_{i}.downsample" for i in (1, 2, 3)))


SWIN = {"depths": ONES, "embed_dim": 24, "num_heads": (1, 2, 4, 8), "window_size": 4}
TWINS = {"depths": ONES, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "wss": (4,) * 4}
TINY_VIT = {"depths": ONES, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "window_sizes": (4,) * 4}
LISTED = tuple(f"model.patch_embeds.{i}" for i in range(4))
EMBEDDING = {
    "pvt_v2_b0": Kind({"depths": ONES}, (32, 64, 160, 256), chain("stages"), "BHWC"),
    "swin_tiny_patch4_window7_224": Kind(SWIN, (24, 48, 96, 192), chain("layers"), "BHWC", "BHWC"),
    "swinv2_tiny_window8_256": Kind(SWIN, (24, 48, 96, 192), chain("layers"), "BHWC", "BHWC"),
    "twins_svt_small": Kind(TWINS, (8, 16, 24, 32), LISTED, "(BNC, grid)"),
    "tiny_vit_5m_224": Kind(TINY_VIT, (16, 32, 48, 64), chain("stages"), "BCHW"),
}
PLAIN = {
    "resnet18": Kind({}, (64, 128, 256, 512)),
    "convnext_atto": Kind({"depths": ONES, "dims": (8, 16, 24, 32)}, (8, 16, 24, 32)),
    "efficientvit_b0": Kind({}, (16, 32, 64, 128)),
    "mobilenetv3_small_050": Kind({}, (8, 16, 24, 288)),
    "mambaout_femto": Kind({"depths": ONES, "dims": (8, 16, 24, 32)}, (8, 16, 24, 32), features="BHWC"),
}
NETWORKS = EMBEDDING | PLAIN


def make(name, **args):
    torch.manual_seed(0)
    return TimmEncoder(name, **{**NETWORKS[name].args, **args}).eval()


def segmenter(name):
    encoder = make(name)
    return Segmenter(encoder, SegformerHead(encoder.channels, 8, 5), 5).eval()


def same(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def tokens(shown, layout):
    if layout == "(BNC, grid)":
        return shown[0].clone()
    return (shown.flatten(1, 2) if layout == "BHWC" else shown.flatten(2).mT).clone()


def by_timm_itself(name, weights, image):
    """Features and patch embeddings by timm's own network on these weights, hooked where the table says; and itself."""
    kind, embeddings = NETWORKS[name], []
    network = timm.create_model(name, features_only=True, **kind.args).eval()
    if name.startswith("swin"):
        network.patch_embed.strict_img_size = False
        image = F.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))  # to whole patches
    network.load_state_dict(weights, strict=True)
    for tap in kind.taps:
        network.get_submodule(tap).register_forward_hook(lambda *args: embeddings.append(tokens(args[-1], kind.shows)))
    features = network(image)[-4:]
    return [f.permute(0, 3, 1, 2) if kind.features == "BHWC" else f for f in features], embeddings, network


def check_against_timm(name, image):
    encoder = make(name)
    with torch.no_grad():
        features, embeddings = encoder.forward_stages(image)
        expected, expected_embeddings, _ = by_timm_itself(name, encoder.body.state_dict(), image)
    same(features, expected)
    assert encoder.channels == NETWORKS[name].channels == tuple(feature.shape[1] for feature in features)
    if name in PLAIN:
        assert embeddings == ()
    else:
        same(embeddings, expected_embeddings)
        assert [e.shape for e in embeddings] == [f.flatten(2).mT.shape for f in features]


@pytest.mark.parametrize("size", [(64, 96), (77, 50)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_features_and_embeddings_are_timms(name, size):
    check_against_timm(name, torch.rand(2, 3, *size))


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, c * 4 * 2**i) for name, kind in EMBEDDING.items() for i, c in enumerate(kind.channels) if c << i <= 100],
)
def test_a_grid_as_wide_as_a_stage_has_channels(name, side):
    # then [B, H, W, C] and [B, C, H, W] have the same shape: PVTv2-B0 has 64 channels at stage 2 of 512×512 pixels
    check_against_timm(name, torch.rand(1, 3, side, side))


@pytest.mark.slow
@pytest.mark.parametrize("side", [512, 1024])
def test_pvt_v2_of_the_published_size_on_squares(side):
    encoder = TimmEncoder("pvt_v2_b1").eval()
    seen = []
    for tap in chain("stages"):
        encoder.body.get_submodule(tap).register_forward_hook(lambda *args: seen.append(args[-1].flatten(1, 2)))
    with torch.no_grad():
        same(encoder.forward_stages(torch.rand(1, 3, side, side))[1], seen)


@pytest.mark.parametrize("name", NETWORKS)
def test_strides_and_draws(name):
    encoder = make(name)
    assert encoder.architecture == name
    assert encoder.strides == (4, 8, 16, 32)
    torch.manual_seed(0)  # the look at the stages draws nothing
    theirs = timm.create_model(name, features_only=True, **NETWORKS[name].args).state_dict()
    ours = encoder.body.state_dict()
    assert list(ours) == list(theirs)
    same(ours.values(), theirs.values())


@pytest.mark.parametrize(("output_stride", "strides"), [(32, (4, 8, 16, 32)), (16, (4, 8, 16, 16)), (8, (4, 8, 8, 8))])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_output_stride(name, output_stride, strides):
    encoder = make(name, output_stride=output_stride)
    assert encoder.strides == strides
    features, _ = encoder.forward_stages(IMAGE)
    assert [feature.shape[-2:] for feature in features] == [(64 // s, 96 // s) for s in strides]


def test_an_atrous_resnet_has_the_weights_of_the_plain_one():
    # with dilation in place of stride, every second position of the deepest map sees what the plain one sees
    plain, atrous = make("resnet18"), make("resnet18", output_stride=16)
    atrous.load_state_dict(plain.state_dict(), strict=True)
    same(atrous.forward_stages(IMAGE)[0][:3], plain.forward_stages(IMAGE)[0][:3])


def test_arguments_reach_timm():
    encoder = make("pvt_v2_b0", depths=(1, 2, 1, 1), drop_path_rate=0.2)
    assert len(encoder.body.stages_1.blocks) == 2
    assert encoder.body.stages_3.blocks[0].drop_path1.drop_prob == pytest.approx(0.2)
    assert make("resnet18", in_chans=4).forward_stages(torch.rand(1, 4, 64, 64))[0][0].shape == (1, 64, 16, 16)


# One network, many forwards.


@pytest.mark.parametrize("name", ["pvt_v2_b0", "twins_svt_small", "swin_tiny_patch4_window7_224", "resnet18"])
def test_samples_do_not_mix(name):
    encoder = make(name)
    together = encoder.forward_stages(IMAGE)
    alone = [encoder.forward_stages(image[None]) for image in IMAGE]
    for kind in (0, 1):
        for stage, tensor in enumerate(together[kind]):
            expected = torch.cat([sample[kind][stage] for sample in alone])
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


def pickled(encoder):
    return pickle.loads(pickle.dumps(encoder))


@pytest.mark.parametrize(
    ("name", "duplicate"),
    [*((name, copy.deepcopy) for name in NETWORKS), ("pvt_v2_b0", pickled), ("twins_svt_small", pickled)],
)
def test_a_copy_records_for_itself(name, duplicate):
    encoder = make(name)
    twin = duplicate(encoder)
    mine, its = encoder.forward_stages(IMAGE), encoder.forward_stages(OTHER)
    during = []
    # the copy runs before the original has collected what its own taps saw
    encoder.body.register_forward_hook(lambda *_: during.append(twin.forward_stages(OTHER)))
    again = encoder.forward_stages(IMAGE)
    for kind in (0, 1):
        if mine[kind]:
            same(again[kind], mine[kind])
            same(during[0][kind], its[kind])
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    same(encoder.forward_stages(IMAGE)[0], mine[0])


@pytest.mark.parametrize("name", EMBEDDING)
def test_nothing_is_kept_after_a_forward(name):
    encoder, alive = make(name), []
    for tap in NETWORKS[name].taps:
        encoder.body.get_submodule(tap).register_forward_hook(
            lambda *args: alive.append(weakref.ref(args[-1][0] if isinstance(args[-1], tuple) else args[-1]))
        )
    with torch.no_grad():
        output = encoder.forward_stages(IMAGE)
    assert len(alive) == 4
    del output
    assert not any(reference() is not None for reference in alive)


def test_nothing_is_kept_after_a_forward_that_failed():
    encoder = make("pvt_v2_b0")

    def fail(*_):
        raise MemoryError

    alive = []
    encoder.body.patch_embed.register_forward_hook(lambda *args: alive.append(weakref.ref(args[-1])))
    hook = encoder.body.stages_3.register_forward_hook(fail)
    with pytest.raises(MemoryError), torch.no_grad():
        encoder.forward_stages(IMAGE)
    hook.remove()
    assert alive[0]() is None
    assert len(encoder.forward_stages(IMAGE)[1]) == 4


# Training.


@pytest.mark.parametrize("name", EMBEDDING)
def test_gradients_are_timms(name):
    encoder = make(name)
    *theirs, network = by_timm_itself(name, encoder.body.state_dict(), IMAGE)
    for stages in (encoder.forward_stages(IMAGE), theirs):
        sum(tensor.square().mean() for kind in stages for tensor in kind).backward()
    assert any(parameter.grad is not None for parameter in encoder.parameters())
    for (key, mine), its in zip(encoder.body.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", EMBEDDING)
def test_an_embedding_depends_on_what_comes_before_its_stage_alone(name):
    encoder = make(name)
    _, embeddings = encoder.forward_stages(IMAGE)
    for stage, embedding in enumerate(embeddings):
        gradients = torch.autograd.grad(
            embedding.square().sum(), list(encoder.parameters()), allow_unused=True, retain_graph=True
        )
        read = {n for (n, _), g in zip(encoder.named_parameters(), gradients, strict=True) if g is not None}
        taps = [f"body.{tap}." for tap in NETWORKS[name].taps]
        for i, tap in enumerate(taps):
            assert any(parameter.startswith(tap) for parameter in read) == (i <= stage), (tap, stage)
        if stage == 0:
            assert all(parameter.startswith(taps[0]) for parameter in read)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "resnet18"])
def test_bfloat16_autocast(name):
    encoder = make(name)
    exact = encoder.forward_stages(IMAGE)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder.forward_stages(IMAGE)
    for kind in (0, 1):
        for a, b in zip(rounded[kind], exact[kind], strict=True):
            assert (a.float() - b).norm() < 0.1 * b.norm()
    sum(tensor.float().square().mean() for kind in rounded for tensor in kind).backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "name",
    [
        "pvt_v2_b0",
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
        pytest.param("twins_svt_small", marks=pytest.mark.slow),
    ],
)
def test_compiled(name):
    network = segmenter(name)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        for image in (IMAGE, OTHER):
            ours, plain = compiled(image), network(image)
            same(ours.features, plain.features)
            same(ours.embeddings, plain.embeddings)
            assert torch.equal(ours.logits, plain.logits)


# Refused.


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_pea_needs_embeddings(who):
    names = ("convnext_atto", "twins_svt_small")
    student, teacher = (segmenter(name) for name in (names if who == "student" else names[::-1]))
    term = PEALoss(student.channels, teacher.channels)
    with pytest.raises(UserError, match=f"PEALoss compares embeddings, but the {who} returns none: .*patch embeddings"):
        term(student(IMAGE), teacher(IMAGE))


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("vit_tiny_patch16_224", r"\[16, 16, 16\]"),
        ("efficientvit_m0", r"\[16, 32, 64\]"),
        ("nest_tiny", r"\[4, 8, 16\]"),
        ("csatv2", r"\[8, 16, 32, 64\]"),
    ],
)
def test_networks_of_other_strides_are_refused(name, strides):
    with pytest.raises(UserError, match=f"{name} has stages at strides {strides}; expected 4 .*transkd.models.Tapped"):
        TimmEncoder(name)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("no_such_network", {}, r"Unknown model \(no_such_network\)"),
        ("resnet18.no_such_tag", {}, "Invalid pretrained tag"),
        ("pvt_v2_b0", {"output_stride": 16}, "unexpected keyword argument 'output_stride'"),
        ("resnet18", {"features_only": False}, "features_only"),
        ("resnet18", {"output_stride": 5}, "output_stride.: 5"),
        ("pvt_v2_b0", {"depths": (1, 1)}, "depths"),
        ("tresnet_m", {}, "not present in model"),
    ],
)
def test_what_timm_refuses_is_said_in_a_line(name, args, reason):
    with pytest.raises(UserError, match=f"timm cannot build {name} .*{reason}") as caught:
        TimmEncoder(name, **args)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_are_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(UserError, match="timm://resnet18"):
        TimmEncoder("resnet18", pretrained=True)
