import json

import pytest
import torch
import torchvision

from transkd.errors import UserError
from transkd.models import (
    ENCODERS,
    HEADS,
    SEGMENTERS,
    DeepLabV3PlusHead,
    MixTransformer,
    Recipe,
    SegformerHead,
    SemanticFPNHead,
    TimmEncoder,
    create_segmenter,
    load_segmenter,
    save_segmenter,
)
from transkd.models.encoders.lvt import LiteVisionTransformer
from transkd.models.storage.lineage import CODE, RANDOM

# Millions of parameters: SegFormer (arXiv 2105.15203) and LVT (arXiv 2112.10809) as the papers give them for ADE20K's
# 150 classes; PVTv2 without head, but with an ImageNet classifier, as PaddleClas gives them.
WITH_HEAD = {
    "segformer_b0": 3.8,
    "segformer_b1": 13.7,
    "segformer_b2": 27.5,
    "segformer_b3": 47.3,
    "segformer_b4": 64.1,
    "segformer_b5": 84.7,
    "lvt": 3.9,
}
CLASSIFIERS = {
    "pvt_v2_b0": 3.7,
    "pvt_v2_b1": 14.0,
    "pvt_v2_b2": 25.4,
    "pvt_v2_b3": 45.2,
    "pvt_v2_b4": 62.6,
    "pvt_v2_b5": 82.0,
}
SMALL = {"depths": [1, 1, 1, 1]}


def meta(*args, **kwargs):
    with torch.device("meta"):
        return create_segmenter(*args, **kwargs)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def drop_rates(network):
    return [module.drop_prob for module in network.modules() if type(module).__name__ == "DropPath"]


@pytest.mark.parametrize(("name", "millions"), WITH_HEAD.items())
def test_published_size(name, millions):
    assert round(count(meta(name, 150)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "millions"),
    [pytest.param(*item, marks=pytest.mark.slow) if item[1] > 40 else item for item in CLASSIFIERS.items()],
)
def test_size_of_pvt(name, millions):
    network = meta(name, 150)
    classifier = (network.channels[-1] + 1) * 1000
    assert round((count(network.encoder) + classifier) / 1e6, 1) == millions
    pyramid = (sum(network.channels) + 4) * 256 + 4 * (256 * 9 + 1) * 256
    branches = 4 * 256 * 128 * 9 + 3 * 128 * 128 * 9 + 7 * 2 * 128  # 1, 1, 2 and 3 convolutions
    assert count(network.head) == pyramid + branches + (128 + 1) * 150


def test_size_of_deeplab():
    network = meta("deeplabv3plus_resnet101", 19)
    with torch.device("meta"):
        resnet = torchvision.models.resnet101()
    assert count(network.encoder) == count(resnet) - count(resnet.fc)
    aspp = 2 * 2048 * 256 + 3 * 2048 * 256 * 9 + 5 * 256 * 256 + 6 * 2 * 256
    decoder = 256 * 48 + 2 * 48 + (304 + 256) * 256 * 9 + 2 * 2 * 256
    assert count(network.head) == aspp + decoder + 256 * 19 + 19
    assert network.encoder.strides == (4, 8, 16, 16)


def test_every_named_network_has_its_size_checked():
    assert {*WITH_HEAD, *CLASSIFIERS, "deeplabv3plus_resnet101"} == set(SEGMENTERS)


@pytest.mark.parametrize(
    ("name", "encoder", "head"),
    [
        ("segformer_b0", MixTransformer, SegformerHead),
        ("lvt", LiteVisionTransformer, SegformerHead),
        ("pvt_v2_b0", TimmEncoder, SemanticFPNHead),
        ("deeplabv3plus_resnet101", TimmEncoder, DeepLabV3PlusHead),
        ("mit_b0", MixTransformer, SegformerHead),
        ("convnext_atto", TimmEncoder, SegformerHead),
        ("resnet18.a1_in1k", TimmEncoder, SegformerHead),
    ],
)
def test_what_a_name_builds(name, encoder, head):
    network = meta(name, 7)
    assert type(network.encoder) is encoder
    assert type(network.head) is head
    assert (network.name, network.num_classes) == (name, 7)
    assert network.channels == network.encoder.channels
    assert network.lineage == [CODE, RANDOM]
    assert network(torch.empty(2, 3, 64, 96, device="meta")).logits.shape == (2, 7, 16, 24)


@pytest.mark.parametrize(("head", "kind"), HEADS.items())
@pytest.mark.parametrize("name", ["segformer_b0", "resnet18"])
def test_any_head_on_any_encoder(name, head, kind):
    network = meta(name, 7, head=head, width=24)
    assert type(network.head) is kind
    assert shapes(network.head) == shapes(meta_head(kind, network.channels, 24, 7))
    assert network(torch.empty(2, 3, 77, 50, device="meta")).logits.shape == (2, 7, 20, 13)


def meta_head(kind, channels, width, classes):
    with torch.device("meta"):
        return kind(channels, width, classes)


@pytest.mark.parametrize(
    ("name", "width"),
    [("segformer_b0", 256), ("segformer_b2", 768), ("lvt", 256), ("mit_b2", 256), ("resnet18", 256)],
)
def test_width_of_the_segformer_head(name, width):
    assert meta(name, 5).head.linear_pred.in_channels == width
    assert meta(name, 5, width=32).head.linear_pred.in_channels == 32


def test_the_arguments_of_the_encoder_join_the_recipes():
    assert meta("deeplabv3plus_resnet101", 5, encoder={"output_stride": 8}).encoder.strides == (4, 8, 8, 8)
    assert meta("deeplabv3plus_resnet101", 5, encoder={"drop_path_rate": 0.1}).encoder.strides == (4, 8, 16, 16)
    given = {"drop_path_rate": 0.3}
    for name in ("segformer_b0", "lvt", "pvt_v2_b0"):
        assert max(drop_rates(meta(name, 5, encoder=given))) == pytest.approx(0.3)
    assert given == {"drop_path_rate": 0.3}
    assert SEGMENTERS["deeplabv3plus_resnet101"].args == {"output_stride": 16}


RECIPES = [
    ("segformer_b0", {}),
    ("segformer_b0", {"width": 32}),
    ("segformer_b0", {"head": "segformer"}),
    ("segformer_b1", {"head": "fpn", "width": 64, "encoder": SMALL}),
    ("lvt", {"encoder": {**SMALL, "drop_path_rate": 0.2}}),
    ("pvt_v2_b0", {"encoder": {"drop_path_rate": 0.2}}),
    ("pvt_v2_b0", {"head": "segformer", "encoder": SMALL}),
    ("mit_b1", {}),
    ("resnet18", {}),
    ("resnet18", {"head": "deeplabv3plus", "width": 32, "encoder": {"output_stride": 16}}),
    ("deeplabv3plus_resnet101", {"encoder": {"output_stride": 8}}),
]


@pytest.mark.parametrize(("name", "args"), RECIPES, ids=str)
def test_the_recipe_builds_the_same_network(name, args):
    network = meta(name, 7, **args)
    again = meta(**json.loads(json.dumps(network.recipe)))  # as a file keeps it
    assert shapes(again) == shapes(network)
    assert repr(again) == repr(network)  # layers, strides, rates
    assert again.recipe == network.recipe
    assert (again.name, again.num_classes) == (name, 7)
    if name in SEGMENTERS and args in ({}, {"head": "segformer"}):
        assert network.recipe == {"name": name, "num_classes": 7}


def test_a_recipe_of_timms_names_its_head():
    # so that a file outlives a change of the default
    assert meta("resnet18", 7).recipe["head"] == "segformer"


def test_the_recipe_is_the_networks_own():
    given = {"drop_path_rate": 0.1}
    network = meta("segformer_b0", 5, encoder=given)
    given["drop_path_rate"] = 0.9
    assert network.recipe["encoder"] == {"drop_path_rate": 0.1}


def test_the_normalisation():
    network = meta("segformer_b0", 5)
    assert not network.normalisation_chosen
    network = create_segmenter("resnet18", 5, width=8, mean=(0.0, 0.1, 0.2), std=(1.0, 2.0, 3.0))
    assert network.normalisation_chosen
    assert network.mean.flatten().tolist() == pytest.approx([0, 0.1, 0.2])
    assert network.std.flatten().tolist() == pytest.approx([1, 2, 3])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("segformer_b9", "segformer_b"),
        ("pvt_v2_b9", "pvt_v2_b"),
        ("ResNet18", "resnet18"),
        ("deeplabv3plus", "deeplabv3plus_resnet101"),
    ],
)
def test_an_unknown_name_is_answered_with_names_near_it(name, near):
    with pytest.raises(UserError, match=rf"^unknown network '{name}'; near it: .*{near}") as caught:
        create_segmenter(name, 5)
    named = str(caught.value).split("near it: ")[1].split(". ")[0].split(", ")
    assert len(set(named)) == len(named)
    assert all(known in str(caught.value) for known in SEGMENTERS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "?", "/a/file.pth"])
def test_a_name_near_nothing(name):
    with pytest.raises(UserError, match=rf"^unknown network '{name}'\. There are".replace("?", r"\?")):
        create_segmenter(name, 5)


def test_an_unknown_head():
    with pytest.raises(UserError, match=r"unknown head 'psp'; there are: segformer, fpn, deeplabv3plus"):
        create_segmenter("segformer_b0", 5, head="psp")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientvit_m0"])
def test_a_network_without_four_stages(name):
    with pytest.raises(UserError, match=f"{name} has stages at strides"):
        create_segmenter(name, 5)


@pytest.mark.parametrize("name", ["segformer_b0", "lvt", "pvt_v2_b0", "deeplabv3plus_resnet101"])
@pytest.mark.parametrize("args", [{"droppath": 0.1}, {"output_stride": 7}], ids=str)
def test_an_argument_that_the_encoder_does_not_take(name, args):
    (argument,) = args
    with pytest.raises(UserError, match=rf"{argument}") as caught:
        meta(name, 5, encoder=args)
    assert "\n" not in str(caught.value)


def test_pretrained_is_no_argument_of_mit():
    with pytest.raises(UserError, match="weights=PATH"):
        create_segmenter("segformer_b0", 5, encoder={"pretrained": True})


class Two(torch.nn.Module):
    """The smallest encoder there can be."""

    def __init__(self, width=4):
        super().__init__()
        self.channels = (width,) * 4
        self.embed = torch.nn.Conv2d(3, width, 4, stride=4)

    def forward_stages(self, image):
        return (self.embed(image),) * 4, ()


def test_an_encoder_of_ones_own_is_built_and_loaded_by_its_name(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"plugins=\[MODULE\]"):
        create_segmenter("two", 5)
    monkeypatch.setitem(ENCODERS, "two", Two)
    network = create_segmenter("two", 5, width=8, encoder={"width": 6})
    assert network.channels == (6,) * 4
    save_segmenter(network, tmp_path / "two.safetensors")
    loaded, _ = load_segmenter(tmp_path / "two.safetensors")
    assert isinstance(loaded.encoder, Two)
    assert loaded.recipe == network.recipe
    with pytest.raises(UserError, match="two does not take the arguments"):
        create_segmenter("two", 5, encoder={"depth": 6})


def test_an_encoder_of_ones_own_comes_before_timms(monkeypatch):
    monkeypatch.setitem(ENCODERS, "resnet18", Two)
    assert isinstance(create_segmenter("resnet18", 5).encoder, Two)


def test_a_pair_of_ones_own(monkeypatch):
    monkeypatch.setitem(ENCODERS, "two", Two)
    monkeypatch.setitem(SEGMENTERS, "two_fpn", Recipe("two", "fpn", 8, {"width": 6}))
    network = create_segmenter("two_fpn", 5)
    assert isinstance(network.head, SemanticFPNHead)
    assert network.recipe == {"name": "two_fpn", "num_classes": 5}
