import copy
import pickle
import re
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from transkd.errors import UserError
from transkd.losses import CSFLoss, PEALoss
from transkd.models import FrozenTeacher
from transkd.models.tapped import Tapped

PIXELS = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A user's own: two stages, a head; normalisation, dropout and a stage that does not run."""

    def __init__(self, widths=(8, 16), classes=5, norm=nn.BatchNorm2d):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 4, 1), norm(after), nn.ReLU(inplace=True))
            for before, after in zip((3, *widths), widths, strict=False)
        )
        self.drop = nn.Dropout()
        self.head = nn.Conv2d(widths[-1], classes, 1)
        self.idle = nn.Linear(1, 1)

    def forward(self, image):
        for stage in self.stages:
            image = stage(image)
        return self.head(self.drop(image))


class Gives(nn.Module):
    """Computes what it is told to from the image; ``tap`` gives it and the module itself shows its ``own``."""

    def __init__(self, give, own=lambda image: None):
        super().__init__()
        self.tap, self.own = nn.Identity(), own
        self.give = give

    def forward(self, image):
        self.tap(self.give(image))
        return self.own(image)


def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs)


def tap(module=None, **kwargs):
    return Tapped(module or net(), features=["stages.0", "stages.1"], **kwargs)


def hooks_of(module):
    return sum(len(m._forward_hooks) for m in module.modules())


def normal(image=PIXELS):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (image / 255 - mean) / std


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


# The libraries' own networks, against what the library says by itself.


def huggingface(widths=(8, 16, 24, 32)):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=list(widths),
        depths=[1] * 4,
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
        num_labels=5,
    )
    return SegformerForSemanticSegmentation(config)


STAGES = [f"segformer.stages.{i}" for i in range(4)]
HUGGINGFACE = {"features": STAGES, "embeddings": [f"{stage}.patch_embeddings" for stage in STAGES]}


@pytest.mark.parametrize("size", [(64, 96), (77, 50)], ids=str)
def test_huggingface_segformer(size):
    network = huggingface().eval()
    tapped = Tapped(network, **HUGGINGFACE)
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        output, theirs = tapped(image), network(normal(image), output_hidden_states=True)
        inputs = (normal(image), *theirs.hidden_states[:3])
        tokens = [s.patch_embeddings(x)[0] for s, x in zip(network.segformer.stages, inputs, strict=True)]
    assert (tapped.channels, tapped.num_classes, tapped.name) == (
        (8, 16, 24, 32),
        5,
        "SegformerForSemanticSegmentation",
    )
    same(output.features, theirs.hidden_states)
    same(output.embeddings, tokens)
    assert torch.equal(output.logits, theirs.logits)


@pytest.mark.parametrize("size", [(64, 96), (77, 50), (33, 31)], ids=str)
def test_tokens_become_maps(size):
    network = huggingface().eval()
    tapped = Tapped(network, features=[f"{stage}.layer_norm" for stage in STAGES])
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    same(tapped(image).features, network(normal(image), output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("arch", ["FPN", "Unet"])
def test_segmentation_models_pytorch(arch):
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = smp.create_model(arch, "resnet18", encoder_weights=None, classes=7).eval()
    tapped = Tapped(network, [f"encoder.layer{i}" for i in (1, 2, 3, 4)])
    with torch.no_grad():
        output = tapped(PIXELS)
        same(output.features, network.encoder(normal())[2:])
        assert torch.equal(output.logits, network(normal()))
    assert (tapped.channels, tapped.num_classes) == ((64, 128, 256, 512), 7)


def test_torchvision_deeplab():
    from torchvision.models.segmentation import deeplabv3_resnet50

    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=6, aux_loss=False).eval()
    tapped = Tapped(network, ["backbone.layer1", "backbone.layer4"])
    with torch.no_grad():
        output = tapped(PIXELS[:1])
        assert torch.equal(output.logits, network(normal(PIXELS[:1]))["out"])
        assert torch.equal(output.features[1], network.backbone(normal(PIXELS[:1]))["out"])
    assert [tuple(f.shape) for f in output.features] == [(1, 256, 16, 24), (1, 2048, 8, 12)]
    assert tapped.num_classes == 6


def test_timm_swin_gives_maps_channel_last():
    from timm.models.swin_transformer import SwinTransformer

    network = SwinTransformer(
        img_size=(64, 96), window_size=2, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=0
    ).eval()
    tapped = Tapped(network, [f"layers.{i}" for i in range(4)], ["patch_embed"])
    output = tapped(PIXELS)
    _, theirs = network.forward_intermediates(normal())
    same(output.features, theirs)
    assert [f.shape[1] for f in output.features] == list(tapped.channels) == [24, 48, 96, 192]
    same(output.embeddings, [network.patch_embed(normal()).flatten(1, 2)])
    assert (tapped.num_classes, output.logits) == (0, None)  # an encoder, whose own output is no map


def test_timm_pvt():
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    network = PyramidVisionTransformerV2(
        depths=(1,) * 4, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), num_classes=0, global_pool=""
    ).eval()
    tapped = Tapped(network, [f"stages.{i}" for i in range(4)], ["patch_embed"])
    output = tapped(PIXELS)
    maps = [network.patch_embed(normal())]
    for stage in network.stages:
        maps.append(stage(maps[-1]))
    same(output.features, maps[1:])
    same(output.embeddings, [maps[0].flatten(1, 2)])


def test_timm_twins_gives_tokens_in_a_tuple():
    from timm.models.twins import Twins

    network = Twins(img_size=64, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1,) * 4, wss=(4,) * 4)
    network.eval()
    embeddings = [f"patch_embeds.{i}" for i in range(4)]
    tapped = Tapped(network, ["pos_block.0"], embeddings)
    output = tapped(PIXELS)
    assert torch.equal(output.embeddings[0], network.patch_embeds[0](normal())[0])
    assert [tuple(e.shape[1:]) for e in output.embeddings] == [(384, 8), (96, 16), (24, 24), (6, 32)]
    assert output.features[0].shape == (2, 8, 16, 24)


# What a module may give.


@pytest.mark.parametrize(
    ("give", "stride", "shape"),
    [
        (lambda x: x, 1, (2, 3, 64, 96)),
        (lambda x: x[:, :, :61, :93], 1, (2, 3, 61, 93)),  # unpadded convolutions
        (lambda x: x.permute(0, 2, 3, 1)[:, ::8, ::8], 8, (2, 3, 8, 12)),
        (lambda x: x[:, :, ::14, ::14].flatten(2).mT, 14, (2, 3, 5, 7)),
        (lambda x: [x[:, :, ::2, ::2].flatten(2).mT, "more"], 2, (2, 3, 32, 48)),
    ],
)
def test_layouts_of_features_and_embeddings(give, stride, shape):
    output = Tapped(Gives(give), features=["tap"], embeddings=["tap"])(PIXELS)
    (feature,), (embedding,) = output.features, output.embeddings
    assert feature.shape == shape
    assert torch.equal(feature, output.image[:, :, ::stride, ::stride][:, :, : shape[2], : shape[3]])
    assert torch.equal(embedding, feature.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: {"logits": x}, lambda x: OrderedDict(out=x), lambda x: type("O", (), {"logits": x})()],
)
def test_logits_of_the_module_itself(wrap):
    tapped = Tapped(Gives(lambda x: x, wrap), embeddings=["tap"])
    output = tapped(PIXELS)
    assert torch.equal(output.logits, output.image)
    assert (tapped.num_classes, tapped.channels) == (3, (3,))  # no features: the embeddings' channels
    assert tapped.predict(PIXELS).shape == (2, 64, 96)


@pytest.mark.parametrize(
    "own", [lambda x: [x], lambda x: x.mean((2, 3)), lambda x: {}, lambda x: x.permute(0, 2, 3, 1)]
)
def test_an_encoder_has_no_logits(own):
    tapped = Tapped(Gives(lambda x: x, own), features=["tap"])
    assert tapped.num_classes == 0
    assert tapped(PIXELS).logits is None
    assert len(FrozenTeacher(tapped, {"features"})(PIXELS).features) == 1


def test_logits_by_name_and_only_where_they_are_needed():
    tapped = Tapped(net().eval(), logits="stages.1")
    assert tapped.num_classes == 16
    assert torch.equal(tapped(PIXELS).logits, tap(tapped.module)(PIXELS).features[1])
    assert tapped(PIXELS, needs={"features"}).logits is None


def test_the_image_is_normalised():
    tapped = tap(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    same(tapped(PIXELS).image[0], tapped(PIXELS / 255).image[0])
    torch.testing.assert_close(tapped(PIXELS).image[:, 2], (PIXELS[:, 2] / 255 - 0.3) / 0.6)
    assert torch.equal(tap()(PIXELS).image, normal())


# The probe.


def test_the_probe_leaves_no_trace():
    module = net()
    module.stages[0].eval()
    modes = [m.training for m in module.modules()]
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    tapped = tap(module)
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in module.parameters())
    assert not tapped._taps.records


def test_the_probe_takes_no_random_numbers_of_others():
    torch.manual_seed(3)
    Tapped(Gives(lambda x: torch.rand_like(x)), ["tap"])
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, "meta"])
def test_the_probe_is_of_the_modules_type_and_device(to):
    tapped = tap(net().to(to))
    assert tapped.channels == (8, 16)
    weight = tapped.module.head.weight
    assert (tapped.mean.dtype, tapped.mean.device) == (weight.dtype, weight.device)
    assert tapped(PIXELS.to(weight.device)).logits.dtype == weight.dtype


def test_a_network_of_one_size_names_it():
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=(32, 64), embed_dim=12, depth=1, num_heads=2, class_token=False, global_pool="avg")
    message = r"VisionTransformer fails on the probe, an image of 64 x 96: Input height.*; .*probe=\(H, W\)"
    with pytest.raises(UserError, match=message) as caught:
        Tapped(vit, ["blocks.0"])
    assert isinstance(caught.value.__cause__, AssertionError)
    assert "\n" not in str(caught.value)
    assert hooks_of(vit) == 0
    tapped = Tapped(vit, ["blocks.0"], probe=(32, 64))
    assert tapped(PIXELS[..., :32, :64]).features[0].shape == (2, 12, 2, 4)


# Errors.


def fails(message, module, features=("tap",), **kwargs):
    with pytest.raises(UserError, match=message) as caught:
        Tapped(module, features, **kwargs)
    assert "\n" not in str(caught.value)
    assert hooks_of(module) == 0


def fails_later(message, tapped, image=PIXELS):
    with pytest.raises(UserError, match=message) as caught:
        tapped(image)
    assert "\n" not in str(caught.value)
    assert not tapped._taps.records


@pytest.mark.parametrize("kind", ["features", "embeddings", "logits"])
def test_an_unknown_tap_is_named_with_names_near_it(kind):
    names = "stage.0" if kind == "logits" else ["stages.1", "stage.0"]
    with pytest.raises(UserError, match=r"no submodule 'stage\.0' to tap in Net; there are .*stages\.0"):
        Tapped(net(), **{kind: names})


def test_an_unknown_tap_without_names_near_it():
    fails(r"no submodule '\?' to tap in Net; there are stages, stages\.0, stages\.0\.0, ", net(), ["?"])


def test_a_single_name_is_no_list():
    fails(r"features is a list of names.*write features=\['head'\]", net(), "head")


def test_a_tap_that_does_not_fire():
    fails(r"tap 'stages' fired 0 times in one forward of Net.*such as stages\.0, stages\.1$", net(), ["stages"])
    fails(r"tap 'idle' fired 0 times", net(), ["head", "idle"])


def test_a_tap_that_fires_twice():
    module = nn.Sequential(OrderedDict(a=nn.Identity(), b=nn.ReLU()))
    module.append(module.b)
    fails(r"tap 'b' fired 2 times in one forward of Sequential, expected once", module, ["b"])


def test_a_tap_that_stops_firing():
    tapped = tap()
    tapped.module.stages = tapped.module.stages[:1]
    tapped.module.head = nn.Conv2d(8, 5, 1)
    fails_later(r"tap 'stages\.1' fired 0 times", tapped)


@pytest.mark.parametrize(
    ("give", "what"),
    [
        (lambda x: x[:, :, ::16, ::16].flatten(2).mT[:, [0, *range(24)]], "shape [1, 25, 3]"),  # a class token
        (lambda x: x.mean((2, 3)), "shape [1, 3]"),
        (lambda x: x[:, :, ::5, ::4], "shape [1, 3, 13, 24]"),
        (lambda x: torch.cat([x, x]), "shape [2, 3, 64, 96]"),  # windows of an image, say
    ],
)
def test_a_layout_that_fits_no_rule(give, what):
    fails(
        rf"tap 'tap' returns a tensor of {re.escape(what)} for an image of 64 x 96, .*class token.*probe=\(H, W\)",
        Gives(give),
    )


def test_a_layout_that_fits_two_rules():
    give = Gives(lambda x: x.mean(1, keepdim=True).expand(-1, 32, -1, -1)[:, :, ::2, ::2])
    fails(r"shape \[1, 32, 32, 32\] .*\[B, C, H, W\] or a map \[B, H, W, C\], .*probe=\(H, W\)", give, probe=(64, 64))
    assert Tapped(give, ["tap"]).channels == (32,)


def test_what_is_no_tensor():
    module = nn.Sequential(OrderedDict(body=Gives(lambda x: x, lambda x: {"a": x})))
    fails(r"tap 'body' returns a dict, expected a tensor or a tuple .*such as body\.tap", module, ["body"])


def test_what_is_changed_in_place():
    fails(r"output of tap 'stages\.0\.1' is modified in place .*inplace", net(), ["stages.0.1"])


def tokens(image):
    return image[:, :, ::4, ::4].flatten(2).mT


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        (
            tokens,
            lambda x: tokens(x)[:, 1:],
            r"tensor of shape \[2, 149, 3\] .* expected tokens \[B, N, C\] with C = 3",
        ),
        (tokens, lambda x: tokens(x[:, :, ::2, ::2]), r"tensor of shape \[2, 40, 3\] .* expected tokens"),
        (tokens, lambda x: x, r"tensor of shape \[2, 3, 40, 60\] .* expected tokens"),
        (
            lambda x: x,
            lambda x: x[:, :2],
            r"tensor of shape \[2, 2, 40, 60\] .* expected a map \[B, C, H, W\] with C = 3",
        ),
        (lambda x: x, lambda x: x[:1], r"tensor of shape \[1, 3, 40, 60\] for images \[2, 3, 40, 60\]"),
        (lambda x: x, lambda x: None, "NoneType for images"),
    ],
)
def test_a_layout_that_changes(first, later, message):
    tapped = Tapped(Gives(first), ["tap"])
    tapped.module.give = later
    fails_later(rf"tap 'tap' returns a {message}.*probe=\(H, W\)", tapped, PIXELS[..., :40, :60])


def test_logits_that_come_at_construction_alone():
    module = Gives(lambda x: x)
    module.own = lambda x: (x, x) if module.training else x
    fails_later(r"Gives returned a tuple, expected logits \[B, 3, h, w\] .*logits=", Tapped(module, ["tap"]))
    assert Tapped(module, ["tap"])(PIXELS, needs={"features"}).logits is None


# Hooks and records.


def test_hooks_leave_with_it():
    module = net()
    first, second = tap(module), tap(module, embeddings=["stages.1"], logits="head")
    assert hooks_of(module) == 5
    second.eval()
    same(first(PIXELS).features, second(PIXELS).features)
    del second
    assert hooks_of(module) == 2
    del first
    assert hooks_of(module) == 0


def test_nothing_of_a_forward_is_kept():
    tapped = tap(embeddings=["stages.0"])
    tapped(PIXELS)
    assert not tapped._taps.records
    tapped.module(normal())  # nobody listens
    assert not tapped._taps.records
    tapped.module.head = nn.Conv2d(1, 1, 1)
    with pytest.raises(RuntimeError):
        tapped(PIXELS)
    assert not tapped._taps.records


@pytest.mark.parametrize("again", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_have_their_own_taps(again):
    original = tap().eval()
    twin = again(original)
    expected = original(PIXELS)
    with torch.no_grad():
        twin.module.stages[0][0].weight.mul_(2)
    for output, want in ((original(PIXELS), True), (twin(PIXELS), False)):
        assert torch.equal(output.features[0], expected.features[0]) == want
        assert torch.equal(output.logits, expected.logits) == want
    module = original.module
    del original
    assert (hooks_of(module), hooks_of(twin.module)) == (0, 2)
    twin(PIXELS)
    module = twin.module
    del twin
    assert hooks_of(module) == 0


def test_a_shallow_copy_does_not_take_the_hooks_along():
    tapped = tap()
    copy.copy(tapped)
    assert hooks_of(tapped.module) == 2


# The state_dict.


class Holder(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student, self.other = student, nn.Linear(1, 1)


def test_state_dict_is_the_modules_own():
    tapped, fresh = tap(), Net()
    assert list(tapped.state_dict()) == list(fresh.state_dict())
    assert tapped.state_dict()._metadata == fresh.state_dict()._metadata
    fresh.load_state_dict(tapped.state_dict(), strict=True)
    same(list(fresh.state_dict().values()), list(tapped.state_dict().values()))

    other = tap(Net())
    own = net().state_dict()
    assert other.load_state_dict(own, strict=True) == ([], [])
    same(list(other.state_dict().values()), list(own.values()))
    own["module.x"] = own.pop("head.bias")
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"head\.bias".*Unexpected key.*"module\.x"'):
        other.load_state_dict(own)


def test_state_dict_inside_another_module():
    holder, fresh = Holder(tap()), Holder(tap(Net()))
    state = holder.state_dict()
    assert list(state) == [*(f"student.{name}" for name in Net().state_dict()), "other.weight", "other.bias"]
    keys = list(state)
    fresh.load_state_dict(state, strict=True)
    assert list(state) == keys
    same(list(fresh.state_dict().values()), list(state.values()))
    Holder(Net()).load_state_dict(state, strict=True)
    del state["student.head.bias"]
    state["student.tail.bias"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r'(?s)"student\.(module\.)?head\.bias".*"student\.(module\.)?tail\.bias"'):
        fresh.load_state_dict(state, strict=True)


def test_state_dict_of_a_module_with_a_child_called_module():
    module = nn.Sequential(OrderedDict(module=nn.Conv2d(3, 3, 1), x=nn.Conv2d(3, 3, 1)))
    holder = Holder(Tapped(copy.deepcopy(module), ["x"]))
    state = {f"student.{name}": value + 1 for name, value in module.state_dict().items()}
    holder.load_state_dict({**holder.state_dict(), **state}, strict=True)
    same(list(holder.student.state_dict().values()), list(state.values()))


def test_it_is_an_ordinary_module():
    tapped = tap()
    assert {name.split(".")[0] for name, _ in tapped.named_parameters()} == {"module"}
    tapped.eval().requires_grad_(False).double()
    assert not any(m.training for m in tapped.module.modules())
    assert not any(p.requires_grad or p.dtype != torch.float64 for p in tapped.module.parameters())
    assert tapped(PIXELS).logits.dtype == torch.float64


# Training.


def test_distils():
    teacher = FrozenTeacher(Tapped(huggingface((16, 24, 36, 48)), **HUGGINGFACE), {"features", "embeddings"})
    student = Tapped(huggingface(), **HUGGINGFACE)
    channels = {"student_channels": student.channels, "teacher_channels": teacher.network.channels}
    terms = nn.ModuleList([CSFLoss(**channels, mid_channels=8), PEALoss(**channels)])
    optimizer = torch.optim.SGD([*student.parameters(), *terms.parameters()], lr=0.1)
    shown = student(PIXELS), teacher(PIXELS)
    assert shown[1].logits is None
    sum(term(*shown) for term in terms).backward()
    encoder = [p for name, p in student.named_parameters() if "decode_head" not in name]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder)
    assert sum(p.grad.abs().sum() for p in encoder) > 0
    assert all(p.grad is None for p in teacher.network.parameters())
    before = student.module.segformer.stages[0].patch_embeddings.proj.weight.clone()
    optimizer.step()
    assert not torch.equal(student.module.segformer.stages[0].patch_embeddings.proj.weight, before)


def loss_of(output):
    maps = (*output.features, *output.embeddings, output.logits)
    return sum(tensor.square().mean() for tensor in maps)


def gradients(network):
    return {n.rpartition("module.")[2]: p.grad for n, p in network.named_parameters() if p.grad is not None}


def test_compiles():
    plain = tap(embeddings=["stages.0"], logits="head").eval()
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    for size in ((64, 96), (32, 32), (45, 70)):
        expected, output = plain(PIXELS[..., : size[0], : size[1]]), compiled(PIXELS[..., : size[0], : size[1]])
        same(
            (*output.features, *output.embeddings, output.logits),
            (*expected.features, *expected.embeddings, expected.logits),
        )
        loss_of(expected).backward()
        loss_of(output).backward()
        assert not twin._taps.records
    ours, theirs = gradients(plain), gradients(twin)
    assert ours.keys() == theirs.keys()
    same(list(ours.values()), list(theirs.values()))


class Checkpointed(Net):
    def forward(self, image):
        for stage in self.stages:
            image = checkpoint(stage, image, use_reentrant=False)
        return self.head(image)


def test_gradient_checkpointing_inside_the_module():
    plain, twin = tap().eval(), tap(Checkpointed()).eval()
    twin.load_state_dict(plain.state_dict())
    for tapped in (plain, twin):
        loss_of(tapped(PIXELS)).backward()
    assert not twin._taps.records  # the hooks fire again in backward
    same(list(gradients(plain).values()), list(gradients(twin).values()))


def train_on_half(rank, network, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parallel = DistributedDataParallel(network)
    for _ in range(2):
        parallel.zero_grad()
        loss_of(parallel(PIXELS[rank : rank + 1])).backward()
    torch.save(gradients(parallel), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_the_joined_batch(tmp_path):
    tapped = tap(net(norm=partial(nn.GroupNorm, 2)), embeddings=["stages.1"]).eval()
    del tapped.module.idle  # DDP wants a gradient for every parameter
    torch.multiprocessing.spawn(train_on_half, (tapped, tmp_path), nprocs=2)
    loss_of(tapped(PIXELS)).backward()
    expected = gradients(tapped)
    assert expected
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], msg=name)
