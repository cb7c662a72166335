import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transkd.errors import UserError
from transkd.models import create_segmenter, load_segmenter, save_segmenter
from transkd.models.heads.segformer import FusedSegformerHead
from transkd.outputs import EVERYTHING

PIXELS = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
# spec, section 1
SIZES = {
    "segformer_b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "segformer_b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "segformer_b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "segformer_b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "segformer_b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "segformer_b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768),
}


def test_a_network_in_bfloat16_takes_images_in_float32_at_any_scale():
    network = create_segmenter("segformer_b0", 3, scale=0.5, encoder={"channels": [8, 16, 40, 64], "depths": [1] * 4})
    expected = network.normalise(PIXELS)
    for image in (PIXELS, PIXELS / 255):
        shown = network.bfloat16().normalise(image)
        assert shown.dtype == torch.bfloat16
        torch.testing.assert_close(shown.float(), expected, rtol=0.02, atol=0.05)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_normalises_by_its_own_mean_and_deviation(b0):
    image = b0(PIXELS, needs=()).image
    for channel, (mean, std) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):  # as the fixture builds it
        torch.testing.assert_close(image[:, channel], (PIXELS[:, channel] / 255 - mean) / std)


def test_bytes_and_fractions_are_the_same_image(b0):
    b0.eval()
    bytes_, fractions = b0(PIXELS), b0(PIXELS.float() / 255)
    assert torch.equal(bytes_.image, fractions.image)
    assert torch.equal(bytes_.logits, fractions.logits)


def test_a_mean_in_whole_numbers_rounds_no_image():
    network = create_segmenter("segformer_b0", num_classes=2, mean=[0, 0, 0], std=[1, 1, 1])
    for image in (PIXELS, PIXELS.float() / 255):
        torch.testing.assert_close(network.normalise(image), PIXELS / 255)


def test_the_default_normalisation_is_imagenets():
    network = create_segmenter("segformer_b0", num_classes=2)
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert network.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("needs", [(), {"features", "embeddings"}, EVERYTHING])
def test_the_head_runs_when_logits_are_needed_alone(b0, needs):
    calls = []
    b0.head.register_forward_hook(lambda *_: calls.append(1))
    output = b0(PIXELS, needs=needs)
    assert (output.logits is None) == (not calls) == ("logits" not in needs)
    assert len(output.features) == len(output.embeddings) == 4


def test_state_dict_is_the_plain_networks(b0):
    names = list(b0.state_dict())
    assert {name.split(".")[0] for name in names} == {"encoder", "head"}
    assert "encoder.patch_embed1.proj.weight" in names
    assert not any("mean" in name and "running_mean" not in name for name in names)
    assert not any("std" in name for name in names)


def test_channels(b0):
    assert b0.channels == (32, 64, 160, 256)


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 4, 64, 96), (2, 64, 96, 3), (2, 64, 96)])
def test_wrong_input_is_named(b0, shape):
    message = re.escape(f"expected RGB images [B, 3, H, W], got a tensor of shape {list(shape)}")
    with pytest.raises(UserError, match=message):
        b0(torch.zeros(shape))


def test_unknown_networks_are_named():
    with pytest.raises(
        UserError, match=r"unknown network 'segformer_b9'; near it: segformer_b\d.* There are segformer_b0, .*lvt"
    ):
        create_segmenter("segformer_b9", num_classes=2)


@pytest.mark.parametrize("size", [None, (64, 96), (100, 41), (16, 24)])
def test_predicts_ids_at_the_size_asked_for(b0, size):
    b0.eval()
    ids = b0.predict(PIXELS, size)
    assert ids.shape == (2, *(size or (64, 96)))
    assert ids.dtype == torch.int64
    assert ids.unique().numel() > 1
    logits = F.interpolate(b0(PIXELS).logits, size or (64, 96), mode="bilinear", align_corners=False)
    at = logits.gather(1, ids[:, None])[:, 0]
    assert (at[:, None] >= logits).all()
    assert not at.is_inference()


def test_drop_path_rate_reaches_the_encoder():
    network = create_segmenter("segformer_b0", num_classes=2, encoder={"drop_path_rate": 0.35})
    assert network.encoder.block4[1].drop_path.drop_prob == pytest.approx(0.35)


# Fused: for inference.


@pytest.fixture
def trained(b0):
    """A MiT-B0 whose BatchNorm moved, in train mode."""
    with torch.no_grad():
        b0.head.linear_fuse.bn.weight.normal_()
        b0.head.linear_fuse.bn.bias.normal_()
        b0(PIXELS)
        b0(255 - PIXELS)
    return b0


@pytest.mark.parametrize("size", [(64, 96), (45, 77)], ids=str)
def test_fused_shows_the_same(trained, size):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    network = trained.double()
    fused = network.fuse()
    assert network.training
    assert not any(module.training for module in fused.modules())
    with torch.no_grad():
        ours, expected = fused(image), network.eval()(image)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-9, atol=1e-9)
    for kind in ("features", "embeddings"):
        for a, b in zip(getattr(ours, kind), getattr(expected, kind), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(fused.predict(image), network.predict(image))
    assert fused(image, needs=()).logits is None


def test_fusing_copies(trained):
    before = copy.deepcopy(trained.state_dict())
    fused = trained.fuse()
    with torch.no_grad():
        for tensor in (*fused.parameters(), fused.mean, fused.std):
            tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert trained.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert type(trained.head).__name__ == "SegformerHead"


def test_fused_keeps_its_name_classes_and_lineage(trained):
    fused = trained.fuse()
    assert isinstance(fused.head, FusedSegformerHead)
    assert (fused.name, fused.num_classes, fused.channels) == ("segformer_b0", 5, trained.channels)
    assert fused.lineage == trained.lineage
    assert count(fused) < count(trained)


def test_a_fused_network_has_no_recipe_that_builds_another(trained, tmp_path):
    fused = trained.fuse()
    assert fused.recipe is None
    assert trained.recipe is not None
    save_segmenter(trained, tmp_path / "trained.safetensors")
    again = load_segmenter(tmp_path / "trained.safetensors")[0].eval().fuse()
    with torch.no_grad():
        assert torch.equal(again(PIXELS).logits, fused(PIXELS).logits)


def test_fused_does_less(trained):
    costs = []
    for network in (trained.eval(), trained.fuse()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(PIXELS)
        costs.append(counter.get_total_flops())
    assert costs[1] < costs[0]


@pytest.mark.parametrize("head", ["fpn", "deeplabv3plus"])
def test_other_heads_have_no_fused_form(head):
    network = create_segmenter("segformer_b0", 2, head=head, width=8)
    with pytest.raises(
        UserError, match=rf"fuse\(\) is for the SegFormer head; segformer_b0 has a {type(network.head).__name__}"
    ):
        network.fuse()


def test_fusing_twice_is_refused(trained):
    with pytest.raises(UserError, match="segformer_b0 has a FusedSegformerHead"):
        trained.fuse().fuse()


@pytest.mark.parametrize(("name", "parameters"), [("segformer_b0", 3_719_284), ("segformer_b2", 27_362_004)])
def test_size_with_20_outputs(name, parameters):
    with torch.device("meta"):
        assert count(create_segmenter(name, num_classes=20)) == parameters


# Against transformers, an implementation that shares nothing with ours.


@pytest.fixture
def theirs():
    """Build theirs, with random weights and running statistics that are no 0 and 1."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    def build(name, num_classes):
        channels, depths, width = SIZES[name]
        config = SegformerConfig(
            hidden_sizes=list(channels),
            depths=list(depths),
            num_attention_heads=[1, 2, 5, 8],
            sr_ratios=[8, 4, 2, 1],
            decoder_hidden_size=width,
            layer_norm_eps=1e-6,
            num_labels=num_classes,
        )
        torch.manual_seed(0)
        network = SegformerForSemanticSegmentation(config).eval()
        for parameter_name, tensor in network.state_dict().items():
            if parameter_name.endswith(("bias", "running_mean")):
                tensor.normal_(std=0.1)
            elif parameter_name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
        return network

    return build


RENAMED = (  # transformers' name -> ours; stages count from 0 there
    (r"segformer\.stages\.(\d)\.patch_embeddings\.proj", r"encoder.patch_embed\1.proj"),
    (r"segformer\.stages\.(\d)\.patch_embeddings\.layer_norm", r"encoder.patch_embed\1.norm"),
    (r"segformer\.stages\.(\d)\.layer_norm", r"encoder.norm\1"),
    (r"segformer\.stages\.(\d)\.blocks\.(\d+)\.layernorm_before", r"encoder.block\1.\2.norm1"),
    (r"segformer\.stages\.(\d)\.blocks\.(\d+)\.layernorm_after", r"encoder.block\1.\2.norm2"),
    (r"segformer\.stages\.(\d)\.blocks\.(\d+)\.mlp\.(.+)", r"encoder.block\1.\2.mlp.\3"),
    (r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.q_proj", r"encoder.block\1.\2.attn.q"),
    (r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.([kv])_proj", r"encoder.block\1.\2.attn.\3"),
    (r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.o_proj", r"encoder.block\1.\2.attn.proj"),
    (
        r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.sequence_reduction\.sequence_reduction",
        r"encoder.block\1.\2.attn.sr",
    ),
    (
        r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.sequence_reduction\.layer_norm",
        r"encoder.block\1.\2.attn.norm",
    ),
    (r"decode_head\.linear_projections\.(\d)\.proj", r"head.linear_c\1.proj"),
    (r"decode_head\.linear_fuse", "head.linear_fuse.conv"),
    (r"decode_head\.batch_norm", "head.linear_fuse.bn"),
    (r"decode_head\.classifier", "head.linear_pred"),
)


def from_theirs(tensors):
    """Rename the tensors of transformers' SegFormer to ours; its key and value layers become our one."""
    ours = {}
    for name, tensor in tensors.items():
        layer, kind = name.rsplit(".", 1)
        (renamed,) = [match.expand(to) for pattern, to in RENAMED if (match := re.fullmatch(pattern, layer))]
        stage = re.compile(r"(patch_embed|block|norm|linear_c)(\d)")
        renamed = stage.sub(lambda match: match[1] + str(int(match[2]) + 1), renamed, count=1)
        ours[f"{renamed}.{kind}"] = tensor
    for name in [name for name in ours if ".attn.k." in name]:
        key, value = ours.pop(name), ours.pop(name.replace(".attn.k.", ".attn.v."))
        ours[name.replace(".attn.k.", ".attn.kv.")] = torch.cat([key, value])
    return ours


def check_parity(theirs, name, size):
    """Both on one image; their LayerNorms all have eps 1e-5, so ours get it too: compared is the arithmetic."""
    reference = theirs(name, 20)
    network = create_segmenter(name, num_classes=20, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()
    network.load_state_dict(from_theirs(reference.state_dict()), strict=True)
    assert {m.eps for m in reference.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected, logits = reference(image).logits, network(image).logits
    assert expected.abs().max() > 0.1
    assert logits.shape == (1, 20, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_logits_are_those_of_transformers(theirs):
    check_parity(theirs, "segformer_b0", (64, 96))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(512, 1024), (333, 517)], ids=str)
@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b2"])
def test_logits_are_those_of_transformers_at_full_size(theirs, name, size):
    check_parity(theirs, name, size)


@pytest.mark.parametrize("name", SIZES)
def test_size_is_that_of_transformers(theirs, name):
    with torch.device("meta"):
        assert count(create_segmenter(name, num_classes=19)) == count(theirs(name, 19))
